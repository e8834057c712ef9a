"""Video: how often a block moves to the right, counted move by move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copd.lab.tasks.synthetic import PATCH, TEMPORAL, SyntheticTask
from copd.lab.tasks.vocabulary import VIDEO, VISION_END, VISION_START

COLUMN, BLOCK = 2 * PATCH, 6  # pixels: a column is one merged visual token


@dataclass(kw_only=True)
class Motion(SyntheticTask):
    """`video right <vision> x 4 =` -> `1 1 answer 2`, the moves to the right up to each step."""

    columns: int = 4
    noise: float = 0.1

    def draw(self, rng: np.random.Generator) -> tuple[tuple[int, ...], int, int, int]:
        """Columns of the block over time (it turns back where it would leave the frame), colour, offset in its cell."""
        path = [int(rng.integers(self.columns))]
        for move in rng.choice([-1, 1], self.steps).tolist():
            path.append(path[-1] + (move if 0 <= path[-1] + move < self.columns else -move))
        return tuple(path), int(rng.integers(3)), *rng.integers(0, COLUMN - BLOCK + 1, 2).tolist()

    def words(self, problem: tuple[tuple[int, ...], int, int, int]) -> list[str]:
        clip = [VISION_START, *[VIDEO] * self.columns, VISION_END] * (self.steps + 1)
        return ["video", "right", *clip, "="]

    def values(self, problem: tuple[tuple[int, ...], int, int, int], slips: np.ndarray) -> list[int]:
        moves = np.diff(problem[0])
        return np.cumsum(np.where(slips, moves < 0, moves > 0)).tolist()

    def frames(self, problem: tuple[tuple[int, ...], int, int, int], rng: np.random.Generator) -> np.ndarray:
        path, colour, top, offset = problem
        video = rng.normal(0, self.noise, (len(path) * TEMPORAL, COLUMN, self.columns * COLUMN, 3)).astype(np.float32)
        for time, (column, following) in enumerate(zip(path, (*path[1:], path[-1]), strict=True)):
            # the second frame of a pair shows the block half way to its next column
            for half in range(TEMPORAL):
                left = column * COLUMN + offset + half * (following - column) * COLUMN // TEMPORAL
                video[TEMPORAL * time + half, top : top + BLOCK, left : left + BLOCK] = np.where(
                    np.arange(3) == colour, 1.0, -1.0
                )
        return video
