"""The torch rows where ranks share a vocabulary: nobody sees a row whole, so its divergence is made in stages.

Each rank holds some of a row's columns, and counts ids from the first of them: one that is no column is another rank's
to treat. Statistics are exchanged, and sums, before what needs them. What is no token is -inf on both sides; a rank
without any mass is NaN, which `merge` leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shard import Shard
from . import torch as plain
from .raw import COMPLETE, Raw
from .stats import Row, Side, divergence_from, into, kl_gradient, log_mix, norm_gap


class Rows:
    """The functions of a backend where ranks share a vocabulary."""

    def __init__(self, shard: str) -> None:
        self.shard, self.complete = Shard.read(shard), plain.complete

    def logprob(self, z: Tensor, tokens: Tensor | None = None, out: Side | None = None, raw: Raw = COMPLETE) -> Side:
        return into(out, self.shard.whole(plain.logprob(z, raw=raw), z[0], tokens))

    def logprob_grad(self, z: Tensor, side: Side, tokens: Tensor, *rest: Any) -> None:
        plain.logprob_grad(z, self.shard.in_columns(side), tokens - self.shard.first, *rest)

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
        out: Tensor | None = None,
        raw: Raw = COMPLETE,
    ) -> Tensor:
        heads = z, student, teachers
        raw.complete(z, plain.complete, [student, *teachers])
        s, t = self.shard.merged(*plain.sides(*heads))
        row = Row(self.shard.in_columns(s), t, norm_gap(s, t), s.max - s.cross, beta)
        mean = s.mean
        if divergence == "jsd":
            row = row._replace(offset=log_mix(-(s.cross - t.max) - row.gap, beta)[0])
            to_teacher, to_student, moment = self.shard.total(plain.jsd_sums(*heads, row))
            value: Tensor = beta * to_teacher + (1 - beta) * to_student + 0 * row.gap
            if weight is not None:
                weight, mean = (1 - beta) * weight, moment
        else:
            value = divergence_from(divergence, s, t)
        if dlogits is not None and weight is not None:
            gradient = kl_gradient(divergence, weight, s, t, mean)
            plain.kl_grad(*heads, divergence, row, weight, cap, gradient, dlogits)
        return value if out is None else out.copy_(value)

    def agreement(
        self, z: Tensor, student: int, teachers: list[int], k: int, raw: Raw = COMPLETE
    ) -> tuple[Tensor, Tensor, Tensor]:
        raw.complete(z, plain.complete)
        s, t = self.shard.merged(*plain.sides(z, student, teachers))
        common = shared_overlap(self.shard, z, student, teachers, k)
        return common, divergence_from("forward", s, t), divergence_from("reverse", s, t)


def shared_overlap(shard: Shard, z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
    ids = shard.largest(*plain.largest(z, [student, *teachers], k), k)
    both = torch.cat([ids[:1].expand_as(ids[1:]), ids[1:]], -1).sort(-1).values
    return (both[..., 1:] == both[..., :-1]).sum(-1).to(z.dtype) / k
