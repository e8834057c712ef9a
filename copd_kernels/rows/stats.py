"""Row statistics of softmax pairs, and how they merge over pieces of the vocabulary.

Everything is measured from a distribution's own top token, because differences from there do not cancel. With p the
softmax of z, c its top token and x a function of the token (z - t against a teacher's logits t, or z itself),

    tail   = sum_{v != c} exp(z_v - z_c)                  1 - p_c = tail / (1 + tail), exact for p_c -> 1
    moment = sum_{v != c} exp(z_v - z_c) (x_v - x_c)      E_p[x] = x_c + moment / (1 + tail)

    KL(p || q) = log(1 + tail_t) - log(1 + tail_z) + (max t - t_c) + moment / (1 + tail_z)
    entropy(p) = log(1 + tail) - moment / (1 + tail)      (x = z)
    d KL(p || q) / d z_v = p_v (x_v - x_c - moment / (1 + tail))

Near agreement x_v - x_c is a plain difference of logits; at a peaked row every term is as small as the result. Pieces
of a row (blocks of a kernel, ranks of a vocabulary-parallel head) merge exactly, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# stands for an infinite log-ratio: finite, so that zero mass times it is zero
FAR = 1e30


class Side(NamedTuple):
    """One distribution (...) seen from its top token, beside another distribution."""

    max: Tensor
    """largest logit"""
    top: Tensor
    """its id, the lowest among equals; int64"""
    tail: Tensor
    """sum over all other tokens of exp(z - max)"""
    cross: Tensor
    """the other distribution's logit at `top`; of a row beside no other, the logit of its token"""
    moment: Tensor
    """sum over all other tokens of exp(z - max) ((z - other) - (max - cross))"""

    @property
    def norm(self) -> Tensor:
        return torch.log1p(self.tail)

    @property
    def lse(self) -> Tensor:
        return self.max + self.norm

    @property
    def p_top(self) -> Tensor:
        return 1 / (1 + self.tail)

    @property
    def mean(self) -> Tensor:
        """expectation of the moment's function, less its value at `top`"""
        return self.moment * self.p_top

    def distribution(self) -> Side:
        """A row with an infinite logit or without any mass is none: its tail, and all that is made from it, is NaN."""
        return self._replace(tail=self.tail + 0 * self.max)


def into(out: Side | None, side: Side) -> Side:
    """side, in the memory of `out` if there is any."""
    if out is None:
        return side
    for to, x in zip(out, side, strict=True):
        to.copy_(x)
    return out


class Row(NamedTuple):
    """Statistics of whole rows as the stages of `split.py` read them; `student.top` counts columns."""

    student: Side
    teacher: Side
    gap: Tensor  # (T, R) log(1 + tail) of the student less the teacher's
    offset: Tensor  # (T, R) at the student's top token: z - t, or the JSD's u = log(p / m)
    beta: float


def merge(pieces: Side) -> Side:
    """Merges over the last dimension, whose pieces hold ascending parts of the vocabulary."""
    largest = pieces.max.amax(-1, keepdim=True)
    at_top = pieces.max == largest
    # the first of equals; a row of NaN has none and keeps piece 0
    winner = at_top.to(torch.uint8).argmax(-1, keepdim=True)
    factor = torch.where(pieces.max == -torch.inf, 0, torch.exp(pieces.max - largest))
    is_winner = torch.arange(pieces.max.shape[-1], device=winner.device) == winner
    # a piece without any mass may be NaN
    tail = torch.where(factor == 0, 0, factor * pieces.tail).sum(-1) + torch.where(is_winner, 0, factor).sum(-1)
    offset = pieces.max - pieces.cross
    cross = pick(pieces.cross, winner)
    shift = offset - (largest - cross.unsqueeze(-1))
    moved = pieces.moment + (1 + pieces.tail) * torch.where(is_winner, 0, shift)
    # mass where the other side has none
    moved = torch.where((pieces.cross == -torch.inf) & ~is_winner, torch.inf, moved)
    moment = torch.where(factor == 0, 0, factor * moved).sum(-1)
    return Side(largest.squeeze(-1), pick(pieces.top, winner), tail, cross, moment)


def pick(pieces: Tensor, winner: Tensor) -> Tensor:
    winner = winner.expand(*pieces.shape[:-1], 1) if pieces.dim() >= winner.dim() else winner
    return pieces.expand(*winner.shape[:-1], pieces.shape[-1]).gather(-1, winner).squeeze(-1)


