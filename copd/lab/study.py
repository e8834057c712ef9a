"""All arms on all variants and seeds, each run in a process of its own, then one report over them.

An arm is a method with settings of its own; one method may stand in several.

    copd study --config configs/study.yaml [key=value ...]

Finished runs are skipped and interrupted ones resumed, so the same command continues a study. The first arm runs alone
in each (variant, seed): it makes the warm start that the others share, and, `independent`, the experts of `mopd`. A
warm start made again, by other code or on another processor, is another base: it stays with the runs that began there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from copd import files, log, schema
from copd.lab.config import LabConfig
from copd.lab.warmstart import WARM
from copd.train.interrupts import Interrupts

METHODS = ("independent", "copd", "mixed", "mopd")
LINES = 5  # of a failed run's log


@dataclass(frozen=True)
class Study:
    output_dir: str = "runs/study"
    """folder of the study: <variant>/<arm>-seed<seed>/ below it"""
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """what is compared: settings of each, its `method` being its name unless they say otherwise; the first one that is
    `independent` also gives the experts of `mopd`; none given are the four methods as they are"""
    only: list[str] = field(default_factory=lambda: ["*"])
    """patterns of <variant>/<arm>: those to run now"""
    seeds: list[int] = field(default_factory=lambda: [0])
    """seeds of each method"""
    jobs: int = 2
    """runs at a time"""
    ranks: int = 1
    """processes of each run, as of `torchrun --nproc-per-node`"""
    common: dict[str, Any] = field(default_factory=dict)
    """settings of every run, as in a run's own file"""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """settings of each suite, laid over `common`"""

    def __post_init__(self) -> None:
        if not self.arms:  # a default that a file's arms would be merged into
            object.__setattr__(self, "arms", {method: {} for method in METHODS})
        for variant in self.variants:
            for arm in self.arms:
                schema.load(LabConfig, self.tree(variant, 0, arm))

    def method(self, arm: str) -> str:
        return str(self.arms[arm].get("method", arm))

    def tree(self, variant: str, seed: int, arm: str) -> Any:
        """The settings of one run, as in its own file."""
        folder, method = f"{self.output_dir}/{variant}", self.method(arm)
        own = {"output_dir": folder, "name": f"{arm}-seed{seed}", "variant": variant, "seed": seed}
        own |= {"arm": arm, "method": method}
        experts = next((other for other in self.arms if self.method(other) == "independent"), None)
        if method == "mopd" and experts:
            own["experts"] = f"{folder}/{experts}-seed{seed}"
        kept = {"warmstart": {"cache_dir": f"{self.output_dir}/warmstart"}}
        return OmegaConf.merge(kept, self.common, self.variants[variant], self.arms[arm], own)

    def chosen(self, variant: str) -> list[str]:
        """The arms to run now."""
        return [arm for arm in self.arms if any(fnmatchcase(f"{variant}/{arm}", pattern) for pattern in self.only)]


def write_config(study: Study, variant: str, seed: int, arm: str) -> Path:
    path = Path(study.output_dir) / variant / f"{arm}-seed{seed}.yaml"
    files.write(path, OmegaConf.to_yaml(study.tree(variant, seed, arm)))
    return path


def launch(path: Path, children: set[subprocess.Popen[bytes]], ranks: int = 1) -> int:
    """Runs one config in a fresh process, or in several; its output goes to a .log beside the file."""
    with path.with_suffix(".log").open("a") as log:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *several, "-m", "copd", "train", "--config", str(path)]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        # a session of its own: a terminal's Ctrl-C reaches it once, from here
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        children.add(child)
        try:
            return child.wait()
        finally:
            children.discard(child)


def ending(path: Path) -> str:
    """A failed run and the last lines of its log."""
    log = path.with_suffix(".log")
    lines = log.read_text(errors="replace").splitlines()[-LINES:] if log.exists() else ["did not start"]
    return "\n".join([f"{path.with_suffix('')} ({log}):", *(f"    {line}" for line in lines)])


def run(study: Study) -> list[Path]:
    """Runs everything; returns the configs of runs that failed, or could not start because their first failed."""
    groups = iter(
        [
            [write_config(study, variant, seed, arm) for arm in arms]
            for seed in study.seeds
            for variant in study.variants
            if (arms := study.chosen(variant))
        ]
    )
    failed: list[Path] = []
    # a run -> those of its suite and seed that wait for it
    running: dict[Future[int], tuple[Path, list[Path]]] = {}
    pool, children = ThreadPoolExecutor(study.jobs), set[subprocess.Popen[bytes]]()

    def pass_on(number: int) -> None:
        for child in list(children):
            child.send_signal(number)

    with Interrupts(pass_on):
        try:
            while True:
                # the next suite and seed begins where the last one leaves a job idle
                while len(running) < study.jobs and (group := next(groups, None)):
                    running[pool.submit(launch, group[0], children, study.ranks)] = group[0], group[1:]
                if not running:
                    return failed
                for done in wait(running, timeout=20, return_when=FIRST_COMPLETED).done:
                    path, waiting = running.pop(done)
                    ok = done.result() == 0
                    print(f"{'done  ' if ok else 'FAILED'} {path.with_suffix('')}", flush=True)
                    if ok:
                        running |= {
                            pool.submit(launch, follower, children, study.ranks): (follower, []) for follower in waiting
                        }
                    else:
                        failed += [path, *waiting]
                for future, (path, _) in running.items():
                    if future.running():
                        print(f"       {path.with_suffix('')}: {progress(path)}", flush=True)
        finally:
            # the runs were told too, save a checkpoint and end; those that wait do not start
            pool.shutdown(cancel_futures=True)


def progress(path: Path) -> str:
    """Where a run is, from the last line of its metrics, or of its warm start in its log."""
    metrics = path.with_suffix("") / "metrics.jsonl"
    trained = [record for record in log.read(metrics) if record["kind"] == "train"]
    if not trained:
        said = path.with_suffix(".log")
        lines = said.read_text(errors="replace").splitlines() if said.exists() else []
        return next((line for line in reversed(lines) if line.startswith(WARM)), "begins")
    last = trained[-1]
    numbers = [f"{key} {last[key]:.2f}" for key in ("reward", "kl", "overlap") if key in last]
    return ", ".join([f"step {last['step']}", last["phase"], *numbers, f"{last['tokens_per_s']:.0f} tokens/s"])
