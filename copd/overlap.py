"""How close a student is to its teachers before it learns from them: what a step logs of its cross batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from copd.batch import Batch
from copd.config import Config
from copd.distill import Lesson
from copd.peers import Peers
from copd_kernels import Head, logprob, topk


@torch.no_grad()
def overlaps(
    batch: Batch,
    lesson: Lesson,
    read: Callable[[list[int], slice | None], tuple[Head, Tensor]],
    cfg: Config,
    peers: Peers,
) -> dict[str, float]:
    """Top-k overlap with, and δ of, each teacher, on the tokens of which it has named its top words.

    `read(rows, only)` makes the student's head over the completion tokens of some rows, and those tokens.
    """
    found = lesson.weights_by_name(batch.domain)
    micro_batches = batch.rollout.micro_batches(cfg.micro_batch_tokens)
    for teacher in lesson.teachers:
        name, common, deltas = teacher.name, 0.0, [torch.empty(0)]
        for rows, theirs, logp in zip(micro_batches, teacher.likeliest, teacher.logp, strict=False):
            head, tokens = read(rows, teacher.rows)
            head, tokens = replace(head, hidden=head.hidden[: len(theirs)]), tokens[: len(theirs)]
            ours, _ = topk(head, theirs.shape[1])
            common += (ours[:, :, None] == theirs[:, None]).any(2).sum(1).div(theirs.shape[1]).sum().item()
            own = logprob(head, tokens, temperature=cfg.rollout.temperature).logp
            deltas.append((logp[: len(theirs)].to(own.device) - own).cpu())
        everyones = peers.all((common, torch.cat(deltas)))
        common, delta = sum(part for part, _ in everyones), torch.cat([part for _, part in everyones])
        if len(delta):
            found |= {f"delta_min/{name}": delta.min().item(), f"delta_max/{name}": delta.max().item()}
            found[f"overlap/{name}"] = common / len(delta)
    return found
