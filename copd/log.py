"""Where numbers go while a run lasts: `metrics.jsonl` always, a progress bar, and trackers where asked for."""

from __future__ import annotations

import importlib
import json
import logging
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd import files
from copd.branch import Branch
from copd.config import Config
from copd.ranks import Place

logger = logging.getLogger("copd")
LINE_SECONDS = 10  # between the lines that stand for the bar where there is no terminal


def memory_mib(device: torch.device) -> float:
    """Peak device memory, or the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def state_memory(branches: list[Branch]) -> None:
    """States what the branches need, which is the first thing to know about K of them."""
    count, first = len(branches), branches[0]
    width = 4 if first.cfg.model.dtype == "float32" else 2
    parameters, trained = (sum(p.numel() for p in ps) for ps in (first.model.parameters(), first.parameters))
    # gradients and AdamW's two moments; fp32 master weights of a bf16 model
    learning = 12 if width == 4 else 16
    if first.cfg.model.adapter is not None:
        base = parameters - sum(p.numel() for name, p in first.model.named_parameters() if ".copd-" in name)
        mib, each = width * base / 2**20, (width + learning) * trained / 2**20
        logger.info(
            f"a base of {base / 1e6:.2f} M parameters: {mib:.1f} MiB; {count} adapter(s) of {trained / 1e6:.2f} M: "
            f"weights, gradients and optimiser {each:.1f} MiB each, {mib + count * each:.1f} MiB in all"
        )
        return
    mib = (width * parameters + learning * trained) / 2**20
    logger.info(
        f"{count} branch(es) of {parameters / 1e6:.2f} M parameters: weights, gradients and optimiser {mib:.1f} "
        f"MiB each, {count * mib:.1f} MiB in all{', one at a time on the device' if first.cfg.offload else ''}"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, but for one that a kill cut off."""
    records = []
    for line in path.read_text().split("\n") if path.exists() else []:
        try:
            records += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            logger.warning("log: a line of %s must be JSON; got %.40r; it is left out", path, line)
    return records


class Log:
    """`metrics.jsonl`, progress and trackers of one run. Of an interrupted run, the records up to where it resumes."""

    def __init__(self, directory: Path, cfg: Config, total: int, done: int, place: Place | None = None) -> None:
        path, name = directory / "metrics.jsonl", directory / "run-id"
        place = place or Place(list(cfg.branches))
        before = place.told(lambda: read(path) if done else [])
        self.records = [record for record in before if record["step"] <= done]
        if place.first:
            files.write(path, "".join(json.dumps(record) + "\n" for record in self.records))
            if not (done and name.exists()):
                files.write(name, uuid.uuid4().hex[:12])
        # all ranks know all records; one writes them
        self.file = (path if place.first else Path(os.devnull)).open("a")
        self.start = self.shown = time.perf_counter() - (self.records[-1]["time"] if self.records else 0.0)
        hidden = None if place.first else True
        self.bar = tqdm(total=total, initial=done, desc=cfg.name, disable=hidden, dynamic_ncols=True)
        self.total, self.done = total, done
        self.warned: set[str] = set()
        kinds = cfg.report_to if place.first else []
        self.trackers = [Tracker(kind, directory, cfg, name.read_text()) for kind in kinds]
        # a resumed run takes some steps again, to the same numbers
        self.sent = {tag(record) for record in before}

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        record = {"kind": kind, "step": step, "time": round(self.seconds(), 3)} | record
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if tag(record) in self.sent:
            return
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        for tracker in self.trackers:
            tracker.send({f"{tag(record)[0]}/{k}": v for k, v in numbers.items()}, step)

    def seconds(self) -> float:
        """Since the run began, in whichever process, without the time between them."""
        return time.perf_counter() - self.start

    def progress(self, phase: str, metrics: dict[str, dict[str, Any]]) -> None:
        def mean(name: str) -> str:
            values = [record[name] for record in metrics.values() if name in record]
            return f"{sum(values) / len(values):.3g}" if values else "-"

        numbers = (
            f"{phase} reward {mean('reward')} kl {mean('kl')} overlap {mean('overlap')} "
            f"{mean('tokens_per_s')} tok/s {mean('memory_mib')} MiB"
        )
        self.done += 1
        self.bar.update()
        self.bar.set_postfix_str(numbers)
        now = time.perf_counter()
        if self.bar.disable and (now - self.shown > LINE_SECONDS or self.done == self.total):
            self.shown = now
            logger.info("step %d of %d: %s", self.done, self.total, numbers)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        for tracker in self.trackers:
            tracker.close()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def last(self, kind: str, **which: Any) -> dict[str, Any]:
        """The newest record with these values, or an empty one."""
        which = {"kind": kind} | which
        return next((record for record in reversed(self.records) if which.items() <= record.items()), {})


def tag(record: dict[str, Any]) -> tuple[str, int]:
    """What a record is about, and when: `kind/branch/student/teacher/domain`, as far as it names them; and its step."""
    who = [record["kind"], *(record[key] for key in ("branch", "student", "teacher", "domain") if key in record)]
    return "/".join(who), record["step"]


class Tracker:
    """One of the places numbers are sent to; an `ImportError` names the package that is missing.

    `run_id` is the run's, whichever process works on it, so that a resumed run goes on where it was.
    """

    def __init__(self, name: str, directory: Path, cfg: Config, run_id: str) -> None:
        self.send: Callable[[dict[str, float], int], object]
        self.close: Callable[[], object]
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"))
            self.close = writer.close

            def send(numbers: dict[str, float], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)

            self.send = send
            return
        package = importlib.import_module(name)
        self.close, options = package.finish, {"project": "copd", "config": asdict(cfg), "resume": "allow"}
        if name == "wandb":
            package.init(id=run_id, name=cfg.name, dir=str(directory), **options)
            # records of one step come one by one, which wandb's own step counter would refuse
            self.send = lambda numbers, step: package.log(numbers | {"step": step})
        else:
            package.init(name=f"{cfg.name}-{run_id}", **options)  # its name is how trackio knows a run
            self.send = lambda numbers, step: package.log(numbers, step=step)