def norm_gap(side: Side, other: Side) -> Tensor:
    """log(1 + tail) less the other's; of nearly equal rows the quotient keeps what the difference would lose."""
    grown = (side.tail - other.tail) / (1 + other.tail)
    return torch.where((grown > -0.5) & (grown < 1), torch.log1p(grown), side.norm - other.norm)


def excess(side: Side, other: Side) -> Tensor:
    """KL(side || other) + norm_gap(side, other): +inf where the other has no mass at side's top."""
    # elsewhere the moment is infinite
    return torch.where(side.cross == -torch.inf, torch.inf, (other.max - side.cross) + side.mean)


def divergence_from(divergence: str, student: Side, teacher: Side) -> Tensor:
    """Reverse, forward or symmetric, of two distributions."""
    gap = norm_gap(student, teacher)
    if divergence == "reverse":
        return excess(student, teacher) - gap
    if divergence == "forward":
        return excess(teacher, student) + gap
    # the norms cancel
    return excess(student, teacher) + excess(teacher, student) + 0 * gap


def logprob(side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the row's token, entropy and logsumexp, from a row's statistics beside no other."""
    return (side.cross - side.max) - side.norm, side.norm - side.mean, side.lse


def logprob_at_top(side: Side, tokens: Tensor, dlogp: Tensor, dentropy: Tensor, dlse: Tensor) -> Tensor:
    """The gradient of `logprob` at the top token, from the tail, where its terms cancel."""
    own = torch.where(tokens == side.top, side.tail * side.p_top, -side.p_top)
    return dlogp * own + (dentropy * side.mean + dlse) * side.p_top


def top_difference(student: Side, teacher: Side) -> Tensor:
    """p - q at the student's top token, from the tails where both have the same one."""
    q_top = torch.exp(student.cross - teacher.max - teacher.norm)
    same = student.top == teacher.top
    return torch.where(
        same,
        teacher.tail * teacher.p_top - student.tail * student.p_top,
        student.p_top - q_top,
    )


def log_mix(r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m) for r = log(p / q) and m = beta q + (1 - beta) p; exact near 0, finite throughout."""
    r = r.nan_to_num(nan=0.0, posinf=FAR, neginf=-FAR)
    lower = r < 0
    teacher, student = r.new_full((), beta), r.new_full((), 1 - beta)
    share = torch.where(lower, student, teacher)
    less = torch.expm1(-r.abs())
    if 0.1 <= beta <= 0.9:
        mix = less.mul_(share).log1p_()
        return r.clamp(max=0).sub_(mix), r.clamp_(min=0).neg_().sub_(mix)
    # m is nearly one of the two: log of m over the larger as a logarithm of a sum, over the smaller by itself near 0
    other, ratio = torch.where(lower, teacher, student), torch.exp(-r.abs())
    grown = share * less
    mix = torch.where(grown > -0.5, torch.log1p(grown), torch.log(other + share * ratio))
    beyond = -other * less / ratio
    small = torch.where(beyond < 1, -torch.log1p(beyond), -r.abs() - mix)
    return torch.where(lower, small, -mix), torch.where(lower, -mix, small)


class KLGradient(NamedTuple):
    """Per-row numbers that turn logits into the student's weighted gradient, for R rows and T teachers.

    reverse    g_v = p_v (sum_j w_j (x_jv - x_jc) - centre)                x_j = z - t_j
    forward    g_v = -p_v centre - sum_j w_j q_jv
    symmetric  g_v = p_v (sum_j w_j (x_jv - x_jc) - centre) - sum_j w_j q_jv
    jsd        g_v = p_v (sum_j w_j (u_jv - u_jc) - centre)                u_j = log(p / m_j), w_j times 1 - beta

    and at the student's top token c, where all of these cancel, g_c = at_top. Of a row without any weight g is 0,
    whatever its logits are.
    """

    centre: Tensor  # (R,)
    at_top: Tensor  # (R,)


def kl_gradient(divergence: str, weight: Tensor, student: Side, teacher: Side, mean: Tensor) -> KLGradient:
    """`mean` (T, R): the expectation under p of what `centre` subtracts; unused for the forward divergence."""
    # a row that is no distribution counts wherever its moment does not say so
    mean = mean + 0 * norm_gap(student, teacher)
    # a masked row's statistics may be infinite or NaN: its weight of zero must win
    centre = torch.where(weight == 0, 0, weight * mean).sum(0)
    at_top = -centre * student.p_top
    if divergence in ("reverse", "jsd"):
        return KLGradient(centre, at_top)
    forward = torch.where(weight == 0, 0, weight * top_difference(student, teacher)).sum(0)
    total = weight.sum(0)
    if divergence == "forward":
        return KLGradient(-total, forward)
    return KLGradient(centre - total, at_top + forward)
