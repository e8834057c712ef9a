"""Image: how many cells of a grid hold a shape of the asked colour, counted row by row."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from copd.lab.tasks.synthetic import SyntheticTask
from copd.lab.tasks.vocabulary import IMAGE, VISION_END, VISION_START

COLOURS = ("red", "green", "blue")
CELL, EMPTY = 8, 3  # pixels: one merged visual token a cell
_line = np.arange(5)
SHAPES = [
    np.ones((5, 5), bool),
    (_line == 2)[:, None] | (_line == 2),
    (_line[:, None] == _line) | (_line[:, None] == 4 - _line),
]


@dataclass(kw_only=True)
class Count(SyntheticTask):
    """`image red <vision> =` over a 3 x 3 grid -> `1 3 answer 4`, the counts up to each row."""

    steps: int = field(init=False)
    grid: int = 3
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.steps = self.grid

    def draw(self, rng: np.random.Generator) -> tuple[int, tuple[int, ...]]:
        return int(rng.integers(3)), tuple(rng.integers(0, EMPTY + 1, self.steps**2).tolist())

    def words(self, problem: tuple[int, tuple[int, ...]]) -> list[str]:
        # the question precedes the image: learned much faster than the other order
        return ["image", COLOURS[problem[0]], VISION_START, *[IMAGE] * self.steps**2, VISION_END, "="]

    def values(self, problem: tuple[int, tuple[int, ...]], slips: np.ndarray) -> list[int]:
        asked, cells = problem
        rows = np.reshape(cells, (self.steps, self.steps))
        return np.cumsum(np.where(slips, (rows == (asked + 1) % 3).sum(1), (rows == asked).sum(1))).tolist()

    def frames(self, problem: tuple[int, tuple[int, ...]], rng: np.random.Generator) -> np.ndarray:
        image = rng.normal(0, self.noise, (1, CELL * self.steps, CELL * self.steps, 3)).astype(np.float32)
        for place, colour in enumerate(problem[1]):
            if colour == EMPTY:
                continue
            shape = SHAPES[rng.integers(len(SHAPES))]
            y, x = CELL * np.array(divmod(place, self.steps)) + rng.integers(0, CELL - 4, 2)
            image[0, y : y + 5, x : x + 5][shape] = np.where(np.arange(3) == colour, 1.0, -1.0)
        return image
