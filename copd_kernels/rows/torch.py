"""Rows in plain PyTorch: any device, any dtype.

Rows are taken a few at a time, so that the dozen passes over a row run in cache on a CPU and temporaries stay small
beside the chunk on a GPU. Each pass writes into scratch that is allocated once: fresh memory costs more than the pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .raw import COMPLETE, Raw
from .stats import FAR, KLGradient, Row, Side, divergence_from, into, kl_gradient, log_mix, logprob_at_top, norm_gap

# one block of rows of one array: what a CPU's cache holds several of; on a GPU, enough to fill it
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}


def blocks(z: Tensor, arrays: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """A few rows at a time, with as many (rows, V) scratch arrays."""
    _, R, V = z.shape
    step = max(1, BLOCK_BYTES.get(z.device.type, BLOCK_BYTES["cpu"]) // (V * z.element_size()))
    scratch = z.new_empty(arrays, min(step, R), V)
    for start in range(0, R, step):
        stop = min(start + step, R)
        yield slice(start, stop), list(scratch[:, : stop - start])


def logprob(z: Tensor, tokens: Tensor | None = None, out: Side | None = None, raw: Raw = COMPLETE) -> Side:
    raw.complete(z, complete)
    sides = (own_side(z[0, rows], *scratch) for rows, scratch in blocks(z, 2))
    side = Side(*map(torch.cat, zip(*sides, strict=True)))
    return into(out, side if tokens is None else side._replace(cross=gathered(z[0], tokens)))


def logprob_grad(
    z: Tensor,
    side: Side,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    cap: float | Tensor | None,
    dlogits: Tensor,
    raw: Raw = COMPLETE,
) -> None:
    """g_v = dlogp (1[v = token] - p_v) - dentropy p_v (log p_v + entropy) + dlse p_v, finite even where p_v = 0."""
    raw.complete(z, complete)
    logits = z[0]
    for rows, (e, x) in blocks(z, 2):
        own = Side(*(numbers[rows] for numbers in side))
        token, dl, dh, dn = tokens[rows], dlogp[rows], dentropy[rows], dlse[rows]
        torch.sub(logits[rows], column(own.max), out=x).clamp_(min=-FAR)
        torch.exp(x, out=e)
        # log p_v + entropy = (z_v - max) - mean
        g = x.sub_(column(own.mean)).mul_(column(-dh)).add_(column(dn - dl))
        g.mul_(e).mul_(column(own.p_top))
        at_top = logprob_at_top(own, token, dl, dh, dn)
        put(g, token, dl, add=True)
        put(g, own.top, at_top)
        finish(g, logits[rows], of_rows(cap, rows), (dl == 0) & (dh == 0) & (dn == 0), dlogits[rows])


def spread(z: Tensor, side: Side, first: int, V: int) -> tuple[Tensor, Tensor]:
    """Of the first head's rows, whose V tokens have ids from `first` on: the sum of their logits, and that of all but
    the top one's exp(2 (z - max)); `side` are the statistics of the whole rows."""
    total, square = torch.empty_like(side.max), torch.empty_like(side.max)
    for rows, (e,) in blocks(z, 1):
        torch.sum(z[0, rows, :V], 1, out=total[rows])
        torch.sub(z[0, rows], column(side.max[rows]), out=e).exp_()
        put(e, side.top[rows] - first, torch.zeros_like(side.max[rows]))
        square[rows] = torch.linalg.vecdot(e, e)
    return total, square


