"""Divergences in stages, for rows that nobody sees whole at once: pieces of a kernel, columns of a rank.

    sides(z, student, teachers) -> the student beside each teacher and each teacher beside the student, (T, R)
    jsd_sums(z, student, teachers, row) -> (3, T, R): the sums of q log(q / m), p log(p / m) and p (u - u_top)
    kl_grad(z, student, teachers, divergence, row, weight, cap, gradient, dlogits) -> None

Between stages the ranks that share a vocabulary exchange what a row needs. Each holds some of its columns, and counts
ids from the first of them: one that is no column is another rank's to treat. What is no token is -inf on both sides; a
piece without any mass is NaN, which `merge` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..shard import Shard
from .stats import Row, Side, divergence_from, kl_gradient, log_mix, norm_gap
from .torch import largest

Stages = tuple[Callable[..., tuple[Side, Side]], Callable[..., Tensor], Callable[..., None]]


def in_stages(
    stages: Stages,
    shard: Shard,
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    beta: float,
    weight: Tensor | None = None,
    cap: float | Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor:
    """`kl` of a backend, as `rows` describes it."""
    sides, jsd_sums, kl_grad = stages
    heads = z, student, teachers
    s, t = shard.merged(*sides(*heads))
    row = Row(shard.in_columns(s), t, norm_gap(s, t), s.max - s.cross, beta)
    mean = s.mean
    if divergence == "jsd":
        row = row._replace(offset=log_mix(-(s.cross - t.max) - row.gap, beta)[0])
        to_teacher, to_student, moment = shard.total(jsd_sums(*heads, row))
        value: Tensor = beta * to_teacher + (1 - beta) * to_student + 0 * row.gap
        if weight is not None:
            weight, mean = (1 - beta) * weight, moment
    else:
        value = divergence_from(divergence, s, t)
    if dlogits is not None and weight is not None:
        kl_grad(*heads, divergence, row, weight, cap, kl_gradient(divergence, weight, s, t, mean), dlogits)
    return value


class Rows:
    """The functions of a backend where ranks share a vocabulary."""

    def __init__(self, backend: ModuleType, shard: str) -> None:
        self.backend, self.shard, self.softcap = backend, Shard.read(shard), backend.softcap
        self.stages: Stages = (backend.sides, backend.jsd_sums, backend.kl_grad)

    def logprob(self, z: Tensor) -> Side:
        return self.shard.merged(self.backend.logprob(z))[0]

    def logprob_grad(self, z: Tensor, side: Side, tokens: Tensor, *rest: Any) -> None:
        self.backend.logprob_grad(z, self.shard.in_columns(side), tokens - self.shard.first, *rest)

    def kl(self, *arguments: Any) -> Tensor:
        return in_stages(self.stages, self.shard, *arguments)

    def agreement(self, z: Tensor, student: int, teachers: list[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
        s, t = self.shard.merged(*self.stages[0](z, student, teachers))
        ids = self.shard.largest(*largest(z, [student, *teachers], k), k)
        both = torch.cat([ids[:1].expand_as(ids[1:]), ids[1:]], -1).sort(-1).values
        common = (both[..., 1:] == both[..., :-1]).sum(-1).to(z.dtype) / k
        return common, divergence_from("forward", s, t), divergence_from("reverse", s, t)
