"""Trains one run, start to end: base and tasks, branches, the loop, evaluation, merge, results.

python -m copd.train --config configs/smoke.yaml [key=value ...] [--dry-run]
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from copd import checkpoint, engine, evaluate, files, results, schema, state
from copd.batch import NonFiniteLoss
from copd.branch import Branch
from copd.coevolve import coevolve, make_plan
from copd.config import Config
from copd.data import FileTask
from copd.log import Log, memory_mib, state_memory
from copd.merge import branch_weights, merge_into
from copd.model import is_adapter, load, load_like
from copd.ranks import KEEPERS, Place, device_of, joined
from copd.rollout import seed_of
from copd.task import Task
from copd.train import health
from copd.train.interrupts import Interrupts, Stopped
from copd.train.saving import Saver
from copd.weights import Weights, Whole, shard

if TYPE_CHECKING:
    from peft import LoraConfig

    from copd.adapter import Adapter

logger = logging.getLogger("copd")
C = TypeVar("C", bound=Config)
Start = tuple[PreTrainedModel, Any, Mapping[str, Task]]
"""what a run begins with: the base, its processor, and the task of each branch"""


def from_files(cfg: Config, device: torch.device) -> Start:
    """A saved checkpoint, and the rows of each branch's files."""
    for name, owned in cfg.branches.items():
        if owned.task != "data":
            raise ValueError(f"config: branches.{name}.task must be data; got {owned.task!r}")
    model, processor = load(cfg.model, device)
    return model, processor, {name: FileTask(name, owned.data, processor) for name, owned in cfg.branches.items()}


def run(cfg: C, start: Callable[[C, torch.device], Start] = from_files) -> dict[str, Any]:
    """One whole run; returns what `results.json` holds. A finished run is read, not repeated, unless it is to go on.

    `start` makes what it begins with, on the device: files, or `copd.lab.start.start`.
    """
    with joined(cfg), Interrupts(), ExitStack() as stack:
        place = Place.of(cfg)

        def begin() -> dict[str, Any] | None:
            stack.enter_context(files.lock(cfg.run_dir))
            if not cfg.resume and cfg.run_dir.exists():
                logger.warning("resume=false: what was in %s is now in %s", cfg.run_dir, files.move_aside(cfg.run_dir))
            return finished(cfg)

        if found := place.told(begin):
            return found
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        trainer = Run(cfg, *place.ahead(lambda: start(cfg, device_of(cfg))))
        return trainer.finish(trainer.train())


def finished(cfg: Config) -> dict[str, Any] | None:
    """The results of this very run, or None where there are none or something is left to do for this config."""
    path = cfg.run_dir / "results.json"
    try:
        found = json.loads(path.read_text()) if path.exists() else None
        whole = found is None or {"identity", "config"} <= found.keys()
    except (json.JSONDecodeError, AttributeError) as error:
        found, whole = str(error), False
    if not whole:
        logger.warning("resume: %s must hold the results of a run; got %.40s; it is made again", path, found)
    if not whole or found is None:
        return None
    checkpoint.same(found["identity"], cfg, f"the finished run {cfg.run_dir}")
    # what may change without touching the weights, and still makes other results
    length = ("cycles", "rl_steps", "opd_steps", "mixed_steps", "mixed_rollouts", "mopd_steps")
    kept = (*length, "consolidate", "eval", "merge")
    now = {name: asdict(cfg)[name] for name in kept}
    # settings that the finished run did not know yet are taken as they are
    if schema.agree({name: found["config"].get(name, now[name]) for name in kept}, now):
        (cfg.run_dir / "final.json").unlink(missing_ok=True)
        return found
    if not checkpoint.found(cfg.run_dir):
        raise ValueError(
            f"resume: {cfg.run_dir} must have a checkpoint to go on from; got none; resume=false starts anew"
        )
    return None


