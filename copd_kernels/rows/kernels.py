"""The Triton kernels that sweep rows whose statistics are known, and those that need none.

`lanes.py` reads the rows first, `finish.py` makes of that what these know of a row: numbers (5 + 5 T, R).

R rows, V tokens, T teachers, S pieces a row: program (r, s) reads piece s of row r, `count` whole tiles of BLOCK
columns, and the last piece `rest` more, which may reach beyond V. Threads exchange nothing inside a loop over tiles.
"""

import triton
import triton.language as tl

from .complete import _completed, _exp, _expm1, _lacks
from .lanes import SLICES, VARYING, _head_row

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1: 1 + x is 2**k (1 + f), with f free of the rounding of 1 + x."""
    w = 1 + x
    if x.dtype == tl.float64:
        gap = w - 1
        return tl.where(gap == 0, x, tl.log(w) * (x / tl.where(gap == 0, 1.0, gap)))
    else:
        k = (w.to(tl.int32, bitcast=True) - 0x3F2AAAAB) & -0x800000
        scale = (0x3F800000 - k).to(tl.float32, bitcast=True)
        f = x * scale + (scale - 1)
        # log(1 + f) within 2e-8 for |f| <= 1/3, by least squares
        series = f * (f * (f * 0.14032766 - 0.15420598) + 0.13995583) - 0.1641001
        series = f * (f * (f * (f * series + 0.20011085) - 0.25008145) + 0.33333203) - 0.49999931
        return f * f * series + f + k.to(tl.float32) * (LN2 / 8388608)


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
        ratio = _exp(near)
        mix = tl.where(grown > -0.5, mix, tl.log(other + share * ratio))
        beyond = -other * less / tl.where(ratio > 0, ratio, 1.0)
        by_itself = (ratio > 0) & (beyond < 1)
        small = tl.where(by_itself, -_log1p(tl.where(by_itself, beyond, 0.0)), near - mix)
    return tl.where(r < 0, small, -mix), tl.where(r < 0, -mix, small)


@triton.jit
def _id(number):
    """What `_as_number` made a number."""
    if number.dtype == tl.float64:
        found = number.to(tl.int64, bitcast=True).to(tl.int32)
    else:
        found = number.to(tl.int32, bitcast=True)
    return found


@triton.jit
def _number(numbers_ptr, field, R, row):
    return tl.load(numbers_ptr + field * R.to(tl.int64) + row)


@triton.jit
def _of_teacher(numbers_ptr, j, R, row):
    """max, 1 / (1 + tail) or times the weight, gap, offset, weight."""
    first = numbers_ptr + (5 + 5 * j) * R.to(tl.int64) + row
    return (
        tl.load(first),
        tl.load(first + R.to(tl.int64)),
        tl.load(first + 2 * R.to(tl.int64)),
        tl.load(first + 3 * R.to(tl.int64)),
        tl.load(first + 4 * R.to(tl.int64)),
    )


@triton.jit
def _line(row_ptr, cols, V, beyond, MASKED: tl.constexpr):
    return tl.load(row_ptr + cols, mask=cols < V, other=beyond) if MASKED else tl.load(row_ptr + cols)


@triton.jit
def _add_jsd(sums, numbers, s_ptr, t_ptrs, cols, V, T: tl.constexpr, ONE_SIDED: tl.constexpr, MASKED: tl.constexpr):
    s_max, inv, top, beta, rest, each = numbers
    s = _line(s_ptr, cols, V, float("-inf"), MASKED)
    p = _exp(s - s_max) * inv
    result = ()
    for j in tl.static_range(T):
        to_teacher, to_student, moment = sums[j]
        t_max, t_inv, gap, u_top, _ = each[j]
        t = _line(t_ptrs[j], cols, V, float("-inf"), MASKED)
        u, w = _log_mix(s, t, s_max, t_max, gap, beta, rest, ONE_SIDED)
        to_teacher += _exp(t - t_max) * t_inv * w
        to_student += p * u
        moment += tl.where(cols == top, 0.0, p * (u - u_top))
        result = result + ((to_teacher, to_student, moment),)
    return result


@triton.jit(do_not_specialize=VARYING)
def _jsd_sums_kernel(
    z_ptr,  # (H, R, V)
    numbers_ptr,
    mix_ptr,  # (2,) beta, 1 - beta
    sums_ptr,  # (3 T, S, R): of each teacher the sums of q log(q / m), p log(p / m) and p (u - u_top)
    R,
    V,
    stride,
    stride_head,
    student,
    heads,
    count,
    rest,
    ONE_SIDED: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * stride
    start = split * count * BLOCK
    zero = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    t_ptrs, each, sums = (), (), ()
    for j in tl.static_range(T):
        t_ptrs = t_ptrs + (_head_row(z_ptr, heads, j, row, stride_head, stride, BITS),)
        each = each + (_of_teacher(numbers_ptr, j, R, row),)
        sums = sums + ((zero, zero, zero),)
    s_max, inv = _number(numbers_ptr, 0, R, row), _number(numbers_ptr, 1, R, row)
    numbers = (s_max, inv, _id(_number(numbers_ptr, 2, R, row)), tl.load(mix_ptr), tl.load(mix_ptr + 1), each)
    for i in range(count):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        sums = _add_jsd(sums, numbers, s_ptr, t_ptrs, cols, V, T, ONE_SIDED, False)
    if split == S - 1:
        for i in range(rest):
            cols = start + (count + i) * BLOCK + tl.arange(0, BLOCK)
            sums = _add_jsd(sums, numbers, s_ptr, t_ptrs, cols, V, T, ONE_SIDED, True)
    for j in tl.static_range(T):
        for k in tl.static_range(3):
            tl.store(sums_ptr + ((3 * j + k) * S + split) * R.to(tl.int64) + row, tl.sum(sums[j][k], 0))


@triton.jit
def _store_dlogits(ptr, g, z, cap, inside, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """Through the row's softcap, into the GEMM's dtype."""
    if HAS_CAP:
        # the differences are exact near the cap
        g = g * ((cap - z) * (cap + z)) * (1 / (cap * cap))
    if MASKED:
        tl.store(ptr, g.to(ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(ptr, g.to(ptr.dtype.element_ty))


@triton.jit
def _store_zeros(out_ptr, start, tiles, V, BLOCK: tl.constexpr):
    """The gradient of a row without weight, whatever it holds."""
    zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for i in range(tiles):
        cols = start + i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + cols, zero, mask=cols < V)


@triton.jit
def _write_kl(
    numbers, s_ptr, t_ptrs, out_ptr, cap, cols, V, T: tl.constexpr, REVERSE: tl.constexpr, FORWARD: tl.constexpr,
    ONE_SIDED: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    s_max, inv, centre, beta, rest, each = numbers
    s = _line(s_ptr, cols, V, float("-inf"), MASKED)
    p = _exp(s - s_max) * inv
    a = tl.zeros_like(s) - centre
    b = tl.zeros_like(s)
    for j in tl.static_range(T):
        t_max, t_weight, gap, offset, weight = each[j]
        t = _line(t_ptrs[j], cols, V, float("-inf"), MASKED)
        if REVERSE:
            a += weight * (s - t - offset)
        elif not FORWARD:
            u, _ = _log_mix(s, t, s_max, t_max, gap, beta, rest, ONE_SIDED)
            a += weight * (u - offset)
        if FORWARD:
            b += t_weight * _exp(t - t_max)
    # no mass: nothing, however far the teachers are
    g = tl.where(p == 0, 0.0, p * a) - b
    _store_dlogits(out_ptr + cols, g, s, cap, cols < V, HAS_CAP, MASKED)


@triton.jit(do_not_specialize=VARYING)
def _kl_grad_kernel(
    z_ptr,  # (H, R, V)
    dlogits_ptr,  # (R, V), may be the student's logits
    numbers_ptr,
    mix_ptr,  # (2,) beta, 1 - beta
    cap_ptr,  # (1,), or (R,) with cap_step 1
    cap_step,
    out_stride,
    R,
    V,
    stride,
    stride_head,
    student,
    heads,
    count,
    rest,
    REVERSE: tl.constexpr,
    FORWARD: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * stride
    out_ptr = dlogits_ptr + row * out_stride
    start = split * count * BLOCK
    cap = tl.load(cap_ptr + row * cap_step)
    s_max, inv = _number(numbers_ptr, 0, R, row), _number(numbers_ptr, 1, R, row)
    top = _id(_number(numbers_ptr, 2, R, row))
    centre, at_top = _number(numbers_ptr, 3, R, row), _number(numbers_ptr, 4, R, row)
    t_ptrs, each, total = (), (), 0.0
    for j in tl.static_range(T):
        t_max, t_weight, gap, offset, weight = _of_teacher(numbers_ptr, j, R, row)
        # a teacher without weight is the student itself: whatever its logits are, they are not read
        idle = weight == 0
        total += tl.abs(weight)
        t_ptrs = t_ptrs + (tl.where(idle, s_ptr, _head_row(z_ptr, heads, j, row, stride_head, stride, BITS)),)
        offset, gap, t_max = tl.where(idle, 0.0, offset), tl.where(idle, 0.0, gap), tl.where(idle, s_max, t_max)
        each = each + ((t_max, t_weight, gap, offset, weight),)
    tiles, stop = count, start + count * BLOCK
    if split == tl.num_programs(1) - 1:
        tiles, stop = count + rest, V
    if total != 0:
        numbers = (s_max, inv, centre, tl.load(mix_ptr), tl.load(mix_ptr + 1), each)
        for i in range(count):
            cols = start + i * BLOCK + tl.arange(0, BLOCK)
            _write_kl(
                numbers, s_ptr, t_ptrs, out_ptr, cap, cols, V, T, REVERSE, FORWARD, ONE_SIDED, HAS_CAP, False
            )  # fmt: skip
        for i in range(count, tiles):
            cols = start + i * BLOCK + tl.arange(0, BLOCK)
            _write_kl(
                numbers, s_ptr, t_ptrs, out_ptr, cap, cols, V, T, REVERSE, FORWARD, ONE_SIDED, HAS_CAP, True
            )  # fmt: skip
        # the top token's own number takes the place of its column's, which another thread has written
        tl.debug_barrier()
        _store_dlogits(
            out_ptr + top, at_top, s_max, cap, (top >= start) & (top < stop), HAS_CAP, True
        )  # fmt: skip
    else:
        _store_zeros(out_ptr, start, tiles, V, BLOCK)


@triton.jit
def _write_logprob(
    numbers, lack, row_ptr, out_ptr, cap, cols, V, LACKS: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr
):
    z = _completed(_line(row_ptr, cols, V, float("-inf"), MASKED), cols, V, lack, LACKS, MASKED)
    _store_dlogits(out_ptr + cols, _by_logit(numbers, z), z, cap, cols < V, HAS_CAP, MASKED)


@triton.jit
def _by_logit(numbers, z):
    """The gradient by a logit that is neither the token's nor the largest."""
    z_max, inv, mean, dlogp, dentropy, dlse = numbers
    x = z - z_max
    p = _exp(x) * inv
    return tl.where(p == 0, 0.0, p * (dlse - dlogp - dentropy * (x - mean)))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _logprob_grad_kernel(
    z_ptr,  # (R, V)
    dlogits_ptr,  # (R, V), may be the logits
    token_ptr,  # (R,) int64
    top_ptr,  # (R,) int64
    max_ptr,  # (R,)
    tail_ptr,  # (R,)
    logit_ptr,  # (R,) the token's
    moment_ptr,  # (R,)
    dlogp_ptr,  # (R,)
    dentropy_ptr,  # (R,)
    dlse_ptr,  # (R,)
    cap_ptr,  # (1,), or (R,) with cap_step 1
    bias_ptr,  # (1, V)
    head_cap_ptr,  # (1,)
    temperature_ptr,  # (R,)
    cap_step,
    out_stride,
    V,
    stride,
    count,
    rest,
    first,
    LACKS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_ptr, out_ptr = z_ptr + row * stride, dlogits_ptr + row * out_stride
    start = split * count * BLOCK
    cap = tl.load(cap_ptr + row * cap_step)
    token, top = tl.load(token_ptr + row) - first, tl.load(top_ptr + row) - first
    z_max, tail = tl.load(max_ptr + row), tl.load(tail_ptr + row)
    dlogp, dentropy, dlse = tl.load(dlogp_ptr + row), tl.load(dentropy_ptr + row), tl.load(dlse_ptr + row)
    inv = 1 / (1 + tail)
    mean = tl.load(moment_ptr + row) * inv
    # at the top token, from the tail, where its terms cancel
    at_top = dlogp * tl.where(token == top, tail * inv, -inv) + (dentropy * mean + dlse) * inv
    # an id beyond 32 bits is no column
    token = tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)
    top = tl.where((top >= 0) & (top < V), top, -1).to(tl.int32)
    tiles, stop = count, start + count * BLOCK
    if split == tl.num_programs(1) - 1:
        tiles, stop = count + rest, V
    if (dlogp != 0) | (dentropy != 0) | (dlse != 0):
        numbers = (z_max, inv, mean, dlogp, dentropy, dlse)
        lack = _lacks(bias_ptr, 0, head_cap_ptr, temperature_ptr, 0, row, LACKS)
        for i in range(count):
            cols = start + i * BLOCK + tl.arange(0, BLOCK)
            _write_logprob(numbers, lack, row_ptr, out_ptr, cap, cols, V, LACKS, HAS_CAP, False)
        for i in range(count, tiles):
            cols = start + i * BLOCK + tl.arange(0, BLOCK)
            _write_logprob(numbers, lack, row_ptr, out_ptr, cap, cols, V, LACKS, HAS_CAP, True)
        # two columns have numbers of their own, which take the place of what other threads have written
        logit = tl.load(logit_ptr + row)
        asked = (token >= start) & (token < stop) & (token != top) & (dlogp != 0)
        tl.debug_barrier()
        _store_dlogits(out_ptr + token, _by_logit(numbers, logit) + dlogp, logit, cap, asked, HAS_CAP, True)
        _store_dlogits(out_ptr + top, at_top, z_max, cap, (top >= start) & (top < stop), HAS_CAP, True)
    else:
        _store_zeros(out_ptr, start, tiles, V, BLOCK)


@triton.jit
def _teacher_rows(z_ptr, heads, row, stride_head, stride, T: tl.constexpr, TP: tl.constexpr, BITS: tl.constexpr):
    j = tl.arange(0, TP)
    # padding lanes read teacher 0 again; their results are never stored
    head = (heads >> (BITS * tl.where(j < T, j, 0)).to(tl.int64)) & ((1 << BITS) - 1)
    return j, z_ptr + head * stride_head + row * stride


@triton.jit(do_not_specialize=VARYING)
def _overlap_kernel(
    z_ptr,  # (H, R, V)
    least_ptr,  # (R,) the student's k-th largest logit
    room_ptr,  # (R,) int64: how many equal to it are among the k
    t_least_ptr,  # (T, R)
    t_room_ptr,  # (T, R) int64
    common_ptr,  # (T, R) int32
    R,
    V,
    stride,
    stride_head,
    student,
    heads,
    T: tl.constexpr,
    TP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * stride
    j, t_ptr = _teacher_rows(z_ptr, heads, row, stride_head, stride, T, TP, BITS)
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
