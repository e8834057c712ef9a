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
    """the other distribution's logit at `top`"""
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


def merge(pieces: Side) -> Side:
    """Merges over the last dimension, whose pieces hold ascending parts of the vocabulary."""
    largest = pieces.max.amax(-1, keepdim=True)
    at_top = pieces.max == largest
    # the first of equals; a row of NaN has none and keeps piece 0
    winner = at_top.to(torch.uint8).argmax(-1, keepdim=True)
    factor = torch.where(pieces.max == -torch.inf, 0, torch.exp(pieces.max - largest))
    is_winner = torch.arange(pieces.max.shape[-1], device=winner.device) == winner
    tail = (factor * pieces.tail).sum(-1) + torch.where(is_winner, 0, factor).sum(-1)
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


def kl_from(side: Side, other: Side) -> Tensor:
    """KL(side || other): +inf where the other has no mass at side's top (elsewhere the moment is infinite)."""
    kl = other.norm - side.norm + (other.max - side.cross) + side.mean
    return torch.where(side.cross == -torch.inf, torch.inf, kl)


def entropy(side: Side) -> Tensor:
    return side.norm - side.mean


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
    share = torch.where(r < 0, r.new_full((), 1 - beta), r.new_full((), beta))
    mix = torch.expm1(-r.abs()).mul_(share).log1p_()
    return r.clamp(max=0).sub_(mix), r.clamp_(min=0).neg_().sub_(mix)


class KLGradient(NamedTuple):
    """Per-row numbers that turn logits into the student's weighted gradient, for R rows and T teachers.

    reverse    g_v = p_v (sum_j w_j (x_jv - x_jc) - centre)                x_j = z - t_j
    forward    g_v = -p_v centre - sum_j w_j q_jv
    symmetric  g_v = p_v (sum_j w_j (x_jv - x_jc) - centre) - sum_j w_j q_jv
    jsd        g_v = p_v (sum_j w_j (u_jv - u_jc) - centre)                u_j = log(p / m_j), w_j times 1 - beta

    and at the student's top token c, where all of these cancel, g_c = at_top.
    """

    centre: Tensor  # (R,)
    at_top: Tensor  # (R,)


def kl_gradient(divergence: str, weight: Tensor, student: Side, teacher: Side, mean: Tensor) -> KLGradient:
    """`mean` (T, R): the expectation under p of what `centre` subtracts; unused for the forward divergence."""
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
