"""A batch: which prompts a step takes, and what is to be learnt from their completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from copd.distill import TeacherScore
from copd.rollout import Rollout, seed_of
from copd.task import Prompt, Task


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; `batch` is what it came from."""

    def __init__(self, message: str, batch: Batch) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass
class Batch:
    """One rollout and what is to be learnt from it: rewards (native) or a teacher's score (cross)."""

    domain: str
    rollout: Rollout
    weight: Tensor
    """(B, C) fp32, weight of each token in the loss"""
    advantage: Tensor | None = None
    """(B,) fp32, of a native batch"""
    teacher: TeacherScore | None = None
    """of a cross batch"""
    stats: dict[str, float] = field(default_factory=dict)
    logp_old: dict[int, Tensor] = field(default_factory=dict)
    """log-probs (N,) before the first update, by micro-batch"""

    def __str__(self) -> str:
        kind = "native" if self.teacher is None else f"cross batch scored by {self.teacher.name!r}"
        rows = [prompt.index for prompt in self.rollout.sequences.prompts]
        return f"{kind} on {self.domain!r}, rows {rows}"


@lru_cache(maxsize=64)
def _order(seed: int, rows: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def draw(task: Task, count: int, step: int, *key: object) -> list[Prompt]:
    """The prompts of `step`: `count` rows a step through a fresh permutation of the task each epoch."""
    rows = task.size("train")
    prompts = []
    for place in range(step * count, (step + 1) * count):
        epoch, position = divmod(place, rows)
        prompt = task.prompt(int(_order(seed_of("order", *key, epoch), rows)[position]))
        if prompt.task != task.name:
            raise ValueError(
                f"prompt: row {prompt.index} of {prompt.task!r} must belong to a task of its branch; got {task.name!r}"
            )
        prompts.append(prompt)
    return prompts
