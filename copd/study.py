"""All methods on all variants and seeds, each run in a process of its own, then one report over them.

    python -m copd.study --config configs/study.yaml [key=value ...]

Finished runs are skipped and interrupted ones resumed, so the same command continues a study. `independent` comes first
in each (variant, seed): it makes the warm start that the others share, and the experts that `mopd` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from copd import config


@dataclass(frozen=True)
class Study:
    output_dir: str = "runs/study"
    """folder of the study: <variant>/<method>-seed<seed>/ below it"""
    methods: list[str] = field(default_factory=lambda: ["independent", "copd", "mixed", "mopd"])
    """methods to compare; `independent` also gives the experts"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """seeds of each method"""
    jobs: int = 2
    """runs at a time"""
    common: dict[str, Any] = field(default_factory=dict)
    """settings of every run, as in a run's own file"""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """settings of each suite, laid over `common`"""


def load(path: Path, overrides: list[str]) -> Study:
    tree = OmegaConf.structured(Study)
    OmegaConf.set_readonly(tree, False)
    try:
        return OmegaConf.to_object(OmegaConf.merge(tree, OmegaConf.load(path), OmegaConf.from_dotlist(overrides)))
    except OmegaConfBaseException as error:
        raise ValueError(f"study: {str(error).splitlines()[0]}") from error


def write_config(study: Study, variant: str, seed: int, method: str) -> Path:
    """The run's own file, checked against `copd.config` before anything starts."""
    folder = f"{study.output_dir}/{variant}"
    own = {"output_dir": folder, "name": f"{method}-seed{seed}", "variant": variant, "seed": seed, "method": method}
    if method == "mopd" and "independent" in study.methods:
        own["experts"] = f"{folder}/independent-seed{seed}"
    tree = OmegaConf.merge(study.common, study.variants[variant], own)
    path = Path(folder) / f"{method}-seed{seed}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(tree))
    config.load(path)
    return path


def launch(path: Path) -> int:
    """Runs one config in a fresh process; its output goes to a .log beside the file."""
    with path.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "copd.train", "--config", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode


def run(study: Study) -> list[Path]:
    """Runs everything; returns the configs of runs that failed."""
    paths = {
        (variant, seed): [write_config(study, variant, seed, method) for method in study.methods]
        for seed in study.seeds
        for variant in study.variants
    }
    failed: list[Path] = []
    ready = [first for first, *_ in paths.values()]
    after = {first: rest for first, *rest in paths.values()}
    order = [path for group in paths.values() for path in group]
    running: dict[Future[int], Path] = {}
    with ThreadPoolExecutor(study.jobs) as pool:
        while ready or running:
            # one suite and seed is finished before the next begins, as far as it keeps all jobs busy
            ready.sort(key=order.index)
            while ready and len(running) < study.jobs:
                path = ready.pop(0)
                running[pool.submit(launch, path)] = path
            for done in wait(running, timeout=20, return_when=FIRST_COMPLETED).done:
                path = running.pop(done)
                print(f"{'done  ' if done.result() == 0 else 'FAILED'} {path.with_suffix('')}", flush=True)
                following = after.pop(path, [])
                if done.result() == 0:
                    ready += following
                else:
                    failed += [path, *following]
            for path in running.values():
                print(f"       {path.with_suffix('')}: {progress(path)}", flush=True)
    return failed


def progress(path: Path) -> str:
    """Where a run is, from the last line of its metrics."""
    metrics = path.with_suffix("") / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    trained = [record for line in lines[-64:] if (record := json.loads(line))["kind"] == "train"]
    if not trained:
        return "warm start"
    last = trained[-1]
    numbers = [f"{key} {last[key]:.2f}" for key in ("reward", "kl", "overlap") if key in last]
    return ", ".join([f"step {last['step']}", last["phase"], *numbers, f"{last['tokens_per_s']:.0f} tokens/s"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="copd study", description="Runs all methods, suites and seeds.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        study = load(args.config, args.overrides)
        failed = run(study)
    except ValueError as error:
        parser.error(str(error))
    from copd import report

    report.write(Path(study.output_dir))
    print((Path(study.output_dir) / "results.md").read_text())
    print(f"{study.output_dir}: results.json, results.md, report.html")
    if failed:
        sys.exit("study: failed: " + ", ".join(str(path) for path in failed))


if __name__ == "__main__":
    main()
