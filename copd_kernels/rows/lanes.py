"""The Triton kernels that read a row for the first time and leave its statistics, a piece at a time.

R rows, V tokens, T teachers, S pieces a row: program (r, s) reads piece s of row r tile by tile. z holds the logits of
every head, and a kernel finds its teachers by head number, BITS bits each in one int64. Sums are in the logits' dtype,
fp32 or fp64; offsets are 64-bit, for row 14,123 of 152,064 columns starts past 2**31.

Nothing is exchanged between threads inside a loop over tiles. A tile is U spans of LANES x 4 columns. A lane, one
thread of a GPU, reads four neighbouring columns of each span, so that its largest logit needs no other thread, and
keeps the statistics of `stats.py` of what it has seen, measured from its own top token. Lanes are joined once a piece.
A piece is `count` whole tiles; the last piece of a row takes `rest` more, which may reach beyond V.

What a piece leaves is (F, S, R), a field of `finish.py` a plane; its ids count from the rank's `first` token.
"""

import triton
import triton.language as tl

from .complete import _completed, _exp, _lacks

# numbers that differ from chunk to chunk: no compilation of their own for a 1 or a multiple of 16
VARYING = ("R", "S", "student", "heads", "count", "rest", "first", "place", "weight_stride", "value_stride", "cap_step")
# a chunk's part of what is kept of all tokens starts anywhere
SLICES = ("weight_ptr", "value_ptr", "token_ptr", "cap_ptr", "dlogp_ptr", "dentropy_ptr", "dlse_ptr") + tuple(
    f"{name}_ptr" for name in ("max", "tail", "top", "moment", "logit", "temperature")
)
# the maximum of a lane that has seen no mass yet, and what is read beyond the row: finite, so that differences are
LOWEST = tl.constexpr(-3e38)
NO_COLUMN = tl.constexpr(2147483647)


