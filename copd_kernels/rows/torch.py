"""Rows in plain PyTorch: any device, any dtype.

Rows are taken a few at a time, so that the dozen passes over a row run in cache on a CPU and temporaries stay small
beside the chunk on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from copd_kernels.rows.stats import FAR, Side, entropy, kl_from, kl_gradient, log_mix

# temporaries of one block of rows: half a core's L2 cache; on a GPU, enough to fill it
BLOCK_BYTES = {"cpu": 1 << 19, "cuda": 1 << 28}


def blocks(z: Tensor) -> Iterator[slice]:
    _, R, V = z.shape
    step = max(1, BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cpu"]) // (V * z.element_size()))
    return (slice(i, min(i + step, R)) for i in range(0, R, step))


def logprob(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = z[0]
    logp, h, lse = (logits.new_empty(tokens.shape) for _ in range(3))
    for rows in blocks(z):
        side, _, _ = self_side(logits[rows])
        chosen = logits[rows].gather(1, tokens[rows].unsqueeze(1)).squeeze(1)
        logp[rows] = (chosen - side.max) - side.norm
        h[rows] = entropy(side)
        lse[rows] = side.lse
    return logp, h, lse


def logprob_grad(
    z: Tensor,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    cap: float | None,
    dlogits: Tensor,
) -> None:
    """g_v = dlogp (1[v = token] - p_v) - dentropy p_v (log p_v + entropy) + dlse p_v, finite even where p_v = 0."""
    logits = z[0]
    for rows in blocks(z):
        side, e, x = self_side(logits[rows])
        token, dl, dh, dn = tokens[rows], dlogp[rows], dentropy[rows], dlse[rows]
        # log p_v + entropy = (z_v - max) - mean
        g = x.sub_(column(side.mean)).mul_(column(-dh)).add_(column(dn - dl))
        g.mul_(e).mul_(column(side.p_top))
        chosen = token == side.top
        tail = side.tail * side.p_top
        at_top = dl * torch.where(chosen, tail, -side.p_top) + (dh * side.mean + dn) * side.p_top
        g.scatter_add_(1, token.unsqueeze(1), column(dl))
        g.scatter_(1, column(side.top), column(at_top))
        finish(g, logits[rows], cap, dlogits[rows])


def kl(
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    beta: float,
    weight: Tensor | None = None,
    cap: float | None = None,
    dlogits: Tensor | None = None,
) -> Tensor:
    value = z.new_empty(len(teachers), z.shape[1])
    for rows in blocks(z):
        w = None if dlogits is None else weight[:, rows]
        if divergence == "jsd":
            g, value[:, rows] = _jsd(z[:, rows], student, teachers, beta, w)
        else:
            g, value[:, rows] = _kl(z[:, rows], student, teachers, divergence, w)
        if g is not None:
            finish(g, z[student, rows], cap, dlogits[rows])
    return value


def _kl(
    z: Tensor, student: int, teachers: list[int], divergence: str, weight: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Forward, reverse or both: (gradient (R, V) or None, value (T, R))."""
    logits = z[student]
    top, top_max, e, tail = softmax(logits)
    g = None if weight is None else torch.zeros_like(logits)
    subtract = None if weight is None or divergence == "reverse" else torch.zeros_like(logits)
    pairs = []
    for j, teacher in enumerate(teachers):
        other = z[teacher]
        other_top, other_max, other_e, other_tail = softmax(other)
        cross, other_cross = gathered(other, top), gathered(logits, other_top)
        moment = other_moment = torch.zeros_like(tail)
        x = logits - other
        if divergence != "forward":
            d = (x - column(top_max - cross)).masked_fill_(e == 0, 0)
            moment = (d * e).sum(1)
            if g is not None:
                g.addcmul_(d, column(weight[j]))
        if divergence != "reverse":
            d = (x.neg_() - column(other_max - other_cross)).masked_fill_(other_e == 0, 0)
            other_moment = d.mul_(other_e).sum(1)
            if g is not None:
                other_e.scatter_(1, column(other_top), 1)
                scale = weight[j] / (1 + other_tail)
                subtract.addcmul_(other_e, column(torch.where(weight[j] == 0, 0, scale)))
        s = Side(top_max, top, tail, cross, moment)
        t = Side(other_max, other_top, other_tail, other_cross, other_moment)
        pairs.append((s, t))
    s, t = (Side(*(torch.stack(x) for x in zip(*side, strict=True))) for side in zip(*pairs, strict=True))
    value = {
        "reverse": lambda: kl_from(s, t),
        "forward": lambda: kl_from(t, s),
        "symmetric": lambda: kl_from(s, t) + kl_from(t, s),
    }[divergence]()
    if g is None:
        return None, value
    first = Side(top_max, top, tail, s.cross, s.moment)
    centre, at_top = kl_gradient(divergence, weight, first, t, first.mean)
    p_top = first.p_top
    g.sub_(column(centre)).mul_(e).mul_(column(p_top))
    if subtract is not None:
        g.sub_(subtract)
    g.scatter_(1, column(top), column(at_top))
    return g, value


