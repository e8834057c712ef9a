"""Rows whose vocabulary is split over ranks: a backend's stages, and what the ranks exchange between them.

A backend that can pause between statistics and gradient has, beside `logprob`, `logprob_grad` and `softcap`,

    sides(z, student, teachers) -> the student beside each teacher and each teacher beside the student, (T, R)
    jsd_sums(z, student, teachers, row) -> (3, T, R): the sums of q log(q / m), p log(p / m) and p (u - u_top)
    kl_grad(z, student, teachers, divergence, row, weight, cap, gradient, dlogits) -> None

over this rank's columns, ids counted from the first of them. An id that is no column is another rank's to treat. What
is no token is -inf on both sides; a piece without any mass is NaN, which `merge` leaves out.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..shard import Shard
from .stats import Row, Side, divergence_from, kl_gradient, log_mix, norm_gap
from .torch import largest


class Rows:
    """The functions of a backend, as `rows` lists them."""

    def __init__(self, stages: ModuleType, shard: str) -> None:
        self.stages, self.shard, self.softcap = stages, Shard.read(shard), stages.softcap

    def logprob(self, z: Tensor) -> Side:
        return self.shard.merged(self.stages.logprob(z))[0]

    def logprob_grad(self, z: Tensor, side: Side, tokens: Tensor, *rest: Any) -> None:
        self.stages.logprob_grad(z, self.to_columns(side), tokens - self.shard.first, *rest)

    def kl(
        self,
        z: Tensor,
        student: int,
        teachers: list[int],
        divergence: str,
        beta: float,
        weight: Tensor | None = None,
        cap: float | Tensor | None = None,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        heads = z, student, teachers
        s, t = self.shard.merged(*self.stages.sides(*heads))
        row = Row(self.to_columns(s), t, norm_gap(s, t), s.max - s.cross, beta)
        mean = s.mean
        if divergence == "jsd":
            row = row._replace(offset=log_mix(-(s.cross - t.max) - row.gap, beta)[0])
            to_teacher, to_student, moment = self.shard.total(self.stages.jsd_sums(*heads, row))
            value: Tensor = beta * to_teacher + (1 - beta) * to_student + 0 * row.gap
            if weight is not None:
                weight, mean = (1 - beta) * weight, moment
        else:
            value = divergence_from(divergence, s, t)
        if dlogits is not None and weight is not None:
            gradient = kl_gradient(divergence, weight, s, t, mean)
            self.stages.kl_grad(*heads, divergence, row, weight, cap, gradient, dlogits)
        return value

    def agreement(self, z: Tensor, student: int, teachers: list[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
        s, t = self.shard.merged(*self.stages.sides(z, student, teachers))
        ids = self.shard.largest(*largest(z, [student, *teachers], k), k)
        both = torch.cat([ids[:1].expand_as(ids[1:]), ids[1:]], -1).sort(-1).values
        common = (both[..., 1:] == both[..., :-1]).sum(-1).to(z.dtype) / k
        return common, divergence_from("forward", s, t), divergence_from("reverse", s, t)

    def to_columns(self, side: Side) -> Side:
        return side._replace(top=side.top - self.shard.first)
