"""The one place that words an error: `<op>: <argument> must <rule>; got <value>`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor


def check(op: str, argument: str, ok: bool, rule: str, got: object, fix: str = "") -> None:
    if not ok:
        raise ValueError(_message(op, argument, rule, got, fix))


def check_type(op: str, argument: str, ok: bool, rule: str, got: object, fix: str = "") -> None:
    if not ok:
        raise TypeError(_message(op, argument, rule, got, fix))


def _message(op: str, argument: str, rule: str, got: object, fix: str) -> str:
    return f"{op}: {argument} must {rule}; got {got}" + (f"; {fix}" if fix else "")


def is_dtensor(got: object) -> bool:
    # by name: to import the class takes longer than most programs need
    return type(got).__name__ == "DTensor"


def check_tensor(op: str, argument: str, got: object, split: bool = False) -> None:
    """With `split`, a tensor of a head that may be split over ranks."""
    check_type(op, argument, isinstance(got, Tensor), "be a tensor", type(got).__name__)
    check_type(op, argument, split or not is_dtensor(got), "be a plain tensor", "a DTensor", "pass its to_local()")


def check_number(op: str, argument: str, got: object) -> None:
    """A tensor of one element will do, unless somebody hopes to learn it: `float` would take it out of the graph."""
    if isinstance(got, Tensor):
        fix = "multiply hidden or lm_head by what is learnt"
        check_type(op, argument, not got.requires_grad, "be a constant", "a tensor that requires grad", fix)
        check_type(op, argument, got.numel() == 1, "be a number", f"a tensor of shape {tuple(got.shape)}")
    else:
        ok = isinstance(got, (int, float, torch.SymInt, torch.SymFloat))
        check_type(op, argument, ok, "be a number", type(got).__name__)


def check_integer(op: str, argument: str, got: object) -> None:
    check_type(op, argument, isinstance(got, (int, torch.SymInt)), "be an integer", type(got).__name__)


def check_option(op: str, argument: str, got: str, options: tuple[str, ...]) -> None:
    check(op, argument, got in options, "be one of " + ", ".join(options), repr(got))


def values_are_checked(tensor: Tensor) -> bool:
    """Reading a CUDA tensor's values stops the host, so there it is done only under COPD_DEBUG=1; never in a trace.

    Fake tensors, as other subclasses, have no values to read.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or os.environ.get("COPD_DEBUG") == "1"


def check_values(op: str, argument: str, values: Tensor, allowed: Callable[[Tensor], Tensor], rule: str) -> None:
    """Every value must be `allowed`; the first one that is not is named."""
    if values_are_checked(values):
        ok = allowed(values)
        if not bool(ok.all()):
            check(op, argument, False, rule, values[~ok][0].item())


def check_integers(op: str, argument: str, ids: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor(op, argument, ids)
    check_type(op, argument, ids.dtype == torch.int64, "be int64", ids.dtype)
    check(op, argument, ids.shape == shape, f"have shape {tuple(shape)}", tuple(ids.shape))
    check(op, argument, ids.device == device, f"be on {device}", ids.device)


def check_divergence(op: str, divergence: str, beta: float) -> None:
    check_option(op, "divergence", divergence, ("reverse", "forward", "jsd", "symmetric"))
    check_number(op, "beta", beta)
    fix = "its limits are divergence='forward' and 'reverse'"
    check(op, "beta", divergence != "jsd" or 0 < beta < 1, "be in (0, 1) for jsd", beta, fix)


def check_temperature(op: str, temperature: float | Tensor) -> None:
    check_number(op, "temperature", temperature)
    check(op, "temperature", bool(temperature > 0), "be positive", temperature)


def check_temperatures(op: str, temperature: float | Tensor, counts: Tensor) -> None:
    """A number, or one a token: positive wherever the token counts."""
    if not isinstance(temperature, Tensor) or (
        temperature.numel() == 1 and not is_per_token(temperature, counts.shape)
    ):
        check_temperature(op, temperature)
        return
    check_tensor(op, "temperature", temperature)
    check_type(op, "temperature", not temperature.requires_grad, "be a constant", "a tensor that requires grad")
    check_type(op, "temperature", temperature.is_floating_point(), "be floating", temperature.dtype)
    rule = f"be a number or have shape {tuple(counts.shape)}"
    check(op, "temperature", temperature.shape == counts.shape, rule, tuple(temperature.shape))
    check(op, "temperature", temperature.device == counts.device, f"be on {counts.device}", temperature.device)
    check_values(op, "temperature", torch.where(counts, temperature, 1), lambda t: t > 0, "be positive")


def is_per_token(temperature: float | Tensor, shape: torch.Size) -> TypeGuard[Tensor]:
    return isinstance(temperature, Tensor) and temperature.dim() > 0 and temperature.shape == shape


def check_workspace(op: str, workspace_bytes: int | None) -> None:
    if workspace_bytes is not None:
        check_integer(op, "workspace_bytes", workspace_bytes)
    ok = workspace_bytes is None or workspace_bytes > 0
    check(op, "workspace_bytes", ok, "be positive", workspace_bytes)


def check_token_weight(
    op: str, weight: Tensor | None, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The checked weights in `dtype`; ones where there are none."""
    if weight is None:
        return torch.ones(shape, dtype=dtype, device=device)
    check_tensor(op, "token_weight", weight)
    ok = weight.is_floating_point() or weight.dtype == torch.bool
    check_type(op, "token_weight", ok, "be floating or bool", weight.dtype)
    check(op, "token_weight", weight.shape == shape, f"have shape {tuple(shape)}", tuple(weight.shape))
    check(op, "token_weight", weight.device == device, f"be on {device}", weight.device)
    check_values(op, "token_weight", weight, lambda w: w >= 0, "be >= 0")
    return weight.detach().to(dtype)