def _jsd(
    z: Tensor, student: int, teachers: list[int], beta: float, weight: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: (gradient (R, V) or None, value (T, R))."""
    logits = z[student]
    top, top_max, e, tail = softmax(logits)
    side = Side(top_max, top, tail, top_max, tail)
    p = e.scatter_(1, column(top), 1).mul_(column(side.p_top))
    g = None if weight is None else torch.zeros_like(logits)
    values, means = [], []
    for j, teacher in enumerate(teachers):
        other_top, other_max, other_e, other_tail = softmax(z[teacher])
        q = other_e.scatter_(1, column(other_top), 1).mul_(column(1 / (1 + other_tail)))
        # r = log p / q, each side measured from its own top, where it is exact
        r = (logits - column(top_max)).sub_(z[teacher] - column(other_max))
        r.sub_(column(torch.log1p(tail) - torch.log1p(other_tail)))
        u, to_teacher = log_mix(r, beta)
        to_teacher = to_teacher.mul_(q).sum(1)
        values.append(beta * to_teacher + (1 - beta) * (p * u).sum(1))
        if g is not None:
            u.sub_(column(gathered(u, top)))
            means.append((1 - beta) * (p * u).sum(1))
            g.addcmul_(u, column((1 - beta) * weight[j]))
    value = torch.stack(values)
    if g is None:
        return None, value
    centre, at_top = kl_gradient("jsd", weight, side, side, torch.stack(means))
    g.sub_(column(centre)).mul_(p)
    g.scatter_(1, column(top), column(at_top))
    return g, value


def overlap(z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
    value = z.new_empty(len(teachers), z.shape[1])
    for rows in blocks(z):
        mine = top_k(z[student, rows], k)
        for j, teacher in enumerate(teachers):
            value[j, rows] = (mine & top_k(z[teacher, rows], k)).sum(1).to(z.dtype) / k
    return value


def top_k(logits: Tensor, k: int) -> Tensor:
    """(R, V) bool: the k largest; among equals at the boundary, the lowest ids."""
    least = logits.topk(k, dim=1).values[:, -1:]
    above, equal = logits > least, logits == least
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top id, largest logit, exp(z - max) with 0 at the top token, and its sum: (R,), (R,), (R, V), (R,)."""
    largest, top = z.max(1, keepdim=True)
    e = torch.exp(z - largest).scatter_(1, top, 0)
    return top.squeeze(1), largest.squeeze(1), e, e.sum(1)


def self_side(z: Tensor) -> tuple[Side, Tensor, Tensor]:
    """A distribution beside no other (x = z), exp(z - max) with 0 at the top token, and z - max, finite."""
    largest, top = z.max(1, keepdim=True)
    x = (z - largest).clamp_(min=-FAR)
    e = torch.exp(x).scatter_(1, top, 0)
    side = Side(largest.squeeze(1), top.squeeze(1), e.sum(1), torch.zeros_like(z[:, 0]), (e * x).sum(1))
    return side, e, x


def gathered(z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(1, ids.unsqueeze(1)).squeeze(1)


def column(row_values: Tensor) -> Tensor:
    return row_values.unsqueeze(1)


def finish(g: Tensor, z: Tensor, cap: float | None, dlogits: Tensor) -> None:
    """Through the softcap, into the GEMM's dtype; fp16 saturates rather than overflow."""
    if cap is not None:
        g.mul_(1 - (z / cap).square_())
    if dlogits.dtype == torch.float16:
        g.clamp_(-65504, 65504)
    dlogits.copy_(g)
