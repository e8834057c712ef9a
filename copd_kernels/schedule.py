"""The chunk loop every op shares: project a chunk of tokens, reduce its rows, project back.

    logits  = hidden[chunk] @ lm_head.T         (R, V) fp32, one GEMM pass a head
    results = rows(logits)                      (R,) each; the only backend-specific step, see `rows/`
    dhidden[chunk] = dlogits @ lm_head          (R, D), one GEMM pass
    dlm_head      += dlogits.T @ hidden[chunk]  (V, D), one GEMM pass

What exists at any time is one chunk: its height R follows from `workspace_bytes` and the device, never from N. The
vocabulary is not taken in pieces, because a row's normaliser must be known before its gradient, and a second sweep
would cost a GEMM pass a head.

Logits, dhidden, dlm_head and all sums are kept in fp32 (fp64 if any input is fp64). The operands of the GEMMs stay in
the model's dtype where 16-bit operands can be multiplied into fp32: on CUDA by cuBLAS, dlogits in 16 bits too, and on
CPUs with AMX by `gemm`. Elsewhere they are widened a few vocabulary rows at a time. On a CPU dlogits are fp32 and
overwrite the student's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import gemm
from .pages import in_huge_pages
from .rows.raw import Raw
from .shard import Shard

MIB = 1 << 20
WORKSPACE_BYTES = {"cpu": 256 * MIB, "cuda": 3072 * MIB}
# on a CPU the first touch of fresh memory costs as much as the rows' work on it, and glibc maps blocks above this size
# afresh each time; a chunk within it is tall enough for GEMMs from 128 tokens, and a larger one is no taller than 256
ENOUGH_BYTES, ENOUGH_TOKENS = 32 * MIB, (128, 256)
# on a CPU the first touch of a kept logit costs as much as making it again from this many numbers, or nearly; from this
# many where `gemm` multiplies them
KEEP_FROM_D, KEEP_FROM_D_IN_16_BITS = 64, 512
# widened rows of lm_head: enough to keep the GEMM efficient, little beside the workspace
TILE_BYTES = 8 * MIB
# 16-bit dlogits are made from weights of at most one, times this: fp16 then resolves 2**-26, a thousandth of the
# gradient at KL 1e-3 and V = 60,000, and reaches 16,376: what a teacher asks for that masks a word with fp16's lowest
# number where the student has half of its mass. Beyond it is infinite, which a GradScaler sees
HEADROOM = {torch.float16: 4.0}
# a GPU's rows of logits start at multiples of so many numbers, whatever V is: cuBLAS and the rows then read 16 bytes at
# once. What lies between V and the next row is never written, and nothing reads it
ALIGNED = {"cuda": 16}


@dataclass(frozen=True)
class Projection:
    """A head as the schedule reads it: logits z = cap * tanh(alpha * (hidden @ lm_head.T + bias) / cap).

    Temperature T is folded in: alpha = scale / T and cap = softcap / T give the logits over T.
    """

    hidden: Tensor  # (N, D)
    lm_head: Tensor  # (V, D), padding rows cut off
    bias: Tensor | None  # (V,)
    alpha: float
    cap: float | None
    operand: torch.dtype  # of the GEMMs
    columns: int  # of a row of logits: V, but where ranks share a vocabulary the largest share

    @property
    def N(self) -> int:
        return self.hidden.shape[0]

    @property
    def V(self) -> int:
        return self.lm_head.shape[0]

    def read(self, chunk: slice) -> Tensor:
        """(R, D): the chunk's hidden states as the GEMMs read them."""
        return self.hidden[chunk].to(self.operand)

    def project(self, hidden: Tensor, out: Tensor) -> None:
        """out (R, columns) = alpha * hidden @ lm_head.T, raw logits; what they lack is a `Raw`."""
        for v, weight in self.tiles():
            addmm(out[:, v], hidden, weight.T, alpha=self.alpha)
        if self.columns > self.V:
            out[:, self.V :] = -torch.inf

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """lm_head in the operands' dtype: as it is, or widened a few rows at a time."""
        if self.lm_head.dtype == self.operand:
            yield slice(0, self.V), self.lm_head
            return
        step = max(1, TILE_BYTES // (self.lm_head.shape[1] * self.operand.itemsize))
        for start in range(0, max(1, self.V), step):
            v = slice(start, min(start + step, self.V))
            yield v, self.lm_head[v].to(self.operand)


def lacking(heads: Sequence[Projection], like: Tensor) -> Raw:
    """What the logits of these heads lack when they are made, in the dtype and on the device of `like`."""
    V, bias = heads[0].V, None
    if any(head.bias is not None for head in heads):
        bias = like.new_zeros(len(heads), row_stride(V, like.device))[:, :V]
        for head, row in zip(heads, bias, strict=True):
            if head.bias is not None:
                row.copy_(head.bias).mul_(head.alpha)
    return Raw(V, bias, [head.cap or 0.0 for head in heads])


def operand_dtype(hidden: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """cuBLAS and `gemm` multiply 16-bit operands into fp32; torch's CPU GEMMs round, so theirs are widened."""
    able = logits_dtype == torch.float32 and multiplies(hidden.dtype, hidden.device)
    return hidden.dtype if able else logits_dtype


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether 16-bit operands of this dtype can be multiplied into fp32."""
    able = device.type == "cuda" or (device.type == "cpu" and gemm.available())
    return able and dtype in (torch.float16, torch.bfloat16)


def dlogits_dtype(operand: torch.dtype, like: Tensor) -> torch.dtype | None:
    """cuBLAS reads both operands in one dtype; None where dlogits are as wide as logits and may take their place."""
    return operand if operand != like.dtype and like.is_cuda else None


def addmm(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, accumulate: bool = False) -> None:
    """out = alpha * a @ b, or += ; summed and kept in `out`'s dtype, which may be wider than the operands'."""
    beta = int(accumulate)
    if a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif not out.is_cuda:
        gemm.addmm(out, a, b, alpha, accumulate)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)


class Gradients:
    """fp32 (or fp64) sums of one head's dhidden, dlm_head and dbias, each divided by `unit`.

    `unit` carries what is common to every token (the power of two that brings the largest weight to one, alpha,
    `HEADROOM`), so dlogits keep their precision in 16 bits however small the weights are. Those not wanted stay empty.
    """

    def __init__(
        self,
        head: Projection,
        padded: int,
        want: list[bool],
        weight: Tensor,
    ) -> None:
        N, D = head.hidden.shape
        kind: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.head, self.want = head, want
        self.dhidden = in_huge_pages(torch.empty((N, D) if want[0] else 0, **kind)).zero_()
        self.dlm_head = in_huge_pages(torch.empty((padded, D) if want[1] else 0, **kind))
        self.dbias = torch.zeros(padded if want[2] else 0, **kind)
        self.started = False
        # a token without weight has dlogits of 0: its hidden state must be 0 too, for what it holds may be NaN
        self.counts = (weight != 0).any(0) if weight.dim() > 1 else weight != 0
        self.zero, self.memory = torch.zeros((), dtype=head.operand, device=weight.device), dict[str, Tensor]()
        if want[1]:
            self.dlm_head[head.V :].zero_()
        narrow = self.dlogits_dtype = dlogits_dtype(head.operand, weight)
        headroom = 1.0 if narrow is None else HEADROOM.get(narrow, 1.0)
        power = power_of_two(weight)
        self.factor = headroom / power  # of the weights
        self.unit = power * (head.alpha / headroom)

    def add(self, dlogits: Tensor, hidden: Tensor, chunk: slice) -> None:
        """Projects a chunk's (R, columns) dlogits back."""
        head = self.head
        dlogits = dlogits[:, : head.V]
        if self.want[0]:
            for v, weight in head.tiles():
                addmm(self.dhidden[chunk], dlogits[:, v], weight, accumulate=v.start > 0)
        if self.want[1]:
            counted = self.room("hidden", hidden)
            torch.where(self.counts[chunk].unsqueeze(1), hidden, self.zero, out=counted)
            addmm(self.dlm_head[: head.V], dlogits.T, counted, accumulate=self.started)
        if self.want[2]:
            column = self.room("bias", self.dbias[: head.V])
            self.dbias[: head.V].add_(torch.sum(dlogits, 0, dtype=column.dtype, out=column))
        self.started = True

    def room(self, name: str, like: Tensor) -> Tensor:
        """Memory for one chunk of `like`, taken once; again where a later part of routed tokens is larger."""
        if name not in self.memory or len(self.memory[name]) < len(like):
            self.memory[name] = torch.empty_like(like, memory_format=torch.contiguous_format)
        return self.memory[name][: len(like)]

    def tensors(self, shard: str) -> tuple[Tensor, Tensor, Tensor]:
        if self.want[1] and not self.started:
            self.dlm_head.zero_()
        return Shard.read(shard).add_up(self.dhidden), self.dlm_head, self.dbias


def power_of_two(weight: Tensor) -> Tensor:
    """(): the power of two just above the largest |weight|, without reading it on the host; 1 if there is none."""
    if weight.numel() == 0:
        return weight.new_ones(())
    largest = weight.abs().amax()
    largest = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1)
    # 2**±100: its inverse and what it scales stay finite in fp32
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), exponent)


