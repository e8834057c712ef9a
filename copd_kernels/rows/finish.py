"""The Triton kernels between two sweeps: pieces of rows become whole rows, and what the next sweep knows of them.

R rows, T teachers, S pieces a row, of all ranks where they share a vocabulary; a lane finishes one row. Of pieces in
the logits' dtype, a plane (S, R) a field, ids as bits:

    max, tail, top; of each teacher beside it cross, moment; then its own max, tail, top, cross, moment     (3 + 7 T)

they make numbers (5 + 5 T, R):

    max, 1 / (1 + tail), top (a column), centre, at_top                            of the student, as in `KLGradient`
    max, 1 / (1 + tail), gap, offset, weight                                       of each teacher, as in `Row`

where no JSD needs it itself 1 / (1 + tail) of a teacher is already multiplied by its weight.
"""

import triton
import triton.language as tl

from .complete import _exp
from .kernels import _id, _log1p, _log_mix
from .lanes import SLICES, VARYING, _as_number


@triton.jit
def _whole(own_ptr, beside_ptr, S, R, row, inside, BESIDE: tl.constexpr):
    """max, tail, top, cross and moment of whole rows from their S pieces, in order, as in `stats.merge`.

    Without BESIDE, the moment is of the logits themselves, and cross the largest of its field.
    """
    plane = S * R.to(tl.int64)
    m = tl.load(own_ptr + row, mask=inside, other=0.0)
    tail = tl.load(own_ptr + plane + row, mask=inside, other=0.0)
    top = _id(tl.load(own_ptr + 2 * plane + row, mask=inside, other=0.0))
    cross = tl.load(beside_ptr + row, mask=inside, other=0.0)
    moment = tl.load(beside_ptr + plane + row, mask=inside, other=0.0)
    for s in range(1, S):
        at = s * R.to(tl.int64) + row
        new_m = tl.load(own_ptr + at, mask=inside, other=0.0)
        new_tail = tl.load(own_ptr + plane + at, mask=inside, other=0.0)
        new_top = _id(tl.load(own_ptr + 2 * plane + at, mask=inside, other=0.0))
        new_cross = tl.load(beside_ptr + at, mask=inside, other=0.0)
        new_moment = tl.load(beside_ptr + plane + at, mask=inside, other=0.0)
        # the first of equals
        stays = m >= new_m
        largest, lesser = tl.where(stays, m, new_m), tl.where(stays, new_m, m)
        # a piece without any mass may be NaN
        scale = tl.where(lesser == float("-inf"), 0.0, _exp(lesser - largest))
        if BESIDE:
            shift = (new_m - new_cross) - (m - cross)
            shift = tl.where(stays, shift, -shift)
        else:
            shift = lesser - largest
        mass = 1 + tl.where(stays, new_tail, tail)
        moved = tl.where(stays, new_moment, moment) + mass * shift
        if BESIDE:
            # mass where the other side has none
            moved = tl.where(tl.where(stays, new_cross, cross) == float("-inf"), float("inf"), moved)
        tail = tl.where(stays, tail, new_tail) + tl.where(scale == 0, 0.0, scale * mass)
        moment = tl.where(stays, moment, new_moment) + tl.where(scale == 0, 0.0, scale * moved)
        m, top = largest, tl.where(stays, top, new_top)
        cross = tl.where(stays, cross, new_cross) if BESIDE else tl.maximum(cross, new_cross)
    # a row with an infinite logit or without any mass is no distribution
    return m, tail + 0 * m, top, cross, moment


