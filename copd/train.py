"""Trains one run, start to end: base, branches, the loop, evaluation, merge, results.

python -m copd.train --config configs/smoke.yaml [key=value ...] [--dry-run]
"""

from __future__ import annotations

import copy
import json
import logging
import signal
import sys
import time
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from copd import checkpoint, config, evaluate, topology
from copd.branch import Branch, NonFiniteLoss
from copd.coevolve import Plan, coevolve
from copd.config import BranchConfig, Config
from copd.data import FileTask
from copd.log import Log, memory_mib
from copd.merge import merge
from copd.model import load, load_like
from copd.tasks import Task
from copd.tasks.arithmetic import Arithmetic
from copd.tasks.count import Count
from copd.tasks.motion import Motion
from copd.warmstart import warm_start
from copd_kernels.rows import resolve

logger = logging.getLogger("copd")
SYNTHETIC = {"arithmetic": Arithmetic, "count": Count, "motion": Motion}


def make_task(name: str, cfg: BranchConfig, processor: Any) -> Task:
    if cfg.task == "data":
        return FileTask(name, cfg.data, processor)
    if cfg.task not in SYNTHETIC:
        options = ", ".join([*SYNTHETIC, "data"])
        raise ValueError(f"config: branches.{name}.task must be one of {options}; got {cfg.task!r}")
    try:
        return SYNTHETIC[cfg.task](name, **cfg.options)
    except TypeError as error:
        raise ValueError(f"config: branches.{name}.options must be arguments of {cfg.task}; got {error}") from error


def device_of(cfg: Config) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(auto if cfg.device == "auto" else cfg.device)


