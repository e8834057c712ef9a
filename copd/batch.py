"""What a step learns from: prompts drawn from a task, one rollout on them, and what rewards or teachers say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from copd.distill import Lesson
from copd.peers import Peers
from copd.rlvr import advantages, deviation
from copd.rollout import Rollout, seed_of
from copd.settings import RLVRConfig
from copd.task import Prompt, Task


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite; `batch` is what it came from."""

    def __init__(self, message: str, batch: Batch) -> None:
        super().__init__(message)
        self.batch = batch


@dataclass
class Batch:
    """One rollout and what is to be learnt from it: from rewards (native), from teachers (cross), or from both."""

    domain: str
    rollout: Rollout
    weight: Tensor
    """(B, C) fp32, weight of each token in the loss"""
    advantage: Tensor | None = None
    """(B,) fp32, of rewards"""
    lesson: Lesson | None = None
    """of teachers"""
    stats: dict[str, float] = field(default_factory=dict)
    logp_old: dict[int, Tensor] = field(default_factory=dict)
    """log-probs (N,) before the first update, by micro-batch"""

    def rewarded(self, reward: Tensor, cfg: RLVRConfig, peers: Peers) -> Batch:
        """Gives the batch the group advantages of its rewards (P, G), NaN for one that failed."""
        everyones = torch.cat(peers.all(reward))
        spread = deviation(everyones)
        self.stats |= {
            "reward": everyones.nanmean().item(),
            "reward_std": spread.mean().item(),
            "frac_reward_zero_std": (spread == 0).float().mean().item(),
        }
        self.advantage = advantages(reward, cfg).flatten().to(self.weight.device)
        return self

    def __str__(self) -> str:
        kind = "native" if self.lesson is None else f"cross batch scored by {self.lesson}"
        rows = [prompt.index for prompt in self.rollout.prompts]
        return f"{kind} on {self.domain!r}, rows {rows}"


@lru_cache(maxsize=64)
def _order(seed: int, rows: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


def _rows(task: Task, count: int, step: int, *key: object) -> list[int]:
    rows = task.size("train")
    places = (divmod(place, rows) for place in range(step * count, (step + 1) * count))
    return [int(_order(seed_of("order", *key, epoch), rows)[position]) for epoch, position in places]


def draw(task: Task, count: int, step: int, *key: object, every: int = 1, more: bool = True) -> list[Prompt]:
    """The prompts of `step`: `count` rows a step through a fresh permutation of the task each epoch.

    A task that decodes files is told what to expect `every` steps later, if `more` is to come.
    """
    prompts = []
    for row in _rows(task, count, step, *key):
        prompt = task.prompt(row)
        if prompt.task != task.name:
            raise ValueError(
                f"prompt: row {prompt.index} of {prompt.task!r} must belong to a task of its branch; got {task.name!r}"
            )
        prompts.append(prompt)
    if more and (expect := getattr(task, "expect", None)) is not None:
        expect(_rows(task, count, step + every, *key))
    return prompts


def deal(
    tasks: Sequence[Task], count: int, step: int, *key: object, more: bool = True
) -> tuple[list[Prompt], list[slice]]:
    """`count` prompts dealt out among the tasks, one task after the other, and where those of each stand.

    Which tasks have a prompt more than others changes from step to step.
    """
    K = len(tasks)
    shares = [len(range((i - step) % K, count, K)) for i in range(K)]
    drawn = [draw(task, -(-count // K), step, *key, task.name, more=more) for task in tasks]
    dealt = [prompts[:n] for prompts, n in zip(drawn, shares, strict=True)]
    ends = [0, *accumulate(shares)]
    return [prompt for prompts in dealt for prompt in prompts], [slice(*pair) for pair in pairwise(ends)]


def completions(batches: Sequence[Batch], micro_batch_tokens: int, peers: Peers) -> dict[str, Any]:
    """What is logged of the rows of all batches, those of other ranks too."""
    rows = [(b.rollout.truncated, b.rollout.mask.sum(1).float(), b.weight.any(1)) for b in batches]
    mine = tuple(torch.cat(column).cpu() for column in zip(*rows, strict=True))
    truncated, length, weighed = (torch.cat(column) for column in zip(*peers.all(mine), strict=True))
    found: dict[str, Any] = {}
    for kind, lengths in (("", length), ("terminated_", length[~truncated])):
        for name, value in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
            found[f"completions/{name}_{kind}length"] = value(lengths).item() if len(lengths) else 0.0
    needed = sum(peers.all(sum(sum(batch.rollout.lengths()) for batch in batches)))
    computed = sum(peers.all(sum(batch.rollout.computed(micro_batch_tokens) for batch in batches)))
    return found | {
        "completions/clipped_ratio": truncated.float().mean().item(),
        "completions/weighed_ratio": weighed.float().mean().item(),
        "num_tokens": needed,
        "padding_ratio": computed / needed,
        "tokens": int(length.sum()),
        "rollouts": len(truncated),
    }
