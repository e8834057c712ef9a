"""Trains one run, start to end: base and tasks, branches, the loop, evaluation, merge, results.

python -m copd.train --config configs/smoke.yaml [key=value ...] [--dry-run]
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from copd import checkpoint, config, evaluate, results
from copd.branch import Branch, NonFiniteLoss
from copd.coevolve import coevolve, make_plan
from copd.config import Config
from copd.data import FileTask
from copd.log import Log, memory_mib, state_memory
from copd.merge import merge
from copd.model import load, load_like
from copd.task import Task

logger = logging.getLogger("copd")
C = TypeVar("C", bound=Config)
Start = tuple[PreTrainedModel, Any, Mapping[str, Task]]
"""what a run begins with: the base, its processor, and the task of each branch"""


def device_of(cfg: Config) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if cfg.device == "auto" else cfg.device)


def from_files(cfg: Config, device: torch.device) -> Start:
    """A saved checkpoint, and the rows of each branch's files."""
    for name, owned in cfg.branches.items():
        if owned.task != "data":
            raise ValueError(f"config: branches.{name}.task must be data; got {owned.task!r}")
    model, processor = load(cfg.model, device)
    return model, processor, {name: FileTask(name, owned.data, processor) for name, owned in cfg.branches.items()}


def run(cfg: C, start: Callable[[C, torch.device], Start] = from_files) -> dict[str, Any]:
    """One whole run; returns what `results.json` holds. A finished run is read, not repeated.

    `start` makes what it begins with, on the device: files, or `copd.lab.start.start`.
    """
    finished = cfg.run_dir / "results.json"
    if cfg.resume and finished.exists():
        found = json.loads(finished.read_text())
        if checkpoint.identity(cfg) != checkpoint.identity(config.load(found["config"], schema=type(cfg))):
            raise ValueError(f"resume: config must be the one of the finished run {cfg.run_dir}; got another")
        return found
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    clock = time.perf_counter()
    trainer = Run(cfg, *start(cfg, device_of(cfg)))
    return trainer.finish(trainer.train(), time.perf_counter() - clock)


class Run:
    """One run's pieces: the base, the branches that learn, and the plan they follow."""

    def __init__(self, cfg: Config, base: PreTrainedModel, processor: Any, tasks: Mapping[str, Task]) -> None:
        self.cfg, self.directory, self.device = cfg, cfg.run_dir, device_of(cfg)
        # branches are copies: the base itself need not stay on the device
        self.base = base.to("cpu")  # type: ignore[arg-type]  # transformers wraps `to`
        self.processor, self.tasks = processor, tasks
        self.plan = make_plan(cfg, tasks, self.branch, self._expert)
        state_memory(self.plan.branches)

    def branch(self, name: str, tasks: list[Task], model: PreTrainedModel | None = None) -> Branch:
        model = copy.deepcopy(self.base) if model is None else model
        return Branch(name, tasks, model, self.processor, self.cfg, self.device)

    def _expert(self, name: str) -> PreTrainedModel:
        """A teacher of `mopd`, from a finished run, or from one made here and now."""
        if self.cfg.experts is None:
            inner = replace(self.cfg, method="expert", name=f"{self.cfg.name}/experts")
            if not (inner.run_dir / "results.json").exists():
                run(inner, lambda *_: (self.base, self.processor, self.tasks))
        folder = Path(self.cfg.experts or self.cfg.run_dir / "experts") / f"branch-{name}"
        if not folder.exists():
            raise ValueError(f"config: experts must hold a finished run's branches; got no {folder}")
        return load_like(folder, self.base, self.processor)

    def train(self) -> Log:
        cfg, plan, total = self.cfg, self.plan, len(self.plan.phases)
        saved = checkpoint.found(self.directory) if cfg.resume else []
        done = checkpoint.load(saved[-1], plan.branches, cfg) if saved else 0
        log = Log(self.directory, cfg, total, done)
        (self.directory / "config.yaml").write_text(config.dump(cfg))
        if done == 0:
            evaluate.measure(plan, self.tasks, log, 0)
        interrupted: list[bool] = []
        previous = signal.signal(signal.SIGINT, lambda *_: _interrupt(interrupted))
        clock = time.perf_counter()
        try:
            for step, phase, metrics in coevolve(plan, done):
                done, now = step, time.perf_counter()
                for name, record in metrics.items():
                    speed = sum(r["tokens"] for r in metrics.values()) / (now - clock)
                    record |= {"step_time": now - clock, "tokens_per_s": speed, "memory_mib": memory_mib(self.device)}
                    log.write("train", step, {"phase": phase, "branch": name} | record)
                log.progress(phase, metrics)
                evaluate.measure(plan, self.tasks, log, step)
                if interrupted or (cfg.checkpoint_every and step % cfg.checkpoint_every == 0 and step < total):
                    path = checkpoint.save(self.directory, step, plan.branches, cfg)
                    if interrupted:
                        logger.warning("interrupted: the same command continues from %s", path)
                        raise KeyboardInterrupt
                clock = time.perf_counter()
        except NonFiniteLoss as error:
            # branches that had already moved in this step make this state one to look at, not one to resume
            failed = self.directory / f"failed-{done + 1}"
            failed.mkdir(parents=True, exist_ok=True)
            states = {branch.name: branch.state() for branch in plan.branches}
            torch.save({"batch": error.batch, "branches": states}, failed / "state.pt")
            raise RuntimeError(f"{error}; step {done + 1}, batch and weights saved in {failed}") from error
        finally:
            signal.signal(signal.SIGINT, previous)
            log.close()
        return log

    def merged(self) -> PreTrainedModel:
        """The base with the branches' weights merged into it."""
        states = {branch.name: branch.model.state_dict() for branch in self.plan.branches}
        model = copy.deepcopy(self.base)
        model.load_state_dict(merge(self.base.state_dict(), states, self.cfg.merge))
        return model

    def finish(self, log: Log, seconds: float) -> dict[str, Any]:
        """Evaluates and saves every model, and writes `results.json`."""
        cfg, everything = self.cfg, list(self.tasks.values())
        models = [self.branch("base", everything), *self.plan.branches]
        if cfg.method in ("copd", "independent"):
            models.append(self.branch("merged", everything, self.merged()))
        final, samples = evaluate.final(models, everything)
        results.save(self.directory, models)
        return results.write(self.directory, self.plan, self.tasks, log, final, samples, seconds)


def _interrupt(interrupted: list[bool]) -> None:
    """First Ctrl-C: stop after this step. Second: at once."""
    if interrupted:
        raise KeyboardInterrupt
    interrupted.append(True)
    logger.warning("interrupted: saving a checkpoint after this step")
