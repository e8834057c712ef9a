"""What happens to a chunk of logits between the GEMMs: the only backend-specific code.

A backend is a module with four functions. z is (H, R, V) fp32 or fp64: the chunk's finished logits of every head
(temperature, bias and softcap applied), contiguous. Per-token results are (R,) or (T, R) in z's dtype.

    logprob(z, tokens) -> logp, entropy, lse
    logprob_grad(z, tokens, dlogp, dentropy, dlse, cap, dlogits) -> None
    kl(z, student, teachers, divergence, beta, weight=None, cap=None, dlogits=None) -> (T, R)
    overlap(z, student, teachers, k) -> (T, R)

`student` and `teachers` index the heads. `dlogits` (R, V), in the dtype the GEMM reads, receives the gradient with
respect to hidden @ lm_head.T + bias over alpha; it may be the student's own logits, which are then overwritten.
`weight` (T, R) multiplies each divergence's gradient, never its value. `cap` is the student's softcap over temperature.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from copd_kernels.checks import check_option

BACKENDS = ("torch", "triton")


def resolve(op: str, backend: str | None, device: torch.device) -> str:
    """The backend's name: the argument, COPD_BACKEND, or the fastest this machine has for the device."""
    name = backend or os.environ.get("COPD_BACKEND")
    if name:
        check_option(op, "backend", name, (*BACKENDS, "reference"))
        if name == "triton":
            reason = triton_missing(device)
            if reason:
                raise RuntimeError(f"{op}: backend 'triton' is not available here: {reason}")
        return name
    return "triton" if device.type == "cuda" and triton_missing(device) is None else "torch"


def triton_missing(device: torch.device) -> str | None:
    """Why the Triton rows cannot run on this device, with what would change that; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"{device.type} tensors need Triton's interpreter; set TRITON_INTERPRET=1, or use backend='torch'"
    return None


def load(name: str) -> ModuleType:
    return importlib.import_module(f"copd_kernels.rows.{name}")
