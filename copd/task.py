"""What a branch learns from: rows with a verifiable reward.

A `Task` is a list of rows that can be rebuilt from their index alone, and a reward. The real files of `copd.data` and
the synthetic tasks of `copd.lab` both satisfy it, so nothing after this file knows which it is working on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Prompt:
    """One row: what the model reads, and what the reward may look at.

    `media` holds what the model's processor makes of the row's images and video, concatenated over them, under the
    model's own argument names: `pixel_values` (patches, C * temporal_patch * patch**2) with `image_grid_thw`
    (images, 3), `pixel_values_videos` with `video_grid_thw` (videos, 3). It is empty for text.
    """

    task: str
    index: int
    text: str
    """the prompt in words, special tokens included: shown in the report"""
    input_ids: list[int]
    """prompt tokens with every media placeholder already expanded"""
    mm_token_type_ids: list[int]
    """for each of `input_ids`: 0 text, 1 image, 2 video"""
    media: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    """`answer` and every other column of the row: keyword arguments of the reward"""
    images: list[np.ndarray] = field(default_factory=list)
    """images or frames as (H, W, 3) uint8, for the report only"""
    where: str = ""
    """the row as its file counts it, for errors"""


class Task(Protocol):
    name: str

    def size(self, split: Split) -> int:
        """Number of rows; indices run from 0 to size - 1. Train and test share no row."""

    def prompt(self, index: int, split: Split = "train") -> Prompt:
        """The row `index`, the same at every call and in every process."""

    def decode(self, tokens: list[int]) -> str:
        """Completion tokens as text, special tokens left out: what the reward reads."""

    def reward(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """One number for each completion; `prompts` and `completions` have the same length."""
