"""Rows in Triton: CUDA, or any device under the interpreter.

A row is split over programs and read in blocks, never held whole. Each piece leaves its statistics, `stats.merge` joins
them, and a second sweep writes the gradient: every logit is read twice (three times for the JSD, whose sums need both
normalisers), every dlogit written once. No atomics: the order of every sum is fixed.

R rows, V tokens, T teachers padded to TP, S pieces a row. Sums are in the logits' dtype, fp32 or fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from copd_kernels.rows.stats import Side, entropy, kl_from, kl_gradient, log_mix, merge

# one tile of logits: 16 fp32 a thread and tensor, four 16-byte loads
TILE = 4096
NUM_WARPS = 8
# enough programs to fill a GPU several times over
PROGRAMS = 4096
# the teachers' head numbers travel in one int64, five bits each
HEAD_BITS = 5
MAX_TEACHERS = 12


@triton.jit
def _fold(x, delta, cols, m, top, tail, offset, moment):
    """Adds a tile to running statistics: x (P, B) logits, delta (P, B) what the moment is of; P may be 1."""
    tile_m = tl.max(x, 1)
    tile_top = tl.min(tl.where(x == tile_m[:, None], cols[None, :], 2147483647), 1)
    is_top = cols[None, :] == tile_top[:, None]
    # a tile without any mass has no finite largest logit to subtract
    base = tl.where(tile_m == float("-inf"), 0.0, tile_m)
    e = tl.where(is_top, 0.0, tl.exp(x - base[:, None]))
    tile_tail = tl.sum(e, 1)
    tile_offset = tl.sum(tl.where(is_top, delta, 0.0), 1)
    tile_moment = tl.sum(e * tl.where(e > 0, delta - tile_offset[:, None], 0.0), 1)

    keep = m >= tile_m
    largest = tl.where(keep, m, tile_m)
    old = tl.where(m == float("-inf"), 0.0, tl.exp(m - largest))
    new = tl.where(tile_m == float("-inf"), 0.0, tl.exp(tile_m - largest))
    moved_new = new * (tile_moment + (1 + tile_tail) * (tile_offset - offset))
    moved_old = old * (moment + (1 + tail) * (offset - tile_offset))
    moment = tl.where(keep, moment + tl.where(new > 0, moved_new, 0.0), tile_moment + tl.where(old > 0, moved_old, 0.0))
    tail = tl.where(keep, tail + new * (1 + tile_tail), tile_tail + old * (1 + tail))
    offset = tl.where(keep, offset, tile_offset)
    top = tl.where(keep, top, tile_top)
    return largest, top, tail, offset, moment


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1: the rounding of 1 + x is divided out again."""
    w = 1 + x
    gap = w - 1
    return tl.where(gap == 0, x, tl.log(w) * (x / tl.where(gap == 0, 1.0, gap)))


@triton.jit
def _teacher_rows(z_ptr, heads, row, stride_head, V, T: tl.constexpr, TP: tl.constexpr, BITS: tl.constexpr):
    j = tl.arange(0, TP)
    # padding lanes read teacher 0 again; their results are never stored
    head = (heads >> (BITS * tl.where(j < T, j, 0)).to(tl.int64)) & ((1 << BITS) - 1)
    return j, z_ptr + head * stride_head + row * V


@triton.jit
def _kl_stats_kernel(
    z_ptr,  # (H, R, V)
    max_ptr,  # (R, S)
    top_ptr,  # (R, S) int32
    tail_ptr,  # (R, S)
    moment_ptr,  # (T, R, S)
    t_max_ptr,  # (T, R, S)
    t_top_ptr,  # (T, R, S) int32
    t_tail_ptr,  # (T, R, S)
    t_moment_ptr,  # (T, R, S)
    R,
    V,
    stride_head,
    student,
    heads,
    tiles_per_split,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    s_ptr = z_ptr + student * stride_head.to(tl.int64) + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head.to(tl.int64), V, T, TP, BITS)
    start = split * tiles_per_split * BLOCK

    dtype = z_ptr.dtype.element_ty
    one = tl.zeros([1], dtype)
    zero = tl.zeros([TP], dtype)
    m, top, tail = one - float("inf"), (one + start).to(tl.int32), one
    offset, moment = zero, zero
    t_m, t_top, t_tail = zero - float("inf"), (zero + start).to(tl.int32), zero
    t_offset, t_moment = zero, zero
    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        s = tl.load(s_ptr + cols, mask=inside, other=float("-inf"))[None, :]
        t = tl.load(t_ptr[:, None] + cols[None, :], mask=inside[None, :], other=float("-inf"))
        m, top, tail, offset, moment = _fold(s, s - t, cols, m, top, tail, offset, moment)
        t_m, t_top, t_tail, t_offset, t_moment = _fold(t, t - s, cols, t_m, t_top, t_tail, t_offset, t_moment)
    here = row * S + split + tl.zeros([1], tl.int64)
    tl.store(max_ptr + here, m)
    tl.store(top_ptr + here, top)
    tl.store(tail_ptr + here, tail)
    each = here + j.to(tl.int64) * R * S
    real = j < T
    tl.store(moment_ptr + each, moment, mask=real)
    tl.store(t_max_ptr + each, t_m, mask=real)
    tl.store(t_top_ptr + each, t_top, mask=real)
    tl.store(t_tail_ptr + each, t_tail, mask=real)
    tl.store(t_moment_ptr + each, t_moment, mask=real)