class Workspace:
    """The one large buffer: a chunk's logits of H heads, and its dlogits where they cannot overwrite the student's.

    `kept`, one head's logits of all tokens (N, V), takes the place of the chunk's unless it is empty; where dlogits may
    overwrite them no other memory is needed, and the chunk is all tokens.
    """

    def __init__(
        self,
        N: int,
        heads: int,
        V: int,
        like: Tensor,
        workspace_bytes: int,
        dlogits_dtype: torch.dtype | None = None,
        kept: Tensor | None = None,
    ) -> None:
        dtype, device = like.dtype, like.device
        separate = dlogits_dtype.itemsize if dlogits_dtype else 0
        stride = row_stride(V, device)
        row_bytes = stride * (heads * dtype.itemsize + separate)
        self.heads, self.V, self.stride = heads, V, stride
        self.kept = kept if kept is not None and kept.numel() else None
        most = budget(workspace_bytes, device) // row_bytes
        if device.type == "cpu":
            within = ENOUGH_BYTES // row_bytes
            most = min(most, within if within >= ENOUGH_TOKENS[0] else ENOUGH_TOKENS[1])
        if self.kept is not None and not separate:
            most = N
        self.chunks = chunks(N, most)
        R = self.height = max((c.stop - c.start for c in self.chunks), default=0)
        self.z = in_huge_pages(torch.empty(heads * R * stride if self.kept is None else 0, dtype=dtype, device=device))
        self.separate = None
        if dlogits_dtype:
            self.separate = in_huge_pages(torch.empty(R * stride, dtype=dlogits_dtype, device=device))

    def chunks_of(self, N: int) -> list[slice]:
        """Of fewer tokens, in the same memory."""
        return chunks(N, self.height)

    def logits(self, chunk: slice) -> Tensor:
        """(H, R, V)"""
        if self.kept is not None:
            return self.kept[chunk].unsqueeze(0)
        R = chunk.stop - chunk.start
        return self.z[: self.heads * R * self.stride].view(self.heads, R, self.stride)[..., : self.V]

    def dlogits(self, chunk: slice, dtype: torch.dtype | None = None) -> Tensor:
        """(R, V): its own memory, or the first head's logits or those kept; read as `dtype`, where that is narrower."""
        if self.kept is not None and self.separate is None:
            return self.kept[chunk]
        R = chunk.stop - chunk.start
        own = self.z if self.separate is None else self.separate
        return (own if dtype is None else own.view(dtype))[: R * self.stride].view(R, self.stride)[:, : self.V]


