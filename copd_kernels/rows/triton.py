"""Rows in Triton: CUDA, or any device under the interpreter.

A row is split over programs and read in blocks, never held whole. Each piece leaves its statistics, one small kernel
makes whole rows of them and what the next sweep needs to know, and a second sweep writes the gradient: every logit is
read twice (three times for the JSD, whose sums need both normalisers), every dlogit written once. No atomics: the order
of every sum is fixed. Ranks that share a vocabulary exchange pieces, so that theirs are simply more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from ..shard import Shard
from . import HEAD_BITS
from .complete import _complete_kernel
from .finish import _jsd_finish_kernel, _kl_finish_kernel, _logprob_finish_kernel
from .kernels import (
    _jsd_sums_kernel,
    _kl_grad_kernel,
    _logprob_grad_kernel,
    _overlap_kernel,
)
from .lanes import _kl_stats_kernel, _logprob_stats_kernel
from .raw import COMPLETE, Raw
from .split import shared_overlap
from .stats import Side

F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(f: F) -> F:
    """Runs f with z's GPU current: Triton launches on the current device and stream, wherever the tensors are."""

    @functools.wraps(f)
    def run(self: Rows, z: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(z):
            return f(self, z, *arguments, **options)

    return cast(F, run)


NUM_WARPS = 8
# one lane of the statistics a thread; it reads two groups of four columns a tile
LANES, SPANS = 32 * NUM_WARPS, 2
# columns of a tile elsewhere: 8 fp32 a thread and tensor, two 16-byte loads
TILE = 2048
# counting equals along a row holds more registers
COUNT_TILE = 2048
# enough programs to fill a GPU several times over
PROGRAMS = 4096
# whose raw logits one sweep completes
RAW_TEACHERS = 4
# rows that a program finishes, one a thread
FINISHED = 32


class Rows:
    """The functions of this backend for one operator: small memory is taken for its first chunk, and once."""

    def __init__(self, shard: str = "") -> None:
        self.shard = Shard.read(shard)
        self.memory: dict[object, Tensor] = {}

    @on_its_device
    def logprob(self, z: Tensor, tokens: Tensor | None = None, out: Side | None = None, raw: Raw = COMPLETE) -> Side:
        _, R, V = z.shape
        U = spans(z)
        S, *tiles = pieces(R, V, 4 * LANES * U, self.shard.columns)
        if tokens is None:
            tokens = self.constant(z, 0, R, dtype=torch.int64)
        if out is None:
            out = Side(*(torch.empty(R, dtype=torch.int64 if i == 1 else z.dtype, device=z.device) for i in range(5)))
        found = self.planes("pieces", z, 5, S)
        lacks, kind = self.of_one(z, raw)
        _logprob_stats_kernel[(R, S)](
            z, found, tokens, *lacks, R, V, z.stride(1), *tiles, self.shard.first, LACKS=kind, LANES=LANES, U=U,
            num_warps=NUM_WARPS, maxnreg=registers(z, 1),
        )  # fmt: skip
        found = self.of_all_ranks(found)
        _logprob_finish_kernel[finishers(R)](found, *out, R, found.shape[1], BLOCK=FINISHED, num_warps=1)
        return out

    @on_its_device
    def logprob_grad(
        self,
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
        BLOCK = block(z, 1)
        S, *tiles = pieces(R, V, BLOCK)
        numbers = (side.top, side.max, side.tail, side.cross, side.moment, dlogp, dentropy, dlse)
        (cap_ptr, step), (lacks, kind) = self.cap_of(z, cap), self.of_one(z, raw)
        _logprob_grad_kernel[(R, S)](
            z, dlogits, tokens.contiguous(), *(x.contiguous() for x in numbers), cap_ptr, *lacks, step,
            dlogits.stride(0), V, z.stride(1), *tiles, self.shard.first, LACKS=kind, HAS_CAP=cap is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip

    @on_its_device
    def kl(
        self,
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
        found = self.sides(z, student, teachers, raw)
        weight = None if dlogits is None else weight
        value, numbers = self.finish(z, found, divergence, beta, weight, out)
        T, R, V = len(teachers), *z.shape[1:]
        mix, place, sizes = self.mix(z, beta), placed(z, student, teachers), shape(z, T, beta)
        if divergence == "jsd":
            BLOCK = sums_block(z, T)
            S, *tiles = pieces(R, V, BLOCK, self.shard.columns)
            sums = self.planes("sums", z, 3 * T, S)
            _jsd_sums_kernel[(R, S)](z, numbers, mix, sums, *place, *tiles, BLOCK=BLOCK, **sizes)
            sums = self.of_all_ranks(sums)
            _jsd_finish_kernel[finishers(R)](
                sums, numbers, *strided(weight, value), mix, R, sums.shape[1], *strides(weight, value),
                WEIGHTED=weight is not None, T=T, BLOCK=FINISHED, num_warps=1,
            )  # fmt: skip
        if weight is not None and dlogits is not None:
            BLOCK = block(z, T)
            S, *tiles = pieces(R, V, BLOCK)
            _kl_grad_kernel[(R, S)](
                z, dlogits, numbers, mix, *self.cap_of(z, cap), dlogits.stride(0), *place, *tiles, **kind(divergence),
                HAS_CAP=cap is not None, BLOCK=BLOCK, **sizes,
            )  # fmt: skip
        return value

    def agreement(
        self, z: Tensor, student: int, teachers: list[int], k: int, raw: Raw = COMPLETE
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = self.sides(z, student, teachers, raw)
        forward, _ = self.finish(z, found, "forward", 0.5)
        reverse, _ = self.finish(z, found, "reverse", 0.5)
        count = functools.partial(shared_overlap, self.shard) if self.shard.split else self.overlap
        return count(z, student, teachers, k), forward, reverse

    @on_its_device
    def overlap(self, z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
        R = z.shape[1]
        T, place = len(teachers), placed(z, student, teachers)
        BLOCK = COUNT_TILE // triton.next_power_of_2(T)
        least, room = boundary(z[student], k)
        t_least, t_room = (torch.stack(x) for x in zip(*(boundary(z[j], k) for j in teachers), strict=True))
        common = torch.empty(T, R, dtype=torch.int32, device=z.device)
        shape = {"T": T, "TP": triton.next_power_of_2(T), "BITS": HEAD_BITS, "BLOCK": BLOCK}
        _overlap_kernel[(R,)](z, least, room, t_least, t_room, common, *place, **shape, num_warps=NUM_WARPS)
        return common.to(z.dtype) / k

    @on_its_device
    def complete(self, z: Tensor, bias: Tensor | None, cap: float, temperature: Tensor | None) -> None:
        R, V = z.shape
        BLOCK = min(TILE, max(16, triton.next_power_of_2(V)))
        alone = Raw(V, None if bias is None else bias.unsqueeze(0), [cap], temperature)
        _complete_kernel[(R, triton.cdiv(V, BLOCK))](
            z, *self.lacks(z, alone), V, z.stride(0), LACKS=alone.kind, BLOCK=BLOCK, num_warps=NUM_WARPS
        )

    @on_its_device
    def sides(self, z: Tensor, student: int, teachers: list[int], raw: Raw) -> Tensor:
        """(3 + 7 T, S, R) of `finish.py`: the student beside each teacher and each teacher beside the student."""
        _, R, V = z.shape
        T, U = len(teachers), spans(z, len(teachers))
        S, *tiles = pieces(R, V, 4 * LANES * U, self.shard.columns)
        found = self.planes("pieces", z, 3 + 7 * T, S)
        own, theirs = (raw.kind * is_raw for is_raw in raw.take_sides(z, student, teachers, self.complete))
        # statistics of several teachers do not fit the registers in fp64, nor raw logits of many
        step = 1 if z.dtype == torch.float64 else min(T, RAW_TEACHERS) if theirs else T
        for j in range(0, T, step):
            some, lacks = teachers[j : j + step], own if j == 0 else 0
            _kl_stats_kernel[(R, S)](
                z, found, *self.lacks(z, raw), raw.stride, *placed(z, student, some), *tiles, self.shard.first, j,
                LACKS=lacks, TEACHERS_LACK=theirs, T=len(some), BITS=HEAD_BITS, LANES=LANES, U=U,
                num_warps=NUM_WARPS, maxnreg=registers(z, len(some)) if lacks or theirs else None,
            )  # fmt: skip
        return self.of_all_ranks(found)

    @on_its_device
    def finish(
        self,
        z: Tensor,
        found: Tensor,
        divergence: str,
        beta: float,
        weight: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(T, R) of values, still to come for the JSD, and the numbers of `finish.py`."""
        fields, S, R = found.shape
        T = (fields - 3) // 7
        numbers = self.planes("numbers", z, 5 + 5 * T, 1)
        value = z.new_empty(T, R) if out is None else out
        _kl_finish_kernel[finishers(R)](
            found, numbers, *strided(weight, value), self.mix(z, beta), R, S, self.shard.first,
            *strides(weight, value), **kind(divergence), ONE_SIDED=one_sided(beta), WEIGHTED=weight is not None, T=T,
            BLOCK=FINISHED, num_warps=1,
        )  # fmt: skip
        return value, numbers

    def of_all_ranks(self, found: Tensor) -> Tensor:
        """(F, S, R) of mine become (F, P S, R), ranks in their order."""
        if not self.shard.split:
            return found
        return self.shard.gather(found).movedim(0, 1).flatten(1, 2).contiguous()

    def planes(self, name: str, z: Tensor, fields: int, S: int) -> Tensor:
        """(fields, S, R), its memory the same in every chunk; enough for however few rows the last chunk has."""
        R = z.shape[1]
        memory = self.memory.get((name, z.dtype))
        if memory is None or memory.numel() < fields * S * R:
            # more than `pieces` makes of R rows or fewer
            most = R if S == 1 and name == "numbers" else PROGRAMS + R
            memory = self.memory[name, z.dtype] = z.new_empty(fields * most)
        return memory[: fields * S * R].view(fields, S, R)

    def constant(self, z: Tensor, value: float, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """(count,) times a number as the kernels read it: in z's dtype, where an argument would be rounded to fp32."""
        key = value, dtype or z.dtype
        memory = self.memory.get(key)
        if memory is None or len(memory) < count:
            memory = self.memory[key] = torch.full((count,), value, dtype=dtype or z.dtype, device=z.device)
        return memory[:count]

    def mix(self, z: Tensor, beta: float) -> Tensor:
        """beta and 1 - beta"""
        key = "mix", beta, z.dtype
        if key not in self.memory:
            self.memory[key] = torch.cat([self.constant(z, share, 1) for share in (beta, 1 - beta)])
        return self.memory[key]

    def lacks(self, z: Tensor, raw: Raw) -> tuple[Tensor, Tensor, Tensor]:
        """Biases, softcaps and temperatures as a kernel takes them: where there are none it reads none."""
        key = ("caps", *raw.caps, z.dtype)
        if key not in self.memory:
            self.memory[key] = torch.cat([self.constant(z, cap, 1) for cap in raw.caps])
        return (
            z if raw.bias is None else raw.bias,
            self.memory[key],
            z if raw.temperature is None else raw.temperature,
        )

    def of_one(self, z: Tensor, raw: Raw) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
        """The same of z's one head, and what it lacks, which the sweep that asks completes."""
        if z.shape[2] > raw.V:
            raw.complete(z, self.complete, [0])
        return self.lacks(z, raw), raw.kind if raw.take([0]) else 0

    def cap_of(self, z: Tensor, cap: float | Tensor | None) -> tuple[Tensor, int]:
        """Where the rows' softcap is, and the way to the next row's."""
        return (cap, 1) if isinstance(cap, Tensor) else (self.constant(z, cap or 0.0, 1), 0)


def kind(divergence: str) -> dict[str, bool]:
    return {"REVERSE": divergence in ("reverse", "symmetric"), "FORWARD": divergence in ("forward", "symmetric")}


def finishers(R: int) -> tuple[int]:
    return (triton.cdiv(R, FINISHED),)


def strided(weight: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both (T, R), a teacher's numbers one after another; without weights there is nothing to read."""
    return value if weight is None else weight, value


def strides(weight: Tensor | None, value: Tensor) -> list[int]:
    return [x.stride(0) for x in strided(weight, value)]


def boundary(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest logit of each row, and how many equal to it belong to the k largest."""
    largest = logits.topk(k, dim=1).values
    least = largest[:, -1].contiguous()
    return least, (largest == least.unsqueeze(1)).sum(1)


def pieces(R: int, V: int, tile: int, most: int = 0) -> tuple[int, int, int]:
    """(pieces a row, whole tiles a piece, tiles that the last piece has beside them).

    Ranks that share a vocabulary make as many pieces each as the one with the `most` columns.
    """
    whole = max(V, most) // tile
    S = max(1, whole // triton.cdiv(whole, triton.cdiv(PROGRAMS, R))) if whole else 1
    count = V // tile // S
    return S, count, triton.cdiv(V - S * count * tile, tile)


def sums_block(z: Tensor, T: int) -> int:
    """The same for the sweep that keeps three sums a teacher and column of the tile in registers."""
    if z.dtype == torch.float64 or T > 4:
        return LANES
    return LANES * (4 if T == 1 else 2)


def block(z: Tensor, T: int) -> int:
    """Columns a tile of a sweep that knows its row's statistics; fewer where teachers or doubles fill registers."""
    doubles = z.dtype == torch.float64
    if T > 4 or (doubles and T > 2):
        return TILE // 8
    if doubles:
        return TILE // 4
    return TILE // (2 if T > 2 else 1)


def shape(z: Tensor, T: int, beta: float) -> dict[str, int | None]:
    own = {"T": T, "BITS": HEAD_BITS, "num_warps": NUM_WARPS, "ONE_SIDED": one_sided(beta)}
    return own | {"maxnreg": registers(z, T, one_sided(beta))}


def registers(z: Tensor, T: int, one_sided: bool = False) -> int | None:
    """Of a thread: several teachers' numbers, doubles and two ways to a logarithm need more than the compiler takes."""
    if T > 4 or z.dtype == torch.float64:
        return 168
    return 128 if T > 1 or one_sided else None


def spans(z: Tensor, T: int = 1) -> int:
    """Groups of four columns that a lane reads a tile; one in the interpreter, where it is operations that cost."""
    if triton.knobs.runtime.interpret:
        return 1
    return 1 if T > 2 or z.dtype == torch.float64 else SPANS


def one_sided(beta: float) -> bool:
    """As in `stats.log_mix`."""
    return not 0.1 <= beta <= 0.9


def placed(z: Tensor, student: int, teachers: list[int]) -> tuple[int, ...]:
    """Where a kernel finds its heads: R, V, the way to the next row and head, student, and all teachers in one."""
    _, R, V = z.shape
    return R, V, z.stride(1), z.stride(0), student, sum(head << (HEAD_BITS * j) for j, head in enumerate(teachers))
