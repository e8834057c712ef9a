"""The Triton kernels of `rows/triton.py`, which launches them.

R rows, V tokens, T teachers padded to TP, S pieces a row: program (r, s) reads piece s of row r tile by tile. z holds
the logits of every head, and a kernel finds its teachers by head number, HEAD_BITS bits each in one int64. Sums are in
the logits' dtype, fp32 or fp64; offsets are 64-bit, for row 14,123 of 152,064 columns starts past 2**31.
"""

import triton
import triton.language as tl

# numbers that differ from chunk to chunk: no compilation of their own for a 1 or a multiple of 16
VARYING = ("R", "student", "heads", "tiles_per_split")


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
    # an infinite offset: mass where the other side has none
    moved_new = tl.where(tile_offset == float("inf"), float("inf"), moved_new)
    moved_old = tl.where(offset == float("inf"), float("inf"), moved_old)
    moment = tl.where(keep, moment + tl.where(new > 0, moved_new, 0.0), tile_moment + tl.where(old > 0, moved_old, 0.0))
    tail = tl.where(keep, tail + new * (1 + tile_tail), tile_tail + old * (1 + tail))
    offset = tl.where(keep, offset, tile_offset)
    top = tl.where(keep, top, tile_top)
    return largest, top, tail, offset, moment


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0."""
    series = 1 + x / 7
    if x.dtype == tl.float64:
        series = 1 + x / 7 * (1 + x / 8 * (1 + x / 9 * (1 + x / 10 * (1 + x / 11 * (1 + x / 12 * (1 + x / 13))))))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * series)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1)


@triton.jit
def _softcap_kernel(
    z_ptr,  # (count,)
    cap_ptr,  # (1,)
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    cap = tl.load(cap_ptr)
    x = tl.load(z_ptr + at, mask=inside, other=0.0) / cap
    less = _expm1(-2 * tl.abs(x))
    t = cap * (less / (2 + less))
    tl.store(z_ptr + at, tl.where(x > 0, -t, t), mask=inside)


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


@triton.jit(do_not_specialize=VARYING)
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
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head, V, T, TP, BITS)
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
def _log_mix(s, t, s_max, t_max, norm_gap, beta, rest, ONE_SIDED: tl.constexpr):
    """u = log(p / m) and log(q / m), m = beta q + rest p; finite where p or q is 0. ONE_SIDED as in `stats.log_mix`."""
    r = (s - s_max) - (t - t_max) - norm_gap
    r = tl.where(r != r, 0.0, tl.minimum(tl.maximum(r, -1e30), 1e30))
    share, other = tl.where(r < 0, rest, beta), tl.where(r < 0, beta, rest)
    near = -tl.abs(r)
    less = _expm1(near)
    grown = share * less
    mix = _log1p(grown)
    small = near - mix
    if ONE_SIDED:
        ratio = tl.exp(near)
        mix = tl.where(grown > -0.5, mix, tl.log(other + share * ratio))
        beyond = -other * less / tl.where(ratio > 0, ratio, 1.0)
        by_itself = (ratio > 0) & (beyond < 1)
        small = tl.where(by_itself, -_log1p(tl.where(by_itself, beyond, 0.0)), near - mix)
    return tl.where(r < 0, small, -mix), tl.where(r < 0, -mix, small)


@triton.jit(do_not_specialize=VARYING)
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
    rest_ptr,  # (1,) 1 - beta
    to_teacher_ptr,  # (T, R, S) sum of q log(q / m)
    to_student_ptr,  # (T, R, S) sum of p log(p / m)
    moment_ptr,  # (T, R, S) sum of p (u - u_top)
    R,
    V,
    stride_head,
    student,
    heads,
    tiles_per_split,
    ONE_SIDED: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head, V, T, TP, BITS)
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
        u, w = _log_mix(s, t, s_max, t_max, gap, tl.load(beta_ptr), tl.load(rest_ptr), ONE_SIDED)
        p = tl.exp(s - s_max) * inv
        to_teacher += tl.sum(tl.exp(t - t_max) * t_inv * w, 1)
        to_student += tl.sum(p * u, 1)
        moment += tl.sum(tl.where(cols[None, :] == top, 0.0, p * (u - u_top)), 1)
    out = each * S + split
    tl.store(to_teacher_ptr + out, to_teacher, mask=real)
    tl.store(to_student_ptr + out, to_student, mask=real)
    tl.store(moment_ptr + out, moment, mask=real)


@triton.jit
def _store_dlogits(ptr, g, z, cap_ptr, weighted, inside, HAS_CAP: tl.constexpr):
    """Through the softcap, into the GEMM's dtype; 0 in a row without weight, whatever it holds."""
    if HAS_CAP:
        cap = tl.load(cap_ptr)
        g = g * (1 - (z / cap) * (z / cap))
    g = tl.where(weighted, g, 0.0)
    tl.store(ptr, g.to(ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
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
    rest_ptr,  # (1,)
    cap_ptr,  # (1,)
    R,
    V,
    stride_head,
    student,
    heads,
    tiles_per_split,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head, V, T, TP, BITS)
    start = split * tiles_per_split * BLOCK
    real = j < T
    each = j.to(tl.int64) * R + row
    s_max, inv = tl.load(max_ptr + row), tl.load(inv_ptr + row)
    top, centre, at_top = tl.load(top_ptr + row), tl.load(centre_ptr + row), tl.load(at_top_ptr + row)
    weight = tl.load(weight_ptr + each, mask=real, other=0.0)[:, None]
    weighted = tl.sum((weight != 0).to(tl.int32)) > 0
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
            u, _ = _log_mix(s[None, :], t, s_max, t_max, gap, tl.load(beta_ptr), tl.load(rest_ptr), ONE_SIDED)
            g += p * tl.sum(weight * (u - offset), 0)
        if FORWARD:
            q = t_weight * tl.exp(t - t_max)
            g -= tl.sum(tl.where(t_weight == 0, 0.0, q), 0)
        g = tl.where(cols == top, at_top, g)
        _store_dlogits(dlogits_ptr + row * V + cols, g, s, cap_ptr, weighted, inside, HAS_CAP)


@triton.jit(do_not_specialize=VARYING[3:])
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


@triton.jit(do_not_specialize=VARYING[3:])
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
    weighted = (dlogp != 0) | (dentropy != 0) | (dlse != 0)
    for i in range(tiles_per_split):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = cols < V
        z = tl.load(z_ptr + row * V + cols, mask=inside, other=float("-inf"))
        x = z - z_max
        p = tl.exp(x) * inv
        g = p * (dlse - dlogp - dentropy * tl.where(p > 0, x - mean, 0.0))
        g += tl.where(cols == token, dlogp, 0.0)
        g = tl.where(cols == top, at_top, g)
        _store_dlogits(dlogits_ptr + row * V + cols, g, z, cap_ptr, weighted, inside, HAS_CAP)


@triton.jit(do_not_specialize=VARYING[:3])
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
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * V
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head, V, T, TP, BITS)
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