def row_stride(V: int, device: torch.device) -> int:
    """From one row of V logits to the next."""
    step = ALIGNED.get(device.type, 1)
    return -(-V // step) * step


def keeps_logits(D: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether logits kept for backward cost less than the GEMM pass that makes them again."""
    enough = KEEP_FROM_D_IN_16_BITS if multiplies(dtype, device) else KEEP_FROM_D
    return device.type != "cpu" or enough <= D


def empty_logits(hidden: Tensor, V: int, dtype: torch.dtype, workspace_bytes: int, recompute: bool) -> Tensor:
    """(N, V) to keep one head's logits in, if they fit one workspace and are not to be made again; else (0, V)."""
    N = hidden.shape[0]
    stride = row_stride(V, hidden.device)
    fit = not recompute and N * stride * dtype.itemsize <= budget(workspace_bytes, hidden.device)
    return hidden.new_empty(N if fit else 0, stride, dtype=dtype)[:, :V]


def budget(workspace_bytes: int, device: torch.device) -> int:
    return workspace_bytes or WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def chunks(N: int, most: int) -> list[slice]:
    """Equal slices of at most `most` of N tokens, or of two; a multiple of 128 tokens where that is possible."""
    if N == 0:
        return []
    # BLAS sums a single row less precisely than the rows of a matrix
    most = max(2, min(N, most))
    step = -(-N // -(-N // most))
    if most >= 128:
        step = min(-(-step // 128) * 128, most - most % 128)
    return [slice(i, min(i + step, N)) for i in range(0, N, step)]
