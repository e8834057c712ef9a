"""What happens to a chunk of logits between the GEMMs: the only backend-specific code.

A backend has five functions, which `load` gives for one operator: `torch` runs anywhere, `triton` on GPUs, `native` is
compiled from csrc/ for CPUs and GPUs. z is (H, R, V) fp32 or fp64: the chunk's logits of every head, which are
complete, or lack what `raw` says (bias, softcap, a token's temperature) until one of these has read them; rows are
contiguous, and may have a gap between them. Per-token results are (R,) or (T, R) in z's dtype.

    complete(z, bias, cap, temperature) -> None, one head's raw (R, V), as `raw.py` says
    logprob(z, tokens=None, out=None, raw=COMPLETE) -> Side, each row's statistics beside no other, its token's logit as
        `cross`; `stats` makes log-probability, entropy and lse of them
    logprob_grad(z, side, tokens, dlogp, dentropy, dlse, cap, dlogits, raw=COMPLETE) -> None
    kl(z, student, teachers, divergence, beta, weight=None, cap=None, dlogits=None, out=None, raw=COMPLETE) -> (T, R)
    agreement(z, student, teachers, k, raw=COMPLETE) -> overlap of the k largest, forward and reverse KL, (T, R) each

`student` and `teachers` index the heads. `dlogits` (R, V), in the dtype the GEMM reads, receives the gradient with
respect to hidden @ lm_head.T + bias over alpha; it may be the student's own logits, which are then overwritten.
`weight` (T, R) multiplies each divergence's gradient, never its value. `cap` is the student's softcap over temperature,
a number or (R,). Results are in the memory of `out`, where it is given; its rows and those of `weight` may be apart,
the numbers of a row follow one another.

A row with a NaN, an infinite logit or no mass at all is no distribution: every number made from it is NaN, and so is
its gradient, on both sides. A row whose weights (or upstream gradients) are all 0 has a gradient of exactly 0, and a
teacher of weight 0 adds exactly nothing, whatever their logits are. What exceeds fp16 in `dlogits` becomes infinite.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import device as Device
from torch.compiler import assume_constant_result
from torch.cuda import get_device_capability

from ..checks import check_option

BACKENDS = ("torch", "triton", "native")
# what `backend=None` takes, the first that is available; native rows on CUDA wait for a measurement against Triton's
DEFAULTS = {"cuda": ("triton", "torch"), "cpu": ("native", "torch")}
# the Triton kernels are told a student's teachers in one 64-bit integer, a head number each
HEAD_BITS = 5
MAX_HEADS = {"triton": 1 << HEAD_BITS}
MAX_TEACHERS = {"triton": 12, "native": 16}

# those that can pause between statistics and gradient, while ranks that share a vocabulary exchange them
STAGED = ("torch", "triton")


def resolve(
    op: str, backend: str | None, device: Device, split: bool = False, heads: int = 1, teachers: int = 0
) -> str:
    """The backend's name: the argument, COPD_BACKEND, or the fastest this machine has for the device and the heads.

    `teachers` are those of the student that has most.
    """
    name = backend or os.environ.get("COPD_BACKEND")
    if name:
        check_option(op, "backend", name, (*BACKENDS, "reference"))
        reason = missing(name, device)
        if reason:
            raise RuntimeError(f"{op}: backend {name!r} is not available here: {reason}")
        if split and name not in STAGED:
            rule = f"be one of {', '.join(STAGED)} for a vocabulary split over ranks; got {name!r}"
            raise NotImplementedError(f"{op}: backend must {rule}")
        broken = crowded(name, device, heads, teachers)
        if broken:
            raise NotImplementedError(f"{op}: {broken} for backend {name!r}; use backend='torch'")
        return name
    names = [name for name in DEFAULTS.get(device.type, ("torch",)) if name in STAGED or not split]
    return next(
        name for name in names if missing(name, device) is None and crowded(name, device, heads, teachers) is None
    )


def crowded(name: str, device: Device, heads: int, teachers: int) -> str | None:
    """The rule that so many heads, or teachers of one student, break; None if the backend's kernels take them."""
    if name == "native" and device.type == "cpu":
        return None
    for what, count, limits in (("heads", heads, MAX_HEADS), ("teachers", teachers, MAX_TEACHERS)):
        if count > limits.get(name, count):
            return f"{what} must number at most {limits[name]}; got {count}"
    return None


# a machine does not change while torch.compile traces
@assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def missing(name: str, device: Device) -> str | None:
    """Why a backend cannot run on this device, with what would change that; None if it can."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run `pip install triton`"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"{device.type} tensors need Triton's interpreter; set TRITON_INTERPRET=1, or use backend='torch'"
    if name == "native":
        if native_failure():
            return native_failure()
        if device.type == "cuda":
            return native_cuda_missing(device)
        if device.type != "cpu":
            return f"it has no part for {device.type}; use backend='torch'"
    return None


@functools.cache
def native_failure() -> str | None:
    """Why the compiled library does not load; None if it does."""
    try:
        importlib.import_module(".._C", __package__)
    except ModuleNotFoundError:
        others = sorted(path.name for path in Path(__file__).parent.parent.glob("_C.*"))
        found = f"only for another Python ({others[0]})" if others else "not at all"
        return f"csrc/ is built {found}; run `pip install -e .` with a C++ compiler"
    except ImportError as error:
        return f"copd_kernels._C does not load ({error}); run `pip install -e .`"
    return None


def native_cuda_missing(device: Device) -> str | None:
    from .. import _C  # type: ignore[attr-defined]  # compiled

    if not _C.has_cuda:
        return "csrc/ is built without its CUDA part; run `COPD_CUDA=1 pip install -e .` with nvcc"
    built, driver = _C.cuda_versions()
    if driver < built - built % 1000:  # versions of one major run on each other's drivers
        had, has = (f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver))
        fix = "build it with that driver's nvcc, update the driver, or use backend='triton'"
        return f"csrc/ is built with CUDA {had}, and this machine's driver goes up to CUDA {has}; {fix}"
    major, minor = get_device_capability(device)
    # binaries run on later minor versions; the sm_90a part on 9.0 alone
    if major == 8 or (major, minor) == (9, 0) or major == 10:
        return None
    return f"csrc/ has no code for sm_{major}{minor}, only for sm_80, sm_90a and sm_100; use backend='triton'"


def load(name: str, shard: str = "") -> Any:
    """The backend's functions, for one operator; for a `Shard.text`, those for rows that ranks share."""
    rows = importlib.import_module(f".{name}", __package__)
    if name == "triton":
        return rows.Rows(shard)
    return importlib.import_module(".split", __package__).Rows(shard) if shard else rows