@triton.jit
def _as_number(ids, pointer):
    """An id's bits as a number of what `pointer` points to, so that one buffer holds both."""
    if pointer.dtype.element_ty == tl.float64:
        number = ids.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        number = ids.to(tl.int32).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _head(heads, j, BITS: tl.constexpr):
    """Of teacher j."""
    return ((heads >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.int64)


@triton.jit
def _head_row(z_ptr, heads, j, row, stride_head, stride, BITS: tl.constexpr):
    """Where this row of teacher j starts."""
    return z_ptr + _head(heads, j, BITS) * stride_head + row * stride


@triton.jit
def _spans(row_ptr, at, V, lack, LACKS: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr, MASKED: tl.constexpr):
    """A tile's logits, U of (LANES, 4); what they lack is done, and written for who reads them next."""
    first = at + tl.arange(0, LANES)[:, None] * 4 + tl.arange(0, 4)[None, :]
    z = ()
    for u in tl.static_range(U):
        cols = first + u * LANES * 4
        span = tl.load(row_ptr + cols, mask=cols < V, other=LOWEST) if MASKED else tl.load(row_ptr + cols)
        if LACKS:
            span = _completed(span, cols, V, lack, LACKS, MASKED)
            if MASKED:
                tl.store(row_ptr + cols, span, mask=cols < V)
                span = tl.where(cols < V, span, LOWEST)
            else:
                tl.store(row_ptr + cols, span)
        z = z + (span,)
    return z


@triton.jit
def _fold(side, z, at, LANES: tl.constexpr, U: tl.constexpr):
    """Adds a tile to every lane's (max, first, tail, held).

    The sum of exp(z - max) over the group that holds the top, one lane's columns of one tile, is held apart from the
    tail, which therefore never has the top token's 1 in it; `first` is where the top's four columns start. Returns also
    exp(z - max), what scales older sums, those older sums, and where max grew.
    """
    m, first, tail, held = side
    largest = tl.max(z[0], 1)
    here = at + tl.arange(0, LANES) * 4
    start = here
    for u in tl.static_range(1, U):
        other = tl.max(z[u], 1)
        start = tl.where(other > largest, here + u * LANES * 4, start)
        largest = tl.maximum(largest, other)
    grew = largest > m
    largest = tl.where(grew, largest, m)
    e = ()
    for u in tl.static_range(U):
        e = e + (_exp(z[u] - largest[:, None]),)
    both = e[0]
    for u in tl.static_range(1, U):
        both += e[u]
    mass = tl.sum(both, 1)
    scale, whole = _exp(m - largest), tail + held
    side = (
        largest,
        tl.where(grew, start, first),
        tl.where(grew, scale * whole, tail + mass),
        tl.where(grew, mass, held),
    )
    return side, e, scale, whole, grew


@triton.jit
def _fold_moment(pair, folded, z, other, U: tl.constexpr):
    """Adds a tile to every lane's (offset, moment) of z against `other`: offset is z - other at the lane's top."""
    offset, moment = pair
    side, e, scale, whole, grew = folded
    at_top = tl.where(z[0] == side[0][:, None], z[0] - other[0], LOWEST)
    for u in tl.static_range(1, U):
        at_top = tl.maximum(at_top, tl.where(z[u] == side[0][:, None], z[u] - other[u], LOWEST))
    new = tl.where(grew, tl.max(at_top, 1), offset)
    terms = e[0] * (z[0] - other[0] - new[:, None])
    for u in tl.static_range(1, U):
        terms += e[u] * (z[u] - other[u] - new[:, None])
    return new, scale * (moment + whole * (offset - new)) + tl.sum(terms, 1)


@triton.jit
def _join(side, row_ptr, start, V, LANES: tl.constexpr, U: tl.constexpr):
    """The lanes of a piece: its largest logit, its first top token, the tail, and what scales each lane's sums."""
    m, first, tail, held = side
    largest = tl.max(m, 0)
    begin = tl.min(tl.where(m == largest, first, NO_COLUMN), 0)
    factor = _exp(m - largest)
    tail = tl.sum(factor * (tail + tl.where((m == largest) & (first == begin), 0.0, held)), 0)
    # the winner's held group again, now without the top token
    inside = begin - start
    group = start + inside // (U * LANES * 4) * (U * LANES * 4) + inside % (LANES * 4)
    cols = group + tl.arange(0, U)[:, None] * (LANES * 4) + tl.arange(0, 4)[None, :]
    z = tl.load(row_ptr + cols, mask=cols < V, other=LOWEST)
    top = tl.min(tl.min(tl.where(z == largest, cols, NO_COLUMN), 1), 0)
    tail += tl.sum(tl.sum(tl.where(cols == top, 0.0, _exp(z - largest)), 1), 0)
    massless = largest == LOWEST
    # a NaN without any mass beside it is still seen
    tail = tl.where(massless & (tail == tail), 0.0, tail)
    return tl.where(massless, float("-inf"), largest), tl.minimum(tl.maximum(top, 0), V - 1), tail, factor


@triton.jit
def _exact_moment(joined, row_ptr, other_ptr, start, stop, tiles, OWN: tl.constexpr, LANES: tl.constexpr):
    """A piece's moment again where a logit is infinite or NaN: what has no mass counts nothing, however far it is."""
    largest, top, _, _ = joined
    offset = largest if OWN else tl.load(row_ptr + top) - tl.load(other_ptr + top)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    moment = tl.zeros([LANES * 4], row_ptr.dtype.element_ty)
    for i in range(tiles):
        cols = start + i * (LANES * 4) + tl.arange(0, LANES * 4)
        z = tl.load(row_ptr + cols, mask=cols < stop, other=float("-inf"))
        other = tl.zeros_like(z) if OWN else tl.load(other_ptr + cols, mask=cols < stop, other=0.0)
        e = _exp(z - base)
        # a NaN has e == NaN and counts
        moment += tl.where((e == 0) | (cols == top), 0.0, e * ((z - other) - offset))
    return tl.sum(moment, 0)


@triton.jit
def _fresh(z_ptr, start, LANES: tl.constexpr):
    zero = tl.zeros([LANES], z_ptr.dtype.element_ty)
    return zero + LOWEST, tl.zeros([LANES], tl.int32) + start, zero, zero


@triton.jit
def _fold_pairs(
    state, s_ptr, t_ptrs, at, V, lacks, LACKS: tl.constexpr, TEACHERS_LACK: tl.constexpr, T: tl.constexpr,
    LANES: tl.constexpr, U: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    student, teachers, pairs, backs = state
    s = _spans(s_ptr, at, V, lacks[T], LACKS, LANES, U, MASKED)
    folded = _fold(student, s, at, LANES, U)
    new_teachers, new_pairs, new_backs = (), (), ()
    for j in tl.static_range(T):
        t = _spans(t_ptrs[j], at, V, lacks[j], TEACHERS_LACK, LANES, U, MASKED)
        new_pairs = new_pairs + (_fold_moment(pairs[j], folded, s, t, U),)
        theirs = _fold(teachers[j], t, at, LANES, U)
        new_backs = new_backs + (_fold_moment(backs[j], theirs, t, s, U),)
        new_teachers = new_teachers + (theirs[0],)
    return folded[0], new_teachers, new_pairs, new_backs


@triton.jit
def _joined_moment(joined, pair, side, row_ptr, other_ptr, start, stop, tiles, LANES: tl.constexpr):
    offset, moment = pair
    _, top, _, factor = joined
    base = tl.load(row_ptr + top) - tl.load(other_ptr + top)
    moment = tl.sum(factor * (moment + (side[2] + side[3]) * (offset - base)), 0)
    if moment - moment != 0:
        moment = _exact_moment(joined, row_ptr, other_ptr, start, stop, tiles, False, LANES)
    return moment


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _kl_stats_kernel(
    z_ptr,  # (H, R, V)
    pieces_ptr,  # (3 + 7 T, S, R): max, tail, top; of each teacher cross, moment, then its own five
    bias_ptr,  # (H, V)
    cap_ptr,  # (H,)
    temperature_ptr,  # (R,)
    bias_stride,
    R,
    V,
    stride,
    stride_head,
    student,
    heads,
    count,
    rest,
    first,
    place,  # of the first of these teachers
    LACKS: tl.constexpr,  # of the student's logits
    TEACHERS_LACK: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    TILE: tl.constexpr = U * LANES * 4
    s_ptr = z_ptr + student.to(tl.int64) * stride_head + row * stride
    start = split * count * TILE
    t_ptrs, teachers, pairs, lacks = (), (), (), ()
    zero = tl.zeros([LANES], z_ptr.dtype.element_ty)
    for j in tl.static_range(T):
        head = _head(heads, j, BITS)
        lacks = lacks + (_lacks(bias_ptr, bias_stride, cap_ptr, temperature_ptr, head, row, TEACHERS_LACK),)
        t_ptrs = t_ptrs + (_head_row(z_ptr, heads, j, row, stride_head, stride, BITS),)
        teachers = teachers + (_fresh(z_ptr, start, LANES),)
        pairs = pairs + ((zero, zero),)
    lacks = lacks + (_lacks(bias_ptr, bias_stride, cap_ptr, temperature_ptr, student, row, LACKS),)
    state = (_fresh(z_ptr, start, LANES), teachers, pairs, pairs)
    for i in range(count):
        state = _fold_pairs(
            state, s_ptr, t_ptrs, start + i * TILE, V, lacks, LACKS, TEACHERS_LACK, T, LANES, U, False
        )  # fmt: skip
    stop, tiles = start + count * TILE, count * U
    if split == S - 1:
        for i in range(rest):
            state = _fold_pairs(
                state, s_ptr, t_ptrs, start + (count + i) * TILE, V, lacks, LACKS, TEACHERS_LACK, T, LANES, U, True
            )  # fmt: skip
        stop, tiles = V, (count + rest) * U
    if LACKS or TEACHERS_LACK:
        # what another thread has completed is read below
        tl.debug_barrier()
    side, teachers, pairs, backs = state
    joined = _join(side, s_ptr, start, V, LANES, U)
    plane = S * R.to(tl.int64)
    here = pieces_ptr + split * R.to(tl.int64) + row
    tl.store(here, joined[0])
    tl.store(here + plane, joined[2])
    tl.store(here + 2 * plane, _as_number(joined[1] + first, pieces_ptr))
    for j in tl.static_range(T):
        each = here + (3 + 7 * (place + j)) * plane
        moment = _joined_moment(joined, pairs[j], side, s_ptr, t_ptrs[j], start, stop, tiles, LANES)
        theirs = _join(teachers[j], t_ptrs[j], start, V, LANES, U)
        back = _joined_moment(theirs, backs[j], teachers[j], t_ptrs[j], s_ptr, start, stop, tiles, LANES)
        tl.store(each, tl.load(t_ptrs[j] + joined[1]))
        tl.store(each + plane, moment)
        tl.store(each + 2 * plane, theirs[0])
        tl.store(each + 3 * plane, theirs[2])
        tl.store(each + 4 * plane, _as_number(theirs[1] + first, pieces_ptr))
        tl.store(each + 5 * plane, tl.load(s_ptr + theirs[1]))
        tl.store(each + 6 * plane, back)


@triton.jit
def _fold_own(
    state, row_ptr, at, V, lack, LACKS: tl.constexpr, LANES: tl.constexpr, U: tl.constexpr, MASKED: tl.constexpr
):
    """Adds a tile to every lane's side and its moment of z itself."""
    side, moment = state
    z = _spans(row_ptr, at, V, lack, LACKS, LANES, U, MASKED)
    new, e, scale, whole, _ = _fold(side, z, at, LANES, U)
    terms = e[0] * (z[0] - new[0][:, None])
    for u in tl.static_range(1, U):
        terms += e[u] * (z[u] - new[0][:, None])
    return new, scale * (moment + whole * (side[0] - new[0])) + tl.sum(terms, 1)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=SLICES)
def _logprob_stats_kernel(
    z_ptr,  # (R, V)
    pieces_ptr,  # (5, S, R): max, tail, top, the logit of the row's token or -inf, moment
    token_ptr,  # (R,) int64
    bias_ptr,  # (1, V)
    cap_ptr,  # (1,)
    temperature_ptr,  # (R,)
    R,
    V,
    stride,
    count,
    rest,
    first,
    LACKS: tl.constexpr,
    LANES: tl.constexpr,
    U: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    S = tl.num_programs(1)
    TILE: tl.constexpr = U * LANES * 4
    row_ptr = z_ptr + row * stride
    lack = _lacks(bias_ptr, 0, cap_ptr, temperature_ptr, 0, row, LACKS)
    start = split * count * TILE
    state = (_fresh(z_ptr, start, LANES), tl.zeros([LANES], z_ptr.dtype.element_ty))
    for i in range(count):
        state = _fold_own(state, row_ptr, start + i * TILE, V, lack, LACKS, LANES, U, False)
    stop, tiles = start + count * TILE, count * U
    if split == S - 1:
        for i in range(rest):
            state = _fold_own(state, row_ptr, start + (count + i) * TILE, V, lack, LACKS, LANES, U, True)
        stop, tiles = V, (count + rest) * U
    if LACKS:
        # what another thread has completed is read below
        tl.debug_barrier()
    side, lanes = state
    joined = _join(side, row_ptr, start, V, LANES, U)
    largest, top, tail, factor = joined
    moment = tl.sum(factor * (lanes + (side[2] + side[3]) * (side[0] - largest)), 0)
    if moment - moment != 0:
        moment = _exact_moment(joined, row_ptr, row_ptr, start, stop, tiles, True, LANES)
    plane = S * R.to(tl.int64)
    here = pieces_ptr + split * R.to(tl.int64) + row
    token = tl.load(token_ptr + row) - first
    mine = (token >= start) & (token < tl.minimum(stop, V))
    tl.store(here, largest)
    tl.store(here + plane, tail)
    tl.store(here + 2 * plane, _as_number(top + first, pieces_ptr))
    tl.store(here + 3 * plane, tl.load(row_ptr + tl.where(mine, token, 0), mask=mine, other=float("-inf")))
    tl.store(here + 4 * plane, moment)
