"""A temperature for all tokens is part of the projection; a temperature a token divides its finished logits.

The rows know of neither: a token's upstream gradient is divided by its temperature before they see it. Only the
student's softcap over temperature is then a number a row, which the torch rows take.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .checks import is_per_token
from .flatten import number
from .rows import load
from .schedule import Projection, Rows


def temperatures(temperature: float | Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As an operator takes it: (), or (N,) in `dtype`."""
    if is_per_token(temperature, shape):
        return temperature.detach().to(dtype).reshape(-1)
    return number(temperature)


def where_they_count(temperature: Tensor, counts: Tensor) -> Tensor:
    """Tokens that count for nothing have a temperature of 1, whatever was given."""
    return torch.where(counts, temperature, 1) if temperature.dim() else temperature


def of_tokens(temperature: Tensor, tokens: Rows) -> Tensor | None:
    """(R,), or None where the projection knows the one for all."""
    return temperature[tokens] if temperature.dim() else None


def softcap_of(
    head: Projection, temperature: Tensor, tokens: Rows, rows: ModuleType, shard: str
) -> tuple[float | Tensor | None, ModuleType]:
    """The head's softcap over temperature, a number or (R,), and rows that take it."""
    if head.cap is None or not temperature.dim():
        return head.cap, rows
    return head.cap / temperature[tokens], load("torch", shard)
