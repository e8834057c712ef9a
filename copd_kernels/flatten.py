"""Heads as operators take them: flat lists of tensors and numbers, in the GEMM's own shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import NAMESPACE
from .checks import check_type, is_dtensor
from .head import Head, autocasts
from .reference import accumulator
from .schedule import Projection, operand_dtype
from .shard import Shard


class Flat(NamedTuple):
    """H heads, one entry each: operators take no optional tensors in lists, so a missing bias is an empty one."""

    hidden: list[Tensor]  # (N, D)
    lm_head: list[Tensor]  # (V or more, D)
    bias: list[Tensor]  # (V or more,) or (0,)
    numbers: Tensor  # (H, 2), fp64 on the CPU: scale, and softcap or 0
    vocab_size: list[int]  # of this rank's tokens
    shard: str  # `Shard.text` of all of them


def flatten(heads: list[Head]) -> Flat:
    """Hidden states as (N, D), in autocast's dtype where autocast is on, as `F.linear` would have it."""
    for head in heads:
        same = cast(head.hidden).dtype == cast(head.lm_head).dtype
        rule = f"have hidden's dtype {head.hidden.dtype} outside autocast"
        check_type("Head", "lm_head", same, rule, head.lm_head.dtype)
    return Flat(
        [cast(head.hidden).reshape(-1, head.hidden.shape[-1]) for head in heads],
        [cast(head.lm_head) for head in heads],
        [cast(head.lm_head).new_empty(0) if head.bias is None else cast(head.bias) for head in heads],
        torch.stack([number(x) for head in heads for x in (head.scale, head.softcap)]).view(-1, 2),
        [heads[0].shard.tokens(head.V) for head in heads],
        heads[0].shard.text,
    )


def cast(x: Tensor) -> Tensor:
    """This rank's part of x, in autocast's dtype where autocast is on."""
    part: Tensor = x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]  # a DTensor
    autocast = part.dtype != torch.float64 and autocasts(part)
    return part.to(torch.get_autocast_dtype(part.device.type)) if autocast else part


def number(x: float | Tensor | None) -> Tensor:
    """(), fp64 on the CPU, 0 for None: how a number that varies reaches an operator.

    As an argument of its own, or by `torch.tensor`, each new value would be a new graph under `torch.compile`.
    """
    if isinstance(x, Tensor):
        return x.detach().to("cpu", torch.float64).reshape(())
    return torch.ones((), dtype=torch.float64) * (0.0 if x is None else x)


def projections(heads: Flat, temperature: Tensor, dtype: torch.dtype) -> list[Projection]:
    """Every head as the schedule reads it, one temperature for all tokens folded in; `dtype` is the logits'."""
    T = 1.0 if temperature.dim() else temperature.item()
    *tensors, scales_and_softcaps, sizes, shard = heads
    return [
        Projection(
            hidden,
            lm_head[:V],
            bias[:V] if bias.numel() else None,
            scale / T,
            softcap / T if softcap else None,
            operand_dtype(hidden, dtype),
            Shard.read(shard).columns or V,
        )
        for hidden, lm_head, bias, (scale, softcap), V in zip(
            *tensors, scales_and_softcaps.tolist(), sizes, strict=True
        )
    ]


def logits_dtype(hidden: list[Tensor]) -> torch.dtype:
    return accumulator(*(x.dtype for x in hidden))


def wanted(head: Head) -> list[bool]:
    """Which of hidden, lm_head and bias autograd will ask a gradient of."""
    tensors = (head.hidden, head.lm_head, head.bias)
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward, inference tensors too: autograd refuses them, but none of these is differentiated again."""
    ctx.apart = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.apart else x for i, x in enumerate(tensors)))


def saved(ctx: Any) -> list[Any]:
    """What `save` was given. Once a backward: each reading of `ctx.saved_tensors` unpacks them all again."""
    return [ctx.apart.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


def freed(x: Tensor, alone: bool) -> bool:
    """Whether this backward may write over a saved tensor: an op's result that no caller holds (`alone`), the graph not
    kept for another backward or a second derivative, and no compiler looking on."""
    return alone and type(x) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()


def finish(total: Tensor, factor: Tensor, dtype: torch.dtype, alone: bool) -> Tensor:
    """total * factor in `dtype`, of a saved `total`: in its memory where that may be."""
    return total.mul_(factor) if total.dtype == dtype and freed(total, alone) else scale(total, factor, dtype)


def fake_gradients(hidden: Tensor, lm_head: Tensor, want: list[bool], dtype: torch.dtype) -> list[Tensor]:
    """Shapes of `Gradients.tensors()`."""
    shapes = (hidden.shape, lm_head.shape, lm_head.shape[:1])
    return [hidden.new_empty(shape if w else (0,), dtype=dtype) for shape, w in zip(shapes, want, strict=True)]


@torch.library.custom_op(f"{NAMESPACE}::scale", mutates_args=())
def scale(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in `dtype`, leaving `total` as it is and making no wider copy of it.

    An operator without a derivative: asking for a second derivative raises instead of being silently wrong.
    """
    out = torch.empty_like(total, dtype=dtype)
    # CPU kernels widen whole operands: there, a few rows at a time
    step = max(1, total.shape[0]) if total.is_cuda or dtype == total.dtype else 1024
    for source, target in zip(total.split(step), out.split(step), strict=True):
        torch.mul(source, factor, out=target)
    return out


@scale.register_fake
def _(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(total, dtype=dtype)