@triton.jit
def _log_mix(s, t, s_max, t_max, norm_gap, beta):
    """u = log(p / m) and log(q / m), m = beta q + (1 - beta) p; finite where p or q is 0."""
    r = (s - s_max) - (t - t_max) - norm_gap
    r = tl.where(r != r, 0.0, tl.minimum(tl.maximum(r, -1e30), 1e30))
    mix = _log1p(tl.where(r < 0, 1 - beta, beta) * _expm1(-tl.abs(r)))
    return tl.minimum(r, 0.0) - mix, -tl.maximum(r, 0.0) - mix


@triton.jit
def _jsd_sums_kernel(
    z_ptr,  # (H, R, V)
    max_ptr,  # (R,)
    top_ptr,  # (R,) int64
    inv_ptr,  # (R,) 1 / (1 + tail)
    t_max_ptr,  # (T, R)
    t_inv_ptr,  # (T, R)
    gap_ptr,  # (T, R) log(1 + tail) of the student less the teacher's
    u_top_ptr,  # (T, R)
    beta_ptr,  # (1,)
    to_teacher_ptr,  # (T, R, S) sum of q log(q / m)
    to_student_ptr,  # (T, R, S) sum of p log(p / m)
    moment_ptr,  # (T, R, S) sum of p (u - u_top)
    R,
    V,
    stride_head,
    student,
    heads,
    tiles_per_split,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    s_ptr = z_ptr + student * stride_head.to(tl.int64) + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head.to(tl.int64), V, T, TP, BITS)
    start = split * tiles_per_split * BLOCK
    real = j < T
    each = j.to(tl.int64) * R + row
    s_max, inv = tl.load(max_ptr + row), tl.load(inv_ptr + row)
    top = tl.load(top_ptr + row)
    t_max = tl.load(t_max_ptr + each, mask=real, other=0.0)[:, None]
    t_inv = tl.load(t_inv_ptr + each, mask=real, other=0.0)[:, None]
    gap = tl.load(gap_ptr + each, mask=real, other=0.0)[:, None]
    u_top = tl.load(u_top_ptr + each, mask=real, other=0.0)[:, None]

    zero = tl.zeros([TP], z_ptr.dtype.element_ty)
    to_teacher, to_student, moment = zero, zero, zero
    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        s = tl.load(s_ptr + cols, mask=inside, other=float("-inf"))[None, :]
        t = tl.load(t_ptr[:, None] + cols[None, :], mask=inside[None, :], other=float("-inf"))
        u, w = _log_mix(s, t, s_max, t_max, gap, tl.load(beta_ptr))
        p = tl.exp(s - s_max) * inv
        to_teacher += tl.sum(tl.exp(t - t_max) * t_inv * w, 1)
        to_student += tl.sum(p * u, 1)
        moment += tl.sum(tl.where(cols[None, :] == top, 0.0, p * (u - u_top)), 1)
    out = each * S + split
    tl.store(to_teacher_ptr + out, to_teacher, mask=real)
    tl.store(to_student_ptr + out, to_student, mask=real)
    tl.store(moment_ptr + out, moment, mask=real)


