"""Text: a chain of additions and subtractions modulo a number, worked left to right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copd.lab.tasks.synthetic import SyntheticTask


@dataclass(kw_only=True)
class Arithmetic(SyntheticTask):
    """`text 7 + 5 - 3 + 9 =` -> `2 9 answer 8`."""

    modulus: int = 10
    operand: int = 9

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        start = int(rng.integers(self.modulus))
        # a negative operand is a subtraction
        operands = rng.integers(1, self.operand + 1, self.steps) * rng.choice([-1, 1], self.steps)
        return start, *operands.tolist()

    def words(self, problem: tuple[int, ...]) -> list[str]:
        start, *operands = problem
        chain = [word for operand in operands for word in ("+" if operand > 0 else "-", str(abs(operand)))]
        return ["text", str(start), *chain, "="]

    def values(self, problem: tuple[int, ...], slips: np.ndarray) -> list[int]:
        start, *operands = problem
        return ((start + np.cumsum(np.where(slips, -1, 1) * operands)) % self.modulus).tolist()
