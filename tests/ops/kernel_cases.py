"""Inputs and the one tolerance rule of the kernel tests."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from copd_kernels import Head
from copd_kernels.rows import BACKENDS

DIVERGENCES = ("reverse", "forward", "jsd", "symmetric")
RUNS = [
    *(pytest.param(backend, "cpu", id=f"{backend}-cpu") for backend in BACKENDS),
    *(pytest.param(backend, "cuda", id=f"{backend}-cuda", marks=pytest.mark.gpu) for backend in BACKENDS),
]


def each(*options):
    """Every run with every combination of options; Triton's interpreter, which is slow, with every option once."""
    some = [tuple(values[i % len(values)] for values in options) for i in range(max(map(len, options)))]
    for run in RUNS:
        for chosen in some if run.values == ("triton", "cpu") else itertools.product(*options):
            name = "-".join(str(x) for x in (run.id, *chosen))
            yield pytest.param(*run.values, *chosen, id=name, marks=run.marks)


# one token; one exact tile; everything ragged and mutually prime; V one past and one short of a tile, and of a
# power of two; huge V with tiny N, and the reverse
SHAPES = {
    "one-token": (1, 16, 64),
    "exact": (128, 32, 256),
    "ragged": (37, 19, 211),
    "past-a-tile": (5, 16, 4097),
    "short-of-a-tile": (5, 16, 4095),
    "wide": (2, 8, 20011),
    "tall": (67, 8, 17),
}
# two heads of the ragged shape do not fit: several chunks, the last one shorter
SMALL_WORKSPACE = 30_000


def make(N, D, V, dtype=torch.float32, device="cpu", *, spread=3.0, like=None, noise=0.0, padding=0, **fields) -> Head:
    """A head inside NaN-filled buffers, so that a stray load is seen; `like` and `noise` make it close to another."""
    if like is None:
        hidden = torch.randn(N, D, dtype=torch.float64)
        lm_head = torch.randn(V + padding, D, dtype=torch.float64) * spread / D**0.5
    else:
        hidden, lm_head = like.hidden.detach().cpu().double(), like.lm_head.detach().cpu().double()
        hidden = hidden + noise * torch.randn_like(hidden)
    if padding:
        lm_head[V:] = torch.nan
        fields["vocab_size"] = V
    tensors = [surrounded(x.to(device=device, dtype=dtype)).requires_grad_() for x in (hidden, lm_head)]
    return Head(*tensors, **fields)


def surrounded(x: Tensor) -> Tensor:
    buffer = torch.full((x.shape[0] + 2, x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    buffer[1:-1] = x
    return buffer[1:-1].detach()


def cast(head: Head, dtype: torch.dtype, device="cpu") -> Head:
    """The same numbers in another dtype, as new leaves."""
    tensors = {
        name: getattr(head, name).detach().to(device=device, dtype=dtype).requires_grad_()
        for name in ("hidden", "lm_head", "bias")
        if getattr(head, name) is not None
    }
    return dataclasses.replace(head, **tensors)


def gradients(value: Tensor, head: Head, upstream: Tensor | None = None, last: bool = False) -> dict[str, Tensor]:
    """With `last` the graph is freed, and what it saved may be written over."""
    wrt = {"dhidden": head.hidden, "dlm_head": head.lm_head}
    if head.bias is not None:
        wrt["dbias"] = head.bias
    grads = torch.autograd.grad(value, list(wrt.values()), upstream, retain_graph=not last)
    return {name: cut(name, g, head) for name, g in zip(wrt, grads, strict=True)}


def cut(name: str, gradient: Tensor, head: Head) -> Tensor:
    return gradient if name == "dhidden" else gradient[: head.V]


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error against float64."""
    want = want.detach().double().cpu()
    return float((got.detach().double().cpu() - want).norm() / want.norm().clamp(min=1e-300))


# what rounding the result to the dtype costs, with room for a handful of additions
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def assert_as_good_as_torch(name: str, ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Error of ours <= 2 x error of eager PyTorch in the same dtype + a stated floor, against float64."""
    error, allowed = relative(ours, exact), 2 * relative(eager, exact) + FLOOR[dtype]
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