class Run:
    """One run's pieces: the base, the branches that learn, and the plan they follow."""

    def __init__(self, cfg: Config, base: PreTrainedModel, processor: Any, tasks: Mapping[str, Task]) -> None:
        self.cfg, self.directory, self.device = cfg, cfg.run_dir, device_of(cfg)
        self.base, self.processor, self.tasks = base, processor, tasks
        self.engine = engine.make(cfg, base, processor)
        self.lora: LoraConfig | None = None
        if cfg.model.adapter is None:
            # branches are copies: the base itself need not stay on the device
            base.to("cpu")  # type: ignore[arg-type]  # transformers wraps `to`
        else:
            from copd import adapter  # peft, which it imports, takes a second

            self.lora = adapter.prepare(base, cfg, self.device)
        self.place = Place.of(cfg)
        self.plan = make_plan(cfg, tasks, self.branch, self._expert, self.merged, self._overlap, self.place)
        state_memory(self.plan.branches)

    def branch(self, name: str, tasks: list[Task], model: PreTrainedModel | Weights | None = None) -> Branch:
        if model is None:
            model = self._copy() if self.lora is None else self._adapter(name)
        return Branch(name, tasks, model, self.processor, self.cfg, self.device, self.engine, self.place.peers)

    def _copy(self) -> PreTrainedModel:
        return copy.deepcopy(self.base)

    def _adapter(self, name: str) -> Adapter:
        from copd.adapter import Adapter

        assert self.lora is not None
        # one seed: all branches are one policy until they learn
        return Adapter(self.base, name, self.lora, seed_of(self.cfg.seed, "adapter"))

    def _expert(self, name: str) -> PreTrainedModel | Weights:
        """A teacher of `mopd`, from a finished run, or from one made here and now."""
        if self.cfg.experts is None:
            inner = replace(self.cfg, method="expert", name=f"{self.cfg.name}/experts")
            if not (inner.run_dir / "results.json").exists():
                base = self.base if self.lora is None else self._copy()  # an inner run puts adapters on it
                run(inner, lambda *_: (base, self.processor, self.tasks))
        folder = Path(self.cfg.experts or self.cfg.run_dir / "experts") / f"branch-{name}"
        if not folder.exists():
            raise ValueError(f"config: experts must hold a finished run's branches; got no {folder}")
        if self.lora is not None and is_adapter(folder):
            from copd.adapter import Adapter

            return Adapter.load(self.base, folder, f"expert-{name}")
        return load_like(folder, self.base, self.processor)

    def train(self) -> Log:
        cfg, plan, total = self.cfg, self.plan, self.plan.steps
        done = checkpoint.resume(self.directory, plan, cfg) if cfg.resume else 0
        if done > total:
            raise ValueError(f"resume: cycles and steps must give at least the {done} steps done; got {total}")
        if self.place.first:
            (self.directory / "results.json").unlink(missing_ok=True)  # of a run that is to go on
            files.write(self.directory / "config.yaml", schema.dump(cfg))
        log = self.log = Log(self.directory, cfg, total, done, self.place)
        saver = Saver(self.directory, plan, cfg, done)
        whole = [branch.updates for branch in plan.models(done)]
        try:
            with Interrupts(agree=self.place.any if self.place.size > 1 else None) as interrupts:
                evaluate.measure(plan, self.tasks, log, done)
                steps, clock = coevolve(plan, done), time.perf_counter()
                while done < total:
                    with interrupts.hold():
                        done, phase, metrics = next(steps)
                        whole = [branch.updates for branch in plan.models(done)]
                        self._record(log, done, phase, metrics, time.perf_counter() - clock)
                    if done == total or (cfg.checkpoint_every and done % cfg.checkpoint_every == 0):
                        more = done < total
                        saver.save(
                            done, required=cfg.checkpoint_required and more, beside=cfg.checkpoint_async and more
                        )
                    evaluate.measure(plan, self.tasks, log, done)
                    clock = time.perf_counter()
        except BaseException as error:
            between = whole == [branch.updates for branch in plan.models(done)]
            if isinstance(error, NonFiniteLoss):
                error = self._failed(error, done + 1)
            # what stops one rank alone leaves the others in the middle of something
            everywhere = self.place.size == 1 or isinstance(error, Stopped | health.Unhealthy)
            try:
                saver.settle()
            except OSError as full:
                logger.error(full)
            if done > saver.saved and between and everywhere:
                saver.save(done, required=False)
            elif done > saver.saved:
                logger.error("stopped within step %d, when some branches had moved: it is no state to resume", done + 1)
            saved = saver.saved
            kept = f"checkpoint-{saved} of {self.directory}" if saved else "the start"
            logger.warning("stopped after step %d of %d: the same command continues from %s", done, total, kept)
            log.close()
            raise error
        return log

    def _record(self, log: Log, step: int, phase: str, metrics: dict[str, dict[str, Any]], seconds: float) -> None:
        speed = sum(record["tokens"] for record in metrics.values()) / seconds
        memory = self.place.union({self.place.index: memory_mib(self.device)}, range(self.place.size))
        for name, record in metrics.items():
            record["num_tokens"] += log.last("train", branch=name).get("num_tokens", 0)
            record |= {"step_time": seconds, "tokens_per_s": speed, "memory_mib": memory[self.place.keeper(name)]}
            log.write("train", step, {"phase": phase, "branch": name} | record)
        log.progress(phase, metrics)
        for name, record in metrics.items():
            health.check({"branch": name} | record, log, self.cfg)

    def _failed(self, error: NonFiniteLoss, step: int) -> NonFiniteLoss:
        """Branches that had already moved in this step make its state one to look at, not one to resume."""
        place = self.place
        path = self.directory / f"failed-{step}" / ("state.pt" if place.size == 1 else f"rank-{place.index}.pt")
        weights = {branch.name: state.shards(branch) for branch in self.plan.models(step - 1)}
        with files.whole(path) as scratch:
            torch.save({"batch": error.batch, "branches": weights}, scratch)
        return NonFiniteLoss(f"{error}; step {step}, batch and weights saved in {path.parent}", error.batch)

    def merged(self, name: str = "merged", learns: bool = False) -> Branch | None:
        """The base with the branches' weights merged into it; or, where the config says so, into one adapter.

        All ranks ask for it; None but where it lives. One parameter at a time, of which ranks that split a model have
        their shards.
        """
        cfg, names, everything = self.cfg.merge, [*self.place.owner], list(self.tasks.values())
        if self.lora is not None:
            made = self._merged_adapters()
            if learns and isinstance(made, PreTrainedModel):  # the config refuses to learn from a merge into an adapter
                made.requires_grad_(True)
            return self.branch(name, everything, made) if made else None
        model = self._copy().requires_grad_(learns) if self.place.holds(name) else None
        target = self.branch(name, everything, model) if model else None
        into = state.parts(target)["weights"] if target else {}
        ours = {branch.name: state.parts(branch)["weights"] for branch in self.plan.branches}
        shares = branch_weights(names, cfg)
        for key, start in Whole(self.base).state().items():
            if start.is_floating_point():
                found = {name: shard(weights[key]) for name, weights in ours.items()}
                if brought := self.place.bring(found, names, name):
                    merge_into(into[key], start.detach(), [*brought.values()], shares, cfg)
        if target:
            target.publish()
        return target

    def _merged_adapters(self) -> PreTrainedModel | Weights | None:
        from copd import merge_adapters

        here, names = {branch.name: branch.weights for branch in self.plan.branches}, self.place.owner
        states = self.place.bring({name: weights.state() for name, weights in here.items()}, [*names], "merged")
        if states is None:
            return None
        guests = {name: self._adapter(name) for name in names if name not in here}
        for name, guest in guests.items():
            guest.load_state(states[name])
        merged = merge_adapters.merge({name: (here | guests)[name] for name in names}, self.cfg.merge)
        for guest in guests.values():
            guest.remove()
        return merged

    def _overlap(self) -> float:
        """Mean top-k overlap along the edges of the topology, now."""
        found = evaluate.divergences(self.plan, self.tasks, self.log, len(self.plan.phases))
        return float(sum(record["overlap"] for record in found) / len(found))

    def finish(self, log: Log) -> dict[str, Any]:
        """Saves every model, evaluates it, and writes `results.json`."""
        everything, branches, place = list(self.tasks.values()), self.plan.branches, self.place
        try:
            if self.lora is not None and place.first:
                from copd import adapter

                adapter.save_base(self.base, self.lora, self.processor)
            place.together(lambda: results.save(self.directory, branches))
            models, names = [*branches], ["base", *place.owner]
            if place.holds("base"):
                base = self._copy().requires_grad_(False) if self.lora is None else self.base
                models.insert(0, self.branch("base", everything, base))
            if self.cfg.method in ("copd", "independent"):
                if merged := self.merged():
                    models.append(merged)
                models += self.plan.models(self.plan.steps)[len(branches) :]
                names += ["merged", *self.plan.names(self.plan.steps)[len(place.owner) :]]
                made = [model for model in models if model.name in KEEPERS]
                place.together(lambda: results.save(self.directory, made))
            partial = self.directory / "final.json"
            final, samples = evaluate.final(models, names, everything, log, partial, place)
            found = place.told(lambda: results.write(self.directory, self.plan, self.tasks, log, final, samples))
            if place.first:
                partial.unlink()
        except BaseException:
            logger.warning("stopped after training: the same command goes on with what %s has", self.directory)
            raise
        finally:
            log.close()
            logger.info("peak memory: %.1f MiB on %s", memory_mib(self.device), self.device)
        return found
