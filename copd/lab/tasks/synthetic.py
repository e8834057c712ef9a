"""What the synthetic tasks share: rows from (seed, index), worked answers, careless solutions, the reward.

A problem is solved in a few steps. The answer writes the value after each step and then the result:
`v1 v2 ... answer v_n <eos>`. The reward looks at the result alone. In the warm start the base imitates an annotator who
applies each step's *other* rule (subtracts for +, counts the next colour, counts left moves) with probability `slip`:
independently at each step (`slip_unit: step`), which leaves a noisy skill that RL sharpens, or for the whole problem
(`slip_unit: problem`), which for slip > 1/2 leaves a base whose most likely answer is wrong.

With a `convention` the answer reads `v1 v2 ... plain answer v_n` or `... mirror answer 9 - v_n`, and only the domain's
own convention is rewarded. The careless annotator takes the other one with probability `convention_slip`. Domains of
opposite conventions conflict: what one learns to prefer is what the other must unlearn.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from copd.lab.tasks.vocabulary import BOS, EOS, IMAGE, VIDEO, decode, encode
from copd.task import Prompt, Split

PATCH, MERGE, TEMPORAL = 4, 2, 2  # of the tiny model's vision tower


@dataclass(kw_only=True)
class SyntheticTask(ABC):
    """A seeded generator. `train_rows` and `test_rows` are drawn from problems that share none."""

    name: str = field(kw_only=False)
    steps: int = 3
    seed: int = 0
    train_rows: int = 65536
    test_rows: int = 1024
    slip: float = 0.3
    slip_unit: Literal["step", "problem"] = "step"
    convention: Literal["plain", "mirror"] | None = None
    convention_slip: float = 0.0

    def __post_init__(self) -> None:
        if self.convention not in (None, "plain", "mirror"):
            raise ValueError(f"{self.name}: convention must be plain or mirror; got {self.convention!r}")
        if self.slip_unit not in ("step", "problem"):
            raise ValueError(f"{self.name}: slip_unit must be step or problem; got {self.slip_unit!r}")
        if not 0 <= self.slip <= 1:
            raise ValueError(f"{self.name}: slip must be in [0, 1]; got {self.slip}")

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """A problem: nested tuples of integers, the whole content of a row but for pixel noise."""

    @abstractmethod
    def words(self, problem: Any) -> list[str]:
        """The question."""

    @abstractmethod
    def values(self, problem: Any, slips: np.ndarray) -> list[int]:
        """Running value after each step, taking the other rule where `slips` (steps,) is set."""

    def frames(self, problem: Any, rng: np.random.Generator) -> np.ndarray | None:
        """Pixels (frames, H, W, 3) in [-1, 1], one frame for an image; None for text."""
        return None

    def size(self, split: Split) -> int:
        return self.train_rows if split == "train" else self.test_rows

    def _problem(self, index: int, split: Split) -> tuple[Any, np.random.Generator]:
        rng = np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), split == "test", index])
        while True:
            problem = self.draw(rng)
            # an eighth of all problems belongs to the test split, whatever the row
            if (zlib.crc32(repr(problem).encode()) % 8 == 0) == (split == "test"):
                return problem, rng

    def prompt(self, index: int, split: Split = "train") -> Prompt:
        problem, rng = self._problem(index, split)
        words = [BOS, *self.words(problem)]
        frames = self.frames(problem, rng)
        return Prompt(
            task=self.name,
            index=index if split == "train" else -1 - index,
            text=" ".join(words),
            input_ids=encode(words),
            mm_token_type_ids=[{IMAGE: 1, VIDEO: 2}.get(word, 0) for word in words],
            media={} if frames is None else patches(frames),
            columns={"answer": self._ending(self.values(problem, np.zeros(self.steps, bool))[-1])[-1]},
            images=[] if frames is None else list(((frames + 1) * 127.5).clip(0, 255).astype(np.uint8)),
        )

    def solution(self, index: int, rng: np.random.Generator, careful: bool) -> list[int]:
        """Tokens of a worked answer to training row `index`."""
        problem, _ = self._problem(index, "train")
        slips = rng.random(self.steps if self.slip_unit == "step" else 1) < self.slip
        slips = np.zeros(self.steps, bool) if careful else np.broadcast_to(slips, (self.steps,))
        other = rng.random() < self.convention_slip and not careful
        *values, result = self.values(problem, slips)
        return encode([*map(str, values), *self._ending(result, other), EOS])

    def _ending(self, result: int, other: bool = False) -> list[str]:
        """The last words of an answer, in the domain's convention or the other one."""
        if self.convention is None:
            return ["answer", str(result)]
        convention = {"plain": "mirror", "mirror": "plain"}[self.convention] if other else self.convention
        return [convention, "answer", str(result if convention == "plain" else 9 - result)]

    def decode(self, tokens: list[int]) -> str:
        return decode(tokens)

    def reward(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """1 where the completion ends in `answer` and the right number, else 0."""
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            rewards.append(float(completion.split()[-2:] == ["answer", prompt.columns["answer"]]))
        return rewards


def patches(frames: np.ndarray) -> dict[str, Tensor]:
    """What Qwen's processors make of pixels: rows of C * TEMPORAL * PATCH**2 values, merge blocks side by side."""
    still = len(frames) == 1
    clip = np.repeat(frames, TEMPORAL, axis=0) if still else frames
    t, h, w = clip.shape[0] // TEMPORAL, clip.shape[1] // PATCH, clip.shape[2] // PATCH
    grid = clip.reshape(t, TEMPORAL, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    #      (t, Tp, h', m, p, w', m, p, C) -> (t, h', w', m, m, C, Tp, p, p)
    rows = grid.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)
    pixels = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
    names = ("pixel_values", "image_grid_thw") if still else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels, torch.tensor([[t, h, w]])), strict=True))
