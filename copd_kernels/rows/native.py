"""Rows compiled from `csrc/`, C++ on a CPU and CUDA on a GPU: takes tensors apart; the mathematics is in rows.h."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C  # type: ignore[attr-defined]  # compiled
from .raw import COMPLETE, Raw
from .stats import Side
from .torch import overlap

# in the order of rows.h
DIVERGENCES = ("reverse", "forward", "symmetric", "jsd")


def logprob(z: Tensor, tokens: Tensor | None = None, out: Side | None = None, raw: Raw = COMPLETE) -> Side:
    _, R, V = z.shape
    if out is None:
        out = Side(*(torch.empty(R, dtype=torch.int64 if i == 1 else z.dtype, device=z.device) for i in range(5)))
    side = [x.data_ptr() for x in (out.max, out.tail, out.moment)]
    with torch.cuda.device_of(z):
        _C.logprob(
            z.data_ptr(), name(z), R, V, side, out.top.data_ptr(), 0, [], *gradient(z, None, None)[:3], *place(z),
            *gaps(z), raw=lacks(raw, [0]),
        )  # fmt: skip
    if tokens is None:
        out.cross.zero_()
    else:
        torch.gather(z[0], 1, tokens.unsqueeze(1), out=out.cross.unsqueeze(1))
    return out


def logprob_grad(
    z: Tensor,
    side: Side,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    cap: float | Tensor | None,
    dlogits: Tensor,
    raw: Raw = COMPLETE,
) -> None:
    _, R, V = z.shape
    numbers = [x.contiguous() for x in (side.max, side.tail, side.moment, dlogp, dentropy, dlse)]
    top, tokens = side.top.contiguous(), tokens.contiguous()
    *gradients, caps = gradient(z, cap, dlogits)
    addresses = [x.data_ptr() for x in numbers]
    with torch.cuda.device_of(z):
        _C.logprob(
            z.data_ptr(),
            name(z),
            R,
            V,
            addresses[:3],
            top.data_ptr(),
            tokens.data_ptr(),
            addresses[3:],
            *gradients,
            *place(z),
            *gaps(z, dlogits),
            caps=caps,
            raw=lacks(raw, [0]),
        )


def kl(
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    beta: float,
    weight: Tensor | None = None,
    cap: float | Tensor | None = None,
    dlogits: Tensor | None = None,
    out: Tensor | None = None,
    raw: Raw = COMPLETE,
) -> Tensor:
    value = z.new_empty(len(teachers), z.shape[1]) if out is None else out
    number, address, kind, caps = gradient(z, cap, dlogits)
    with torch.cuda.device_of(z):
        _C.kl(
            z.data_ptr(),
            name(z),
            *z.shape,
            student,
            teachers,
            DIVERGENCES.index(divergence),
            beta,
            0 if weight is None else weight.data_ptr(),
            number,
            address,
            kind,
            value.data_ptr(),
            *place(z),
            *(x.stride(0) if x is not None and len(teachers) > 1 else 0 for x in (weight, value)),
            *gaps(z, dlogits),
            caps=caps,
            raw=lacks(raw, [student, *teachers]),
        )
    return value


def agreement(
    z: Tensor, student: int, teachers: list[int], k: int, raw: Raw = COMPLETE
) -> tuple[Tensor, Tensor, Tensor]:
    if z.is_cuda:
        divergences = "forward", "reverse"
        forward, reverse = (kl(z, student, teachers, divergence, 0.5, raw=raw) for divergence in divergences)
        return overlap(z, student, teachers, k), forward, reverse
    common, forward, reverse = (z.new_empty(len(teachers), z.shape[1]) for _ in range(3))
    addresses = (x.data_ptr() for x in (common, forward, reverse))
    threads = torch.get_num_threads()
    its = lacks(raw, [student, *teachers])
    _C.agreement(z.data_ptr(), name(z), *z.shape, student, teachers, k, *addresses, threads, *gaps(z), raw=its)
    return common, forward, reverse


def complete(z: Tensor, bias: Tensor | None, cap: float, temperature: Tensor | None) -> None:
    raw = Raw(z.shape[1], None if bias is None else bias.unsqueeze(0), [cap], temperature, {0})
    with torch.cuda.device_of(z):
        _C.complete(z.data_ptr(), name(z), *z.shape, *place(z), *gaps(z.unsqueeze(0)), raw=lacks(raw, [0]))


def lacks(raw: Raw, heads: list[int]) -> tuple[list[int], int, int, list[float], int]:
    """What those of the heads lack that are raw yet, which csrc/ now completes."""
    bias, temperature = (0 if x is None else x.data_ptr() for x in (raw.bias, raw.temperature))
    return raw.take(heads), bias, raw.stride, raw.caps, temperature


def gradient(z: Tensor, cap: float | Tensor | None, dlogits: Tensor | None) -> tuple[float, int, str, int]:
    """The softcap of all rows, where dlogits are and their type, and where the rows' own softcaps are."""
    if dlogits is None:
        return 0.0, 0, name(z), 0
    if isinstance(cap, Tensor):
        return 0.0, dlogits.data_ptr(), name(dlogits), cap.data_ptr()
    return cap or 0.0, dlogits.data_ptr(), name(dlogits), 0


def gaps(z: Tensor, dlogits: Tensor | None = None) -> list[int]:
    """From row to row, of the logits and of dlogits; nothing where rows follow one another."""
    V = z.shape[-1]
    strides = [z.stride(1), V if dlogits is None else dlogits.stride(0)]
    return [] if strides == [V, V] else strides[: 1 if dlogits is None else 2]


def name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def place(z: Tensor) -> tuple[bool, int]:
    """Where to run: (False, CPU threads) or (True, the CUDA stream)."""
    if z.is_cuda:
        return True, torch.cuda.current_stream(z.device).cuda_stream
    return False, torch.get_num_threads()
