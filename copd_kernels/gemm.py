"""GEMMs of 16-bit operands into fp32 on a CPU that has a unit for them, which torch offers on CUDA only.

A product of two bf16 numbers is exact in fp32, and an fp16 number is the sum of two of bf16, so nothing is lost beside
widened operands. Of an fp32 operand (dlogits) 16 bits are read, as two bf16 numbers: the gradient made of it is rounded
to fewer. Where `torch.backends.mkldnn.matmul.fp32_precision` is "bf16", it is rounded to one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from .rows import native_failure

NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def available() -> bool:
    """Whether this machine has AMX and csrc/ is built for it."""
    if native_failure():
        return False
    from . import _C  # type: ignore[attr-defined]  # compiled

    return bool(_C.isa() == "amx")


def addmm(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    """out (M, N) fp32, its rows contiguous, = alpha * a @ b, or +=; operands fp32, fp16 or bf16.

    Where b is fp16, an infinite number in a makes NaN.
    """
    from . import _C  # type: ignore[attr-defined]  # compiled

    a, b = dense(a), dense(b)
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]  # torch adds it at import
    _C.gemm(
        *out.shape,
        a.shape[1],
        a.data_ptr(),
        NAMES[a.dtype],
        a.stride(),
        b.data_ptr(),
        NAMES[b.dtype],
        b.stride()[::-1],
        out.data_ptr(),
        out.stride(0),
        alpha,
        accumulate,
        1 if precision == "bf16" else 2,
        torch.get_num_threads(),
    )


def dense(x: Tensor) -> Tensor:
    """x with numbers side by side along one dimension at least."""
    return x if 1 in x.stride() else x.contiguous()