def kl(
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
    raw.complete(z, complete, [student, *teachers])
    value = z.new_empty(len(teachers), z.shape[1]) if out is None else out
    for rows, scratch in blocks(z, 5):
        w = None if dlogits is None or weight is None else weight[:, rows]
        others = [z[j, rows] for j in teachers]
        if divergence == "jsd":
            value[:, rows], g = _jsd(z[student, rows], others, beta, w, scratch)
        else:
            s, t, g = _kl(z[student, rows], others, divergence, w, scratch)
            value[:, rows] = divergence_from(divergence, s, t)
        if g is not None and dlogits is not None and w is not None:
            finish(g, z[student, rows], of_rows(cap, rows), (w == 0).all(0), dlogits[rows])
    return value


def _kl(
    logits: Tensor, others: list[Tensor], divergence: str, weight: Tensor | None, scratch: list[Tensor]
) -> tuple[Side, Side, Tensor | None]:
    """Forward, reverse or both: the sides (T, R) of student and teachers, and gradient (R, V), if weighted."""
    e, other_e, x, g, subtract = scratch
    top, top_max, tail = softmax(logits, e)
    if weight is not None:
        g.zero_()
        subtract.zero_()
    pairs = []
    for j, other in enumerate(others):
        other_top, other_max, other_tail = softmax(other, other_e)
        cross, other_cross = gathered(other, top), gathered(logits, other_top)
        moment = other_moment = torch.zeros_like(tail)
        if divergence != "forward":
            torch.sub(logits, other, out=x).sub_(column(top_max - cross))
            drop_massless(x, e)
            if weight is not None:
                add_weighted(g, x, weight[j])
            moment = x.mul_(e).sum(1)
        if divergence != "reverse":
            torch.sub(other, logits, out=x).sub_(column(other_max - other_cross))
            drop_massless(x, other_e)
            other_moment = x.mul_(other_e).sum(1)
            if weight is not None:
                other_e.scatter_(1, column(other_top), 1)
                scale = torch.where(weight[j] == 0, 0, weight[j] / (1 + other_tail))
                add_weighted(subtract, other_e, scale)
        s = Side(top_max, top, tail, cross, moment)
        pairs.append((s, Side(other_max, other_top, other_tail, other_cross, other_moment)))
    s, t = (Side(*map(torch.stack, zip(*side, strict=True))) for side in zip(*pairs, strict=True))
    if weight is None:
        return s, t, None
    one = s._replace(max=top_max, top=top, tail=s.tail[0])
    centre, at_top = kl_gradient(divergence, weight, one, t, s.mean)
    g.sub_(column(centre)).mul_(e).mul_(column(one.p_top))
    if divergence != "reverse":
        g.sub_(subtract)
    return s, t, g.scatter_(1, column(top), column(at_top))


def add_weighted(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total (R, V) += weight (R,) * x (R, V); a weight of zero wins over anything in x."""
    # on a CPU it is cheap to know that there is none
    if total.device.type != "cpu" or (weight == 0).any():
        x = torch.where(column(weight == 0), 0, x)
    total.addcmul_(x, column(weight))


def _jsd(
    logits: Tensor, others: list[Tensor], beta: float, weight: Tensor | None, scratch: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: value and gradient, as in `_kl`."""
    p, q, r, g, other = scratch
    top, top_max, tail = softmax(logits, p)
    side = Side(top_max, top, tail, top_max, tail)
    p.scatter_(1, column(top), 1).mul_(column(side.p_top))
    if weight is not None:
        g.zero_()
    values, means, sides = [], [], []
    for j, teacher in enumerate(others):
        other_top, other_max, other_tail = softmax(teacher, q)
        their = Side(other_max, other_top, other_tail, other_max, other_tail)
        sides.append(their)
        q.scatter_(1, column(other_top), 1).mul_(column(their.p_top))
        gap = norm_gap(side, their)
        ratio(logits, teacher, top_max, other_max, gap, r, other)
        to_student, to_teacher = log_mix(r, beta)  # log p / m, log q / m
        value = beta * to_teacher.mul_(q).sum(1) + (1 - beta) * torch.mul(p, to_student, out=other).sum(1)
        values.append(value + 0 * gap)
        if weight is not None:
            u = to_student.sub_(column(gathered(to_student, top)))
            means.append(torch.mul(p, u, out=other).sum(1))
            add_weighted(g, u, (1 - beta) * weight[j])
    value = torch.stack(values)
    if weight is None:
        return value, None
    theirs = Side(*map(torch.stack, zip(*sides, strict=True)))
    centre, at_top = kl_gradient("jsd", (1 - beta) * weight, side, theirs, torch.stack(means))
    g.sub_(column(centre)).mul_(p)
    return value, g.scatter_(1, column(top), column(at_top))


def sides(z: Tensor, student: int, teachers: list[int]) -> tuple[Side, Side]:
    """A stage of `split.py`, as are `jsd_sums` and `kl_grad`: what `kl` does at once where it has whole rows."""
    found = []
    for rows, scratch in blocks(z, 5):
        s, t, _ = _kl(z[student, rows], [z[j, rows] for j in teachers], "symmetric", None, scratch)
        found.append((s.max[0], s.top[0], s.tail[0], s.cross, s.moment, *t))
    numbers = [torch.cat(pieces, -1) for pieces in zip(*found, strict=True)]
    return Side(*numbers[:5]), Side(*numbers[5:])


def jsd_sums(z: Tensor, student: int, teachers: list[int], row: Row) -> Tensor:
    s, t = row.student, row.teacher
    sums = z.new_empty(3, len(teachers), z.shape[1])
    for rows, (p, q, r, x) in blocks(z, 4):
        logits = z[student, rows]
        mass(logits, s.max[rows], s.p_top[rows], p)
        for j, other in enumerate(z[teacher, rows] for teacher in teachers):
            mass(other, t.max[j, rows], t.p_top[j, rows], q)
            u, w = log_mix(ratio(logits, other, s.max[rows], t.max[j, rows], row.gap[j, rows], r, x), row.beta)
            parts = w.mul_(q), torch.mul(p, u, out=x), u.sub_(column(row.offset[j, rows])).mul_(p)
            for total, part in zip(sums[:, j, rows], parts, strict=True):
                torch.sum(part, 1, out=total)
    return sums


def kl_grad(
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    row: Row,
    weight: Tensor,
    cap: float | Tensor | None,
    gradient: KLGradient,
    dlogits: Tensor,
) -> None:
    s, t = row.student, row.teacher
    for rows, (p, x, g, y) in blocks(z, 4):
        logits, w = z[student, rows], weight[:, rows]
        mass(logits, s.max[rows], s.p_top[rows], p)
        g.zero_()
        for j, teacher in enumerate(teachers):
            other, offset = z[teacher, rows], column(row.offset[j, rows])
            if divergence == "jsd":
                u, _ = log_mix(ratio(logits, other, s.max[rows], t.max[j, rows], row.gap[j, rows], x, y), row.beta)
                add_weighted(g, u.sub_(offset), w[j])
            elif divergence != "forward":
                torch.sub(logits, other, out=x).sub_(offset)
                drop_massless(x, p)
                add_weighted(g, x, w[j])
        g.sub_(column(gradient.centre[rows])).mul_(p)
        if divergence in ("forward", "symmetric"):
            for j, teacher in enumerate(teachers):
                mass(z[teacher, rows], t.max[j, rows], t.p_top[j, rows], x)
                add_weighted(g, x, -w[j])
        put(g, s.top[rows], gradient.at_top[rows])
        finish(g, logits, of_rows(cap, rows), (w == 0).all(0), dlogits[rows])


def mass(z: Tensor, largest: Tensor, p_top: Tensor, out: Tensor) -> None:
    torch.sub(z, column(largest), out=out).exp_().mul_(column(p_top))


def ratio(z: Tensor, other: Tensor, z_max: Tensor, other_max: Tensor, gap: Tensor, out: Tensor, x: Tensor) -> Tensor:
    """log p / q, each side measured from its own top, where it is exact; x is scratch."""
    torch.sub(z, column(z_max), out=out).sub_(torch.sub(other, column(other_max), out=x))
    return out.sub_(column(gap))


def agreement(
    z: Tensor, student: int, teachers: list[int], k: int, raw: Raw = COMPLETE
) -> tuple[Tensor, Tensor, Tensor]:
    raw.complete(z, complete)
    forward, reverse = (kl(z, student, teachers, divergence, 0.5) for divergence in ("forward", "reverse"))
    return overlap(z, student, teachers, k), forward, reverse


def overlap(z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
    value = z.new_empty(len(teachers), z.shape[1])
    for rows, _ in blocks(z, 0):
        mine = top_k(z[student, rows], k)
        for j, teacher in enumerate(teachers):
            value[j, rows] = (mine & top_k(z[teacher, rows], k)).sum(1).to(z.dtype) / k
    return value


def complete(z: Tensor, bias: Tensor | None, cap: float, temperature: Tensor | None) -> None:
    if bias is not None:
        z.add_(bias)
    if cap:
        z.div_(cap).tanh_().mul_(cap)
    if temperature is not None:
        z.div_(column(temperature))


def top_k(logits: Tensor, k: int) -> Tensor:
    """(R, V) bool: the k largest; among equals at the boundary, the lowest ids."""
    least = logits.topk(k, dim=1).values[:, -1:]
    above, equal = logits > least, logits == least
    room = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def largest(z: Tensor, heads: list[int], k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, or all, and their columns, (H, k or V, R) each; columns ascend, among equals the lowest."""
    _, R, V = z.shape
    k = min(k, V)
    columns = torch.empty(len(heads), k, R, dtype=torch.int64, device=z.device)
    values, count = z.new_empty(columns.shape), torch.arange(1, k + 1, device=z.device)
    for rows, _ in blocks(z, 0):
        for h, head in enumerate(heads):
            seen = top_k(z[head, rows], k).cumsum(1)
            # of a row with a NaN none is largest, and any column will do
            found = torch.searchsorted(seen, count.expand(len(seen), k).contiguous()).clamp_(max=V - 1)
            columns[h, :, rows] = found.T
            values[h, :, rows] = z[head, rows].gather(1, found).T
    return values, columns


def put(g: Tensor, ids: Tensor, values: Tensor, add: bool = False) -> None:
    """g[r, ids_r] = values_r, or +=, where the id is a column; elsewhere it is another rank's."""
    at, here = column(ids.clamp(0, g.shape[1] - 1)), column((ids >= 0) & (ids < g.shape[1]))
    if add:
        g.scatter_add_(1, at, torch.where(here, column(values), 0))
    else:
        g.scatter_(1, at, torch.where(here, column(values), g.gather(1, at)))


def softmax(z: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top id, largest logit and tail, (R,) each; e (R, V) becomes exp(z - max), with 0 at the top token.

    The tail is that of `Side.distribution`.
    """
    largest, top = z.max(1, keepdim=True)
    torch.sub(z, largest, out=e).exp_().scatter_(1, top, 0)
    largest = largest.squeeze(1)
    return top.squeeze(1), largest, e.sum(1) + 0 * largest


def own_side(z: Tensor, e: Tensor, x: Tensor) -> Side:
    """A distribution beside no other; e as in `softmax`, and x (R, V) becomes z - max, finite."""
    largest, top = z.max(1, keepdim=True)
    torch.sub(z, largest, out=x).clamp_(min=-FAR)
    torch.exp(x, out=e).scatter_(1, top, 0)
    # the top token itself contributes 0 to both sums
    moment = torch.linalg.vecdot(e, x)
    return Side(largest.squeeze(1), top.squeeze(1), e.sum(1), torch.zeros_like(moment), moment).distribution()


def drop_massless(x: Tensor, e: Tensor) -> None:
    """Makes 0 * inf zero: a word without mass counts nothing, however far the other side is."""
    # on a CPU one sum tells that nothing is infinite, which is much cheaper than the fill
    if x.device.type != "cpu" or not math.isfinite(x.sum()):
        x.masked_fill_(e == 0, 0)


def gathered(z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(1, ids.unsqueeze(1)).squeeze(1)


def column(row_values: Tensor) -> Tensor:
    return row_values.unsqueeze(1)


def of_rows(cap: float | Tensor | None, rows: slice) -> float | Tensor | None:
    return column(cap[rows]) if isinstance(cap, Tensor) else cap


def finish(g: Tensor, z: Tensor, cap: float | Tensor | None, weightless: Tensor, dlogits: Tensor) -> None:
    """Through the softcap, into the GEMM's dtype; rows (R,) without weight become 0 whatever they hold."""
    if cap is not None:
        g.mul_(1 - (z / cap).square_())
    if g.device.type != "cpu" or weightless.any():
        g.masked_fill_(column(weightless), 0)
    dlogits.copy_(g)
