"""What Triton kernels do to a raw logit, in whatever sweep reads it first or in a pass of its own: see `raw.py`.

LACKS says what of it, the sum of `raw.BIAS`, `raw.CAP` and `raw.TEMPERATURE`; 0 of complete logits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp(x), in fp32 by two instructions: its relative error grows with |x|, but what has mass is near 0."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * LOG2E)


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0: its Taylor series there, by Horner's rule."""
    if x.dtype == tl.float64:
        series = x * (1 / 87178291200) + 1 / 6227020800
        series = ((series * x + 1 / 479001600) * x + 1 / 39916800) * x + 1 / 3628800
        series = ((series * x + 1 / 362880) * x + 1 / 40320) * x + 1 / 5040
        series = series * x + 1 / 720
    else:
        series = x * (1 / 5040) + 1 / 720
    series = (((series * x + 1 / 120) * x + 1 / 24) * x + 1 / 6) * x + 0.5
    return tl.where(x > -0.25, series * x * x + x, _exp(x) - 1)


@triton.jit
def _soft_capped(z, cap):
    """cap tanh(z / cap), precise near 0 too."""
    x = z / cap
    less = _expm1(-2 * tl.abs(x))
    t = cap * (less / (2 + less))
    return tl.where(x > 0, -t, t)


@triton.jit
def _lacks(bias_ptr, bias_stride, cap_ptr, temperature_ptr, head, row, LACKS: tl.constexpr):
    """What a row of a head lacks: where its bias is, its softcap and its temperature."""
    cap, temperature = 0.0, 1.0
    if LACKS & 2:
        cap = tl.load(cap_ptr + head)
    if LACKS & 4:
        temperature = tl.load(temperature_ptr + row)
    return bias_ptr + head * bias_stride, cap, temperature


@triton.jit
def _completed(z, cols, V, lack, LACKS: tl.constexpr, MASKED: tl.constexpr):
    """What stands beyond V is no logit, and whoever needs it there masks it."""
    bias_ptr, cap, temperature = lack
    if LACKS & 1:
        if MASKED:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)
        else:
            z += tl.load(bias_ptr + cols)
    if LACKS & 2:
        # beside a head that has one, another may have none
        z = tl.where(cap > 0, _soft_capped(z, tl.where(cap > 0, cap, 1.0)), z)
    if LACKS & 4:
        z = z / temperature
    return z


@triton.jit(do_not_specialize_on_alignment=("temperature_ptr",))
def _complete_kernel(
    z_ptr,  # (R, V)
    bias_ptr,  # (V,)
    cap_ptr,  # (1,)
    temperature_ptr,  # (R,)
    V,
    stride,
    LACKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + row * stride
    lack = _lacks(bias_ptr, 0, cap_ptr, temperature_ptr, 0, row, LACKS)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    if start + BLOCK <= V:
        tl.store(row_ptr + cols, _completed(tl.load(row_ptr + cols), cols, V, lack, LACKS, False))
    else:
        inside = cols < V
        z = tl.load(row_ptr + cols, mask=inside, other=0.0)
        tl.store(row_ptr + cols, _completed(z, cols, V, lack, LACKS, True), mask=inside)
