"""Rows in Triton: CUDA, or any device under the interpreter.

A row is split over programs and read in blocks, never held whole. Each piece leaves its statistics, `stats.merge` joins
them, and a second sweep writes the gradient: every logit is read twice (three times for the JSD, whose sums need both
normalisers), every dlogit written once. No atomics: the order of every sum is fixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from ..shard import WHOLE
from . import HEAD_BITS
from .kernels import (
    _jsd_sums_kernel,
    _kl_grad_kernel,
    _logprob_grad_kernel,
    _overlap_kernel,
    _softcap_kernel,
)
from .lanes import _kl_stats_kernel, _logprob_stats_kernel
from .split import in_stages
from .stats import KLGradient, Row, Side, divergence_from, logprob_at_top, merge

F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(f: F) -> F:
    """Runs f with z's GPU current: Triton launches on the current device and stream, wherever the tensors are."""

    @functools.wraps(f)
    def run(z: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(z):
            return f(z, *arguments, **options)

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


@on_its_device
def logprob(z: Tensor) -> Side:
    _, R, V = z.shape
    U = spans(z)
    S, *tiles = pieces(R, V, 4 * LANES * U)
    m, tail, moment = (z.new_empty(R, S) for _ in range(3))
    top = torch.empty(R, S, dtype=torch.int32, device=z.device)
    _logprob_stats_kernel[(R, S)](
        z, m, top, tail, moment, V, z.stride(1), *tiles, LANES=LANES, U=U, num_warps=NUM_WARPS, maxnreg=registers(z, 1)
    )
    return merge(Side(m, ids(top, V), tail, torch.zeros_like(m), moment)).distribution()


@on_its_device
def logprob_grad(
    z: Tensor,
    side: Side,
    tokens: Tensor,
    dlogp: Tensor,
    dentropy: Tensor,
    dlse: Tensor,
    cap: float | None,
    dlogits: Tensor,
) -> None:
    _, R, V = z.shape
    at_top = logprob_at_top(side, tokens, dlogp, dentropy, dlse)
    BLOCK = block(z, 1)
    S, *tiles = pieces(R, V, BLOCK)
    _logprob_grad_kernel[(R, S)](
        z,
        dlogits,
        tokens.contiguous(),
        side.top,
        side.max,
        side.p_top,
        side.mean,
        dlogp.contiguous(),
        dentropy.contiguous(),
        dlse.contiguous(),
        at_top,
        number(z, cap),
        dlogits.stride(0),
        V,
        z.stride(1),
        *tiles,
        HAS_CAP=cap is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@on_its_device
def sides(z: Tensor, student: int, teachers: list[int]) -> tuple[Side, Side]:
    """The student beside each teacher and each teacher beside the student, (T, R)."""
    _, R, V = z.shape
    T, U, place = len(teachers), spans(z, len(teachers)), placed(z, student, teachers)
    if T > 1 and z.dtype == torch.float64:  # whose statistics of several teachers do not fit the registers
        alone = [sides(z, student, [teacher]) for teacher in teachers]
        cross, moment = (torch.cat([getattr(s, name) for s, _ in alone]) for name in ("cross", "moment"))
        return alone[0][0]._replace(cross=cross, moment=moment), Side(
            *map(torch.cat, zip(*(t for _, t in alone), strict=True))
        )
    S, *tiles = pieces(R, V, 4 * LANES * U)
    shape = {"T": T, "BITS": HEAD_BITS, "LANES": LANES, "U": U, "num_warps": NUM_WARPS}
    m, tail = z.new_empty(R, S), z.new_empty(R, S)
    moment, t_m, t_tail, t_moment = (z.new_empty(T, R, S) for _ in range(4))
    top = torch.empty(R, S, dtype=torch.int32, device=z.device)
    t_top = torch.empty(T, R, S, dtype=torch.int32, device=z.device)
    _kl_stats_kernel[(R, S)](z, m, top, tail, moment, t_m, t_top, t_tail, t_moment, *place, *tiles, **shape)
    top, t_top = ids(top, V), ids(t_top, V)
    cross = torch.stack([z[j].gather(1, top) for j in teachers])
    t_cross = z[student].expand(T, R, V).gather(2, t_top)
    s = merge(Side(m, top, tail, cross, moment)).distribution()
    t = merge(Side(t_m, t_top, t_tail, t_cross, t_moment)).distribution()
    return s, t


@on_its_device
def jsd_sums(z: Tensor, student: int, teachers: list[int], row: Row) -> Tensor:
    s, t = row.student, row.teacher
    T, R = t.tail.shape
    BLOCK = sums_block(z, T)
    S, *tiles = pieces(R, z.shape[2], BLOCK)
    sums = z.new_empty(3, T, R, S)
    _jsd_sums_kernel[(R, S)](
        z, s.max, s.top, s.p_top, t.max, t.p_top, row.gap.contiguous(), row.offset, *shares(z, row.beta), *sums,
        *placed(z, student, teachers), *tiles, ONE_SIDED=one_sided(row.beta), BLOCK=BLOCK, **shape(z, T),
    )  # fmt: skip
    return sums.sum(-1)


@on_its_device
def kl_grad(
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    row: Row,
    weight: Tensor,
    cap: float | None,
    gradient: KLGradient,
    dlogits: Tensor,
) -> None:
    s, t = row.student, row.teacher
    T, R = t.tail.shape
    BLOCK = block(z, T)
    S, *tiles = pieces(R, z.shape[2], BLOCK)
    _kl_grad_kernel[(R, S)](
        z,
        dlogits,
        s.max,
        s.top,
        s.p_top,
        gradient.centre,
        gradient.at_top,
        weight.contiguous(),
        row.offset,
        t.max,
        torch.where(weight == 0, 0, weight * t.p_top),
        row.gap.contiguous(),
        *shares(z, row.beta),
        number(z, cap),
        dlogits.stride(0),
        *placed(z, student, teachers),
        *tiles,
        REVERSE=divergence in ("reverse", "symmetric"),
        FORWARD=divergence in ("forward", "symmetric"),
        ONE_SIDED=one_sided(row.beta),
        HAS_CAP=cap is not None,
        BLOCK=BLOCK,
        **shape(z, T),
    )


def kl(
    z: Tensor,
    student: int,
    teachers: list[int],
    divergence: str,
    beta: float,
    weight: Tensor | None = None,
    cap: float | None = None,
    dlogits: Tensor | None = None,
) -> Tensor:
    return in_stages((sides, jsd_sums, kl_grad), WHOLE, z, student, teachers, divergence, beta, weight, cap, dlogits)


@on_its_device
def agreement(z: Tensor, student: int, teachers: list[int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    s, t = sides(z, student, teachers)
    common = overlap(z, student, teachers, k)
    return common, divergence_from("forward", s, t), divergence_from("reverse", s, t)


@on_its_device
def overlap(z: Tensor, student: int, teachers: list[int], k: int) -> Tensor:
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
def softcap(z: Tensor, cap: float) -> None:
    R, V = z.shape
    BLOCK = min(TILE, max(16, triton.next_power_of_2(V)))
    _softcap_kernel[(R, triton.cdiv(V, BLOCK))](z, number(z, cap), V, z.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS)


def boundary(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest logit of each row, and how many equal to it belong to the k largest."""
    largest = logits.topk(k, dim=1).values
    least = largest[:, -1].contiguous()
    return least, (largest == least.unsqueeze(1)).sum(1)


def pieces(R: int, V: int, tile: int) -> tuple[int, int, int]:
    """(pieces a row, whole tiles a piece, tiles that the last piece has beside them)."""
    whole = V // tile
    count = triton.cdiv(whole, triton.cdiv(PROGRAMS, R)) if whole else 0
    S = max(1, whole // count) if count else 1
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


def shape(z: Tensor, T: int) -> dict[str, int | None]:
    return {"T": T, "BITS": HEAD_BITS, "num_warps": NUM_WARPS, "maxnreg": registers(z, T)}


def registers(z: Tensor, T: int) -> int | None:
    """Of a thread: several teachers' numbers and doubles need more than the compiler takes by itself."""
    if T > 4 or z.dtype == torch.float64:
        return 168
    return 128 if T > 1 else None


def spans(z: Tensor, T: int = 1) -> int:
    """Groups of four columns that a lane reads a tile; one in the interpreter, where it is operations that cost."""
    if triton.knobs.runtime.interpret:
        return 1
    return 1 if T > 2 or z.dtype == torch.float64 else SPANS


def shares(z: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return number(z, beta), number(z, 1 - beta)


def one_sided(beta: float) -> bool:
    """As in `stats.log_mix`."""
    return not 0.1 <= beta <= 0.9


def number(z: Tensor, value: float | None) -> Tensor:
    """A number as the kernels read it: in z's dtype, where an argument would be rounded to fp32."""
    return z.new_full((1,), value or 0.0)


def ids(top: Tensor, V: int) -> Tensor:
    """int64 ids; a row of NaN has no top token, and any valid id will do."""
    return top.to(torch.int64).clamp_(0, V - 1)


def placed(z: Tensor, student: int, teachers: list[int]) -> tuple[int, ...]:
    """Where a kernel finds its heads: R, V, the way to the next row and head, student, and all teachers in one."""
    _, R, V = z.shape
    return R, V, z.stride(1), z.stride(0), student, sum(head << (HEAD_BITS * j) for j, head in enumerate(teachers))