@triton.jit
def _excess(side, other):
    """As in `stats.py`."""
    _, tail, _, cross, moment = side
    return tl.where(cross == float("-inf"), float("inf"), (other[0] - cross) + moment / (1 + tail))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _kl_finish_kernel(
    pieces_ptr,
    numbers_ptr,
    weight_ptr,  # (T, R)
    value_ptr,  # (T, R)
    mix_ptr,  # (2,) beta, 1 - beta
    R,
    S,
    first,
    weight_stride,
    value_stride,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    plane = S * R.to(tl.int64)
    zero = tl.zeros([BLOCK], pieces_ptr.dtype.element_ty)
    centre, forward, total = zero, zero, zero
    s_max, inv, s_top = zero, zero, tl.zeros([BLOCK], tl.int32)
    out_ptr = numbers_ptr + row
    for j in range(T):
        beside_ptr = pieces_ptr + (3 + 7 * j) * plane
        side = _whole(pieces_ptr, beside_ptr, S, R, row, inside, True)
        other = _whole(beside_ptr + 2 * plane, beside_ptr + 5 * plane, S, R, row, inside, True)
        s_max, s_tail, s_top, cross, moment = side
        t_max, t_tail, t_top, _, _ = other
        inv, t_inv = 1 / (1 + s_tail), 1 / (1 + t_tail)
        # of nearly equal rows the quotient keeps what the difference would lose
        grown = (s_tail - t_tail) * t_inv
        near = (grown > -0.5) & (grown < 1)
        t_norm = _log1p(t_tail)
        gap = tl.where(near, _log1p(tl.where(near, grown, 0.0)), _log1p(s_tail) - t_norm)
        if REVERSE and FORWARD:
            # the norms cancel
            value = _excess(side, other) + _excess(other, side) + 0 * gap
        elif REVERSE:
            value = _excess(side, other) - gap
        else:
            value = _excess(other, side) + gap
        if REVERSE or FORWARD:
            offset = s_max - cross
            tl.store(value_ptr + j * value_stride + row, value, mask=inside)
        else:
            beta, rest = tl.load(mix_ptr), tl.load(mix_ptr + 1)
            offset, _ = _log_mix(s_max, cross, s_max, t_max, gap, beta, rest, ONE_SIDED)
        each_ptr = out_ptr + (5 + 5 * j) * R.to(tl.int64)
        if WEIGHTED and (REVERSE or FORWARD):
            weight = tl.load(weight_ptr + j * weight_stride + row, mask=inside, other=0.0)
            idle = weight == 0
            # a masked row's statistics may be infinite or NaN: its weight of zero must win
            total += weight
            centre += tl.where(idle, 0.0, weight * (moment * inv + 0 * gap))
            if FORWARD:
                # p - q at the student's top token, from the tails where both have the same one
                apart = inv - _exp(cross - t_max - t_norm)
                apart = tl.where(s_top == t_top, t_tail * t_inv - s_tail * inv, apart)
                forward += tl.where(idle, 0.0, weight * apart)
            tl.store(each_ptr + 4 * R.to(tl.int64), weight, mask=inside)
            t_inv = tl.where(idle, 0.0, weight * t_inv)
        if WEIGHTED or not (REVERSE or FORWARD):
            tl.store(each_ptr, t_max, mask=inside)
            tl.store(each_ptr + R.to(tl.int64), t_inv, mask=inside)
            tl.store(each_ptr + 2 * R.to(tl.int64), gap, mask=inside)
            tl.store(each_ptr + 3 * R.to(tl.int64), offset, mask=inside)
    if WEIGHTED or not (REVERSE or FORWARD):
        tl.store(out_ptr, s_max, mask=inside)
        tl.store(out_ptr + R.to(tl.int64), inv, mask=inside)
        tl.store(out_ptr + 2 * R.to(tl.int64), _as_number(s_top - first, numbers_ptr), mask=inside)
    if WEIGHTED and (REVERSE or FORWARD):
        at_top = -centre * inv
        if FORWARD:
            at_top = at_top + forward if REVERSE else forward
            centre = centre - total if REVERSE else -total
        tl.store(out_ptr + 3 * R.to(tl.int64), centre, mask=inside)
        tl.store(out_ptr + 4 * R.to(tl.int64), at_top, mask=inside)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _jsd_finish_kernel(
    sums_ptr,  # (3 T, S, R)
    numbers_ptr,
    weight_ptr,  # (T, R)
    value_ptr,  # (T, R)
    mix_ptr,  # (2,) beta, 1 - beta
    R,
    S,
    weight_stride,
    value_stride,
    WEIGHTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    beta, rest = tl.load(mix_ptr), tl.load(mix_ptr + 1)
    zero = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    out_ptr = numbers_ptr + row
    centre = zero
    for j in tl.static_range(T):
        sums = (zero, zero, zero)
        for s in range(S):
            at = sums_ptr + (3 * j * S + s) * R.to(tl.int64) + row
            sums = (
                sums[0] + tl.load(at, mask=inside, other=0.0),
                sums[1] + tl.load(at + S * R.to(tl.int64), mask=inside, other=0.0),
                sums[2] + tl.load(at + 2 * S * R.to(tl.int64), mask=inside, other=0.0),
            )
        each_ptr = out_ptr + (5 + 5 * j) * R.to(tl.int64)
        gap = tl.load(each_ptr + 2 * R.to(tl.int64), mask=inside, other=0.0)
        value = beta * sums[0] + rest * sums[1] + 0 * gap
        tl.store(value_ptr + j * value_stride + row, value, mask=inside)
        if WEIGHTED:
            weight = rest * tl.load(weight_ptr + j * weight_stride + row, mask=inside, other=0.0)
            centre += tl.where(weight == 0, 0.0, weight * (sums[2] + 0 * gap))
            tl.store(each_ptr + 4 * R.to(tl.int64), weight, mask=inside)
    if WEIGHTED:
        inv = tl.load(out_ptr + R.to(tl.int64), mask=inside, other=0.0)
        tl.store(out_ptr + 3 * R.to(tl.int64), centre, mask=inside)
        tl.store(out_ptr + 4 * R.to(tl.int64), -centre * inv, mask=inside)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _logprob_finish_kernel(
    pieces_ptr,  # (5, S, R): max, tail, top, logit, moment
    max_ptr,  # (R,)
    top_ptr,  # (R,) int64
    tail_ptr,  # (R,)
    logit_ptr,  # (R,)
    moment_ptr,  # (R,)
    R,
    S,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < R
    beside_ptr = pieces_ptr + 3 * S * R.to(tl.int64)
    m, tail, top, logit, moment = _whole(pieces_ptr, beside_ptr, S, R, row, inside, False)
    tl.store(max_ptr + row, m, mask=inside)
    tl.store(top_ptr + row, top.to(tl.int64), mask=inside)
    tl.store(tail_ptr + row, tail, mask=inside)
    tl.store(logit_ptr + row, logit, mask=inside)
    tl.store(moment_ptr + row, moment, mask=inside)
