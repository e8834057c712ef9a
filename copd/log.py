"""Where numbers go while a run lasts: `metrics.jsonl` always, a progress bar, and trackers where asked for."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from copd.branch import Branch
from copd.config import Config, dump

logger = logging.getLogger("copd")


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
    # weights; gradients and AdamW's two moments; fp32 master weights of a bf16 model
    mib = (width * parameters + (12 if width == 4 else 16) * trained) / 2**20
    logger.info(
        f"{count} branch(es) of {parameters / 1e6:.2f} M parameters: weights, gradients and optimiser {mib:.1f} "
        f"MiB each, {count * mib:.1f} MiB in all{', one at a time on the device' if first.cfg.offload else ''}"
    )


class Log:
    def __init__(self, directory: Path, cfg: Config, total: int, done: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        # of an interrupted run: up to the checkpoint it resumes from
        lines = path.read_text().splitlines() if done and path.exists() else []
        self.records = [record for line in lines if (record := json.loads(line))["step"] <= done]
        path.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.file = path.open("a")
        self.start = time.perf_counter() - (self.records[-1]["time"] if self.records else 0.0)
        self.bar = tqdm(total=total, initial=done, desc=cfg.name, disable=None, dynamic_ncols=True)
        self.trackers = [tracker(name, directory, cfg) for name in cfg.report_to]

    def write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        record = {"kind": kind, "step": step, "time": round(time.perf_counter() - self.start, 3)} | record
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        who = "/".join(str(record[key]) for key in ("branch", "student", "domain") if key in record)
        for track in self.trackers:
            track({f"{kind}/{who}/{k}": v for k, v in record.items() if isinstance(v, float)}, step)

    def progress(self, phase: str, metrics: dict[str, dict[str, Any]]) -> None:
        def mean(name: str) -> str:
            values = [record[name] for record in metrics.values() if name in record]
            return f"{sum(values) / len(values):.3g}" if values else "-"

        self.bar.update()
        self.bar.set_postfix_str(
            f"{phase} reward {mean('reward')} kl {mean('kl')} overlap {mean('overlap')} "
            f"{mean('tokens_per_s')} tok/s {mean('memory_mib')} MiB"
        )

    def close(self) -> None:
        self.bar.close()
        self.file.close()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


def tracker(name: str, directory: Path, cfg: Config) -> Callable[[dict[str, float], int], object]:
    """A function (numbers, step) of one tracker; an `ImportError` names the package that is missing."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory / "tensorboard"))

        def write(numbers: dict[str, float], step: int) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)

        return write
    if name == "wandb":
        import wandb as package
    else:
        import trackio as package
    package.init(project="copd", name=cfg.name, config={"yaml": dump(cfg)})
    # records of one step come one by one, which wandb's own step counter would refuse
    return lambda numbers, step: package.log(numbers | {"step": step})
