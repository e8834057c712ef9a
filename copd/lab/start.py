"""What a run of the lab begins with: the tiny model, warm-started, and synthetic tasks; or real ones of either."""

from __future__ import annotations

from typing import Any

import torch

from copd.data import FileTask
from copd.lab.config import LabConfig
from copd.lab.tasks import vocabulary
from copd.lab.tasks.arithmetic import Arithmetic
from copd.lab.tasks.count import Count
from copd.lab.tasks.motion import Motion
from copd.lab.tiny import build_tiny
from copd.lab.warmstart import warm_start
from copd.model import load
from copd.settings import BranchConfig
from copd.task import Task
from copd.train import Start

SYNTHETIC = {"arithmetic": Arithmetic, "count": Count, "motion": Motion}


def start(cfg: LabConfig, device: torch.device) -> Start:
    """The base, its processor and the tasks, for `copd.train.run`."""
    if cfg.model.path is None:
        model = build_tiny(cfg.model, cfg.seed).to(device)  # type: ignore[arg-type]  # transformers wraps `to`
        processor: Any = vocabulary.tokenizer()
    else:
        model, processor = load(cfg.model, device)
    tasks = {name: make_task(name, branch, processor) for name, branch in cfg.branches.items()}
    return warm_start(model, processor, list(tasks.values()), cfg), processor, tasks


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
