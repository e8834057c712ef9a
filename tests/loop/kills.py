"""Kills a run at every n-th thing it does to a file, goes on with it, and compares: `kills.py FOLDER [HOW_MANY]`.

A process that does nothing else forks the runs, so that no thread of another test is lost in a fork.
"""

import json
import os
import sys
from pathlib import Path

from copd_cases import make_config, run

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def forked(cfg, kill_at=0):
    """How many files the run touched before it ended, or was killed by this very hook; and how it ended."""
    folder, counted = str(cfg.run_dir), cfg.run_dir.parent / "count"

    def hook(event, arguments):
        nonlocal touched
        if (
            event in EVENTS
            and folder in str(arguments[0])
            and (event != "open" or arguments[1] not in ("r", "rb", None))
        ):
            touched += 1
            if touched == kill_at:
                os._exit(9)

    touched = 0
    if not (child := os.fork()):
        code = 1
        try:
            sys.addaudithook(hook)
            run(cfg)
            counted.write_text(str(touched))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return int(counted.read_text()) if code == 0 else kill_at, code


def told(folder):
    results = json.loads((folder / "results.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]
    names = ("kind", "step", "branch", "teacher", "domain", "reward")
    steps = [[record.get(name) for name in names] for record in records]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {part: results[part] for part in ("final", "samples", "phases")} | {"steps": steps, "files": files}


def main(folder, points):
    def config(name):
        return make_config(folder, "cycles=2", "checkpoint_every=1", "eval.every=2", f"name={name}")

    total, _ = forked(config("whole"))
    whole = told(folder / "whole")
    chosen = sorted({1 + i * total // points for i in range(points)} | {total}) if points else range(1, total + 1)
    for point in chosen:
        cfg = config(f"killed-{point}")
        _, code = forked(cfg, point)
        assert code == 9, f"killed at {point} of {total}: exit code {code}"
        _, code = forked(cfg)
        assert code == 0, f"killed at {point} of {total}: the same command does not go on"
        found = told(cfg.run_dir)
        different = [part for part in whole if found[part] != whole[part]]
        assert not different, f"killed at {point} of {total}: {different} {found[different[0]]} {whole[different[0]]}"
    print(f"{len(chosen)} of {total} points")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