@triton.jit
def _store_dlogits(ptr, g, z, cap_ptr, inside, HAS_CAP: tl.constexpr):
    """Through the softcap, into the GEMM's dtype; fp16 saturates rather than overflow."""
    if HAS_CAP:
        cap = tl.load(cap_ptr)
        g = g * (1 - (z / cap) * (z / cap))
    if ptr.dtype.element_ty == tl.float16:
        g = tl.minimum(tl.maximum(g, -65504.0), 65504.0)
    tl.store(ptr, g.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _kl_grad_kernel(
    z_ptr,  # (H, R, V)
    dlogits_ptr,  # (R, V), may be the student's logits
    max_ptr,  # (R,)
    top_ptr,  # (R,) int64
    inv_ptr,  # (R,) 1 / (1 + tail)
    centre_ptr,  # (R,)
    at_top_ptr,  # (R,)
    weight_ptr,  # (T, R) of the part that multiplies p
    offset_ptr,  # (T, R) that part at the student's top token
    t_max_ptr,  # (T, R)
    t_weight_ptr,  # (T, R) weight / (1 + tail) of the teacher's own probability
    gap_ptr,  # (T, R) as in _jsd_sums_kernel
    beta_ptr,  # (1,)
    cap_ptr,  # (1,)
    R,
    V,
    stride_head,
    student,
    heads,
    tiles_per_split,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    HAS_CAP: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_ptr = z_ptr + student * stride_head.to(tl.int64) + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head.to(tl.int64), V, T, TP, BITS)
    start = split * tiles_per_split * BLOCK
    real = j < T
    each = j.to(tl.int64) * R + row
    s_max, inv = tl.load(max_ptr + row), tl.load(inv_ptr + row)
    top, centre, at_top = tl.load(top_ptr + row), tl.load(centre_ptr + row), tl.load(at_top_ptr + row)
    weight = tl.load(weight_ptr + each, mask=real, other=0.0)[:, None]
    offset = tl.load(offset_ptr + each, mask=real, other=0.0)[:, None]
    t_max = tl.load(t_max_ptr + each, mask=real, other=0.0)[:, None]
    t_weight = tl.load(t_weight_ptr + each, mask=real, other=0.0)[:, None]
    gap = tl.load(gap_ptr + each, mask=real, other=0.0)[:, None]

    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        s = tl.load(s_ptr + cols, mask=inside, other=float("-inf"))
        t = tl.load(t_ptr[:, None] + cols[None, :], mask=inside[None, :], other=float("-inf"))
        p = tl.exp(s - s_max) * inv
        g = -centre * p
        if REVERSE:
            x = s[None, :] - t - offset
            g += p * tl.sum(tl.where((weight == 0) | (p == 0)[None, :], 0.0, weight * x), 0)
        elif not FORWARD:
            u, _ = _log_mix(s[None, :], t, s_max, t_max, gap, tl.load(beta_ptr))
            g += p * tl.sum(weight * (u - offset), 0)
        if FORWARD:
            q = t_weight * tl.exp(t - t_max)
            g -= tl.sum(tl.where(t_weight == 0, 0.0, q), 0)
        g = tl.where(cols == top, at_top, g)
        _store_dlogits(dlogits_ptr + row * V + cols, g, s, cap_ptr, inside, HAS_CAP)


@triton.jit
def _logprob_stats_kernel(
    z_ptr,  # (R, V)
    max_ptr,  # (R, S)
    top_ptr,  # (R, S) int32
    tail_ptr,  # (R, S)
    moment_ptr,  # (R, S)
    V,
    tiles_per_split,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * tiles_per_split * BLOCK
    zero = tl.zeros([1], z_ptr.dtype.element_ty)
    m, top, tail, offset, moment = zero - float("inf"), (zero + start).to(tl.int32), zero, zero, zero
    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + cols, mask=cols < V, other=float("-inf"))[None, :]
        m, top, tail, offset, moment = _fold(z, z, cols, m, top, tail, offset, moment)
    here = row * tl.num_programs(1) + split + tl.zeros([1], tl.int64)
    tl.store(max_ptr + here, m)
    tl.store(top_ptr + here, top)
    tl.store(tail_ptr + here, tail)
    tl.store(moment_ptr + here, moment)


@triton.jit
def _logprob_grad_kernel(
    z_ptr,  # (R, V)
    dlogits_ptr,  # (R, V), may be the logits
    token_ptr,  # (R,) int64
    top_ptr,  # (R,) int64
    max_ptr,  # (R,)
    inv_ptr,  # (R,) 1 / (1 + tail)
    mean_ptr,  # (R,) expectation of z - max
    dlogp_ptr,  # (R,)
    dentropy_ptr,  # (R,)
    dlse_ptr,  # (R,)
    at_top_ptr,  # (R,)
    cap_ptr,  # (1,)
    V,
    tiles_per_split,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * tiles_per_split * BLOCK
    token, top = tl.load(token_ptr + row), tl.load(top_ptr + row)
    z_max, inv, mean = tl.load(max_ptr + row), tl.load(inv_ptr + row), tl.load(mean_ptr + row)
    dlogp, dentropy, dlse = tl.load(dlogp_ptr + row), tl.load(dentropy_ptr + row), tl.load(dlse_ptr + row)
    at_top = tl.load(at_top_ptr + row)
    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        z = tl.load(z_ptr + row * V + cols, mask=inside, other=float("-inf"))
        x = z - z_max
        p = tl.exp(x) * inv
        g = p * (dlse - dlogp - dentropy * tl.where(p > 0, x - mean, 0.0))
        g += tl.where(cols == token, dlogp, 0.0)
        g = tl.where(cols == top, at_top, g)
        _store_dlogits(dlogits_ptr + row * V + cols, g, z, cap_ptr, inside, HAS_CAP)


@triton.jit
def _overlap_kernel(
    z_ptr,  # (H, R, V)
    least_ptr,  # (R,) the student's k-th largest logit
    room_ptr,  # (R,) int64: how many equal to it are among the k
    t_least_ptr,  # (T, R)
    t_room_ptr,  # (T, R) int64
    common_ptr,  # (T, R) int32
    R,
    V,
    stride_head,
    student,
    heads,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr = z_ptr + student * stride_head.to(tl.int64) + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head.to(tl.int64), V, T, TP, BITS)
    real = j < T
    each = j.to(tl.int64) * R + row
    least, room = tl.load(least_ptr + row), tl.load(room_ptr + row)
    t_least = tl.load(t_least_ptr + each, mask=real, other=0.0)[:, None]
    t_room = tl.load(t_room_ptr + each, mask=real, other=0)[:, None]
    common = tl.zeros([TP], tl.int32)
    seen = tl.zeros([1], tl.int32)
    t_seen = tl.zeros([TP], tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < V
        s = tl.load(s_ptr + cols, mask=inside, other=float("-inf"))[None, :]
        t = tl.load(t_ptr[:, None] + cols[None, :], mask=inside[None, :], other=float("-inf"))
        equal = ((s == least) & inside[None, :]).to(tl.int32)
        t_equal = ((t == t_least) & inside[None, :]).to(tl.int32)
        mine = (s > least) | ((equal > 0) & (tl.cumsum(equal, 1) + seen[:, None] <= room))
        theirs = (t > t_least) | ((t_equal > 0) & (tl.cumsum(t_equal, 1) + t_seen[:, None] <= t_room))
        common += tl.sum((mine & theirs).to(tl.int32), 1)
        seen += tl.sum(equal, 1)
        t_seen += tl.sum(t_equal, 1)
    tl.store(common_ptr + each, common, mask=real)


def logprob(z: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    side = logprob_side(z)
    chosen = z[0].gather(1, tokens.unsqueeze(1)).squeeze(1)
    return (chosen - side.max) - side.norm, entropy(side), side.lse


def logprob_side(z: Tensor) -> Side:
    _, R, V = z.shape
    BLOCK, S, tiles = pieces(R, V, 1)
    m, tail, moment = (z.new_empty(R, S) for _ in range(3))
    top = torch.empty(R, S, dtype=torch.int32, device=z.device)
    _logprob_stats_kernel[(R, S)](z, m, top, tail, moment, V, tiles, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return merge(Side(m, ids(top, V), tail, torch.zeros_like(m), moment))


def logprob_grad(
    z: Tensor,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    cap: float | None,
    dlogits: Tensor,
) -> None:
    _, R, V = z.shape
    side = logprob_side(z)
    own = torch.where(tokens == side.top, side.tail * side.p_top, -side.p_top)
    at_top = dlogp * own + (dentropy * side.mean + dlse) * side.p_top
    BLOCK, S, tiles = pieces(R, V, 1)
    _logprob_grad_kernel[(R, S)](
        z,
        dlogits,
        tokens.contiguous(),
        side.top,
        side.max,
        side.p_top,
        side.mean,
        dlogp.contiguous(),
        dentropy.contiguous(),
        dlse.contiguous(),
        at_top,
        number(z, cap),
        V,
        tiles,
        HAS_CAP=cap is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


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
    _, R, V = z.shape
    T = len(teachers)
    BLOCK, S, tiles = pieces(R, V, T)
    shape = {"T": T, "TP": triton.next_power_of_2(T), "BITS": HEAD_BITS, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
    place = (R, V, z.stride(0), student, packed(teachers))

    m, tail = z.new_empty(R, S), z.new_empty(R, S)
    moment, t_m, t_tail, t_moment = (z.new_empty(T, R, S) for _ in range(4))
    top = torch.empty(R, S, dtype=torch.int32, device=z.device)
    t_top = torch.empty(T, R, S, dtype=torch.int32, device=z.device)
    _kl_stats_kernel[(R, S)](z, m, top, tail, moment, t_m, t_top, t_tail, t_moment, *place, tiles, **shape)
    top, t_top = ids(top, V), ids(t_top, V)
    cross = torch.stack([z[j].gather(1, top) for j in teachers])
    t_cross = z[student].expand(T, R, V).gather(2, t_top)
    s = merge(Side(m, top, tail, cross, moment))
    t = merge(Side(t_m, t_top, t_tail, t_cross, t_moment))

    mean, offset, gap = s.mean, s.max - s.cross, (s.norm - t.norm).contiguous()
    if divergence == "jsd":
        offset, _ = log_mix(-(s.cross - t.max) - gap, beta)
        sums = z.new_empty(3, T, R, S)
        _jsd_sums_kernel[(R, S)](
            z, s.max, s.top, s.p_top, t.max, t.p_top, gap, offset, number(z, beta), *sums, *place, tiles, **shape
        )
        to_teacher, to_student, moment = sums.sum(-1)
        value = beta * to_teacher + (1 - beta) * to_student
        if weight is not None:
            weight, mean = (1 - beta) * weight, moment
    elif divergence == "reverse":
        value = kl_from(s, t)
    elif divergence == "forward":
        value = kl_from(t, s)
    else:
        value = kl_from(s, t) + kl_from(t, s)
    if dlogits is None:
        return value

    centre, at_top = kl_gradient(divergence, weight, s, t, mean)
    _kl_grad_kernel[(R, S)](
        z,
        dlogits,
        s.max,
        s.top,
        s.p_top,
        centre,
        at_top,
        weight.contiguous(),
        offset,
        t.max,
        weight * t.p_top,
        gap,
        number(z, beta),
        number(z, cap),
        *place,
        tiles,
        REVERSE=divergence in ("reverse", "symmetric"),
        FORWARD=divergence in ("forward", "symmetric"),
        HAS_CAP=cap is not None,
        **shape,
    )
    return value


def overlap(z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
    _, R, V = z.shape
    T = len(teachers)
    BLOCK, _, _ = pieces(R, V, T)
    least, room = boundary(z[student], k)
    t_least, t_room = (torch.stack(x) for x in zip(*(boundary(z[j], k) for j in teachers), strict=True))
    common = torch.empty(T, R, dtype=torch.int32, device=z.device)
    place = (R, V, z.stride(0), student, packed(teachers))
    shape = {"T": T, "TP": triton.next_power_of_2(T), "BITS": HEAD_BITS, "BLOCK": BLOCK}
    _overlap_kernel[(R,)](z, least, room, t_least, t_room, common, *place, **shape, num_warps=NUM_WARPS)
    return common.to(z.dtype) / k


def boundary(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest logit of each row, and how many equal to it belong to the k largest."""
    largest = logits.topk(k, dim=1).values
    least = largest[:, -1].contiguous()
    return least, (largest == least.unsqueeze(1)).sum(1)


def pieces(R: int, V: int, T: int) -> tuple[int, int, int]:
    """(tokens a tile, pieces a row, tiles a piece)."""
    BLOCK = min(TILE // triton.next_power_of_2(T), max(16, triton.next_power_of_2(V)))
    tiles = triton.cdiv(V, BLOCK)
    per_split = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, R)))
    return BLOCK, triton.cdiv(tiles, per_split), per_split


def number(z: Tensor, value: float | None) -> Tensor:
    """A number as the kernels read it: in z's dtype, where an argument would be rounded to fp32."""
    return z.new_full((1,), value or 0.0)


def ids(top: Tensor, V: int) -> Tensor:
    """int64 ids; a row of NaN has no top token, and any valid id will do."""
    return top.to(torch.int64).clamp_(0, V - 1)


def packed(heads: list[int]) -> int:
    if len(heads) > MAX_TEACHERS or max(heads) >= 1 << HEAD_BITS:
        rule = f"number at most {MAX_TEACHERS} for backend 'triton'; got {len(heads)}; use backend='torch'"
        raise NotImplementedError(f"kl: teachers must {rule}")
    return sum(head << (HEAD_BITS * j) for j, head in enumerate(heads))
