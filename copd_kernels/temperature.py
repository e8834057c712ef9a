"""A temperature for all tokens is part of the projection; a temperature a token divides its finished logits.

The rows' gradients know of neither: a token's upstream gradient is divided by its temperature before they see it. Only
the student's softcap over temperature is then a number a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import is_per_token
from .flatten import number
from .schedule import Projection


def temperatures(temperature: float | Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """As an operator takes it: (), or (N,) in `dtype`."""
    if is_per_token(temperature, shape):
        return temperature.detach().to(dtype).reshape(-1)
    return number(temperature)


def where_they_count(temperature: Tensor, counts: Tensor) -> Tensor:
    """Tokens that count for nothing have a temperature of 1, whatever was given."""
    return torch.where(counts, temperature, 1) if temperature.dim() else temperature


def of_tokens(temperature: Tensor, chunk: slice) -> Tensor | None:
    """(R,), or None where the projection knows the one for all."""
    return temperature[chunk] if temperature.dim() else None


def softcap_of(head: Projection, temperature: Tensor) -> Callable[[slice], float | Tensor | None]:
    """The head's softcap over temperature, a number or (R,) of each chunk."""
    if head.cap is None or not temperature.dim():
        return lambda chunk: head.cap
    caps = head.cap / temperature
    return lambda chunk: caps[chunk]