class Run:
    """One run's pieces: the base, the branches that learn, and the plan they follow."""

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.directory = cfg, cfg.run_dir
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.device = device_of(cfg)
        base, self.processor = load(cfg.model, cfg.seed, self.device)
        self.tasks = {name: make_task(name, branch, self.processor) for name, branch in cfg.branches.items()}
        # branches are copies: the base itself need not stay on the device
        self.base = warm_start(base, self.processor, list(self.tasks.values()), cfg).to("cpu")
        self.plan = self._plan()
        self._log_memory()

    def branch(self, name: str, tasks: list[Task], model: PreTrainedModel | None = None) -> Branch:
        model = copy.deepcopy(self.base) if model is None else model
        return Branch(name, tasks, model, self.processor, self.cfg, self.device)

    def _plan(self) -> Plan:
        cfg, tasks = self.cfg, list(self.tasks.values())
        if cfg.method == "mixed":
            return Plan([self.branch("mixed", tasks)], ["rl"] * (cfg.mixed_steps or len(tasks) * cfg.steps))
        if cfg.method == "mopd":
            experts = [self.branch(task.name, [task], self._expert(task.name)) for task in tasks]
            steps = cfg.mopd_steps or len(tasks) * cfg.cycles * cfg.opd_steps
            student = self.branch("student", tasks)
            return Plan([student], ["opd"] * steps, {"student": experts}, native=False, in_turn=True)
        branches = {name: self.branch(name, [self.tasks[name]]) for name in topology.local(list(self.tasks))}
        if cfg.method in ("independent", "expert"):
            return Plan(list(branches.values()), ["rl"] * cfg.steps)
        phases = (["rl"] * cfg.rl_steps + ["opd"] * cfg.opd_steps) * cfg.cycles
        taught = {name: [branches[teacher] for teacher in who] for name, who in topology.teachers(cfg).items()}
        return Plan(list(branches.values()), phases, taught, native=cfg.opd.native)

    def _expert(self, name: str) -> PreTrainedModel:
        """A teacher of `mopd`, from a finished run, or from one made here and now."""
        if self.cfg.experts is None:
            inner = replace(self.cfg, method="expert", name=f"{self.cfg.name}/experts")
            if not (inner.run_dir / "results.json").exists():
                run(inner)
        folder = Path(self.cfg.experts or self.cfg.run_dir / "experts") / f"branch-{name}"
        if not folder.exists():
            raise ValueError(f"config: experts must hold a finished run's branches; got no {folder}")
        return load_like(folder, self.base, self.processor)

    def _log_memory(self) -> None:
        """States what the branches need, which is the first thing to know about K of them."""
        count, (first, *_) = len(self.plan.branches), self.plan.branches
        width = 4 if self.cfg.model.dtype == "float32" else 2
        parameters, trained = (sum(p.numel() for p in ps) for ps in (first.model.parameters(), first.parameters))
        # weights; gradients and AdamW's two moments; fp32 master weights of a bf16 model
        mib = (width * parameters + (12 if width == 4 else 16) * trained) / 2**20
        logger.info(
            f"{count} branch(es) of {parameters / 1e6:.2f} M parameters: weights, gradients and optimiser {mib:.1f} "
            f"MiB each, {count * mib:.1f} MiB in all{', one at a time on the device' if self.cfg.offload else ''}"
        )

    def train(self) -> Log:
        cfg, plan, total = self.cfg, self.plan, len(self.plan.phases)
        saved = checkpoint.found(self.directory) if cfg.resume else []
        done = checkpoint.load(saved[-1], plan.branches, cfg) if saved else 0
        log = Log(self.directory, cfg, total, done)
        (self.directory / "config.yaml").write_text(config.dump(cfg))
        if done == 0:
            self.measure(log, 0)
        interrupted = []
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
                self.measure(log, step)
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

    def measure(self, log: Log, step: int) -> None:
        """Accuracy of every branch on every domain, and divergence along the edges of the topology, where due."""
        cfg, last = self.cfg.eval, step == len(self.plan.phases)
        if _due(step, cfg.every, last):
            for branch in self.plan.branches:
                for task in self.tasks.values():
                    log.write("eval", step, evaluate.accuracy(branch, task, cfg.curve_prompts, 1)[0])
        if not _due(step, cfg.every if cfg.divergence_every is None else cfg.divergence_every, last):
            return
        branches = {branch.name: branch for branch in self.plan.branches}
        for student, teachers in topology.teachers(self.cfg).items():
            for teacher in teachers:
                if student in branches and teacher in branches:
                    record = evaluate.divergence(branches[student], branches[teacher], self.tasks[student])
                    log.write("divergence", step, record)

    def merged(self) -> PreTrainedModel:
        """The base with the branches' weights merged into it."""
        states = {branch.name: branch.model.state_dict() for branch in self.plan.branches}
        model = copy.deepcopy(self.base)
        model.load_state_dict(merge(self.base.state_dict(), states, self.cfg.merge))
        return model

    def finish(self, log: Log, seconds: float) -> dict[str, Any]:
        """Evaluates and saves every model, and writes `results.json`."""
        cfg, plan = self.cfg, self.plan
        models = [self.branch("base", list(self.tasks.values())), *plan.branches]
        if cfg.method in ("copd", "independent"):
            models.append(self.branch("merged", list(self.tasks.values()), self.merged()))
        final, samples = {}, []
        for branch in models:
            final[branch.name] = {}
            for name, task in self.tasks.items():
                record, shown = evaluate.accuracy(branch, task, cfg.eval.prompts, cfg.eval.samples)
                final[branch.name][name] = record
                samples += shown
            if branch.name != "base":
                folder = self.directory / ("merged" if branch.name == "merged" else f"branch-{branch.name}")
                branch.model.save_pretrained(folder)
                self.processor.save_pretrained(folder)
        trained = log.of("train")
        results = {
            "name": cfg.name,
            "method": cfg.method,
            "variant": cfg.variant,
            "seed": cfg.seed,
            "hub": cfg.hub or next(iter(cfg.branches)),
            "domains": list(self.tasks),
            "branches": {branch.name: branch.tasks[0].name for branch in plan.branches if len(branch.tasks) == 1},
            "config": asdict(cfg),
            "phases": spans(plan.phases),
            "final": final,
            "eval": log.of("eval"),
            "divergence": log.of("divergence"),
            "samples": samples,
            "cost": {
                "seconds": round(seconds, 1),
                "rollouts": sum(record["rollouts"] for record in trained),
                "updates": len(trained) * cfg.rlvr.updates_per_batch,
                "tokens": sum(record["tokens"] for record in trained),
            },
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                # the backend's sums differ from another's in the last bits
                "rows": resolve("train", None, self.device),
            },
        }
        (self.directory / "results.json").write_text(json.dumps(results, indent=1))
        return results


def spans(phases: list[str]) -> list[list[Any]]:
    """Runs of equal phases as [phase, first step, end]."""
    groups = [list(group) for _, group in groupby(enumerate(phases), lambda pair: pair[1])]
    return [[group[0][1], group[0][0], group[-1][0] + 1] for group in groups]


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def _interrupt(interrupted: list[bool]) -> None:
    """First Ctrl-C: stop after this step. Second: at once."""
    if interrupted:
        raise KeyboardInterrupt
    interrupted.append(True)
    logger.warning("interrupted: saving a checkpoint after this step")


def run(cfg: Config) -> dict[str, Any]:
    """One whole run; returns what `results.json` holds. A finished run is read, not repeated."""
    finished = cfg.run_dir / "results.json"
    if cfg.resume and finished.exists():
        results = json.loads(finished.read_text())
        if checkpoint.identity(cfg) != checkpoint.identity(config.load(results["config"])):
            raise ValueError(f"resume: config must be the one of the finished run {cfg.run_dir}; got another")
        return results
    started = time.perf_counter()
    trainer = Run(cfg)
    log = trainer.train()
    return trainer.finish(log, time.perf_counter() - started)


if __name__ == "__main__":
    from copd.cli import main

    main(["train", *sys.argv[1:]])
