"""When phases end: after so many steps, or when the overlap they exist to hold says so.

The paper alternates S_RL and S_OPD steps and leaves open how their ratio follows from the top-k overlap it is meant to
hold. Here Phase I lasts until the overlap has fallen below `overlap.low`, Phase II until it is back at `overlap.high`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from copd.schema import require

logger = logging.getLogger("copd")


@dataclass(frozen=True)
class OverlapConfig:
    low: float = 0.9
    """Phase I ends when the mean top-k overlap along the edges of the topology has fallen below"""
    high: float = 0.93
    """Phase II ends when it is back at this"""
    every: int = 3
    """steps of a phase between measurements"""
    longest: int = 30
    """steps after which a phase ends whatever the overlap, with a warning"""

    def __post_init__(self) -> None:
        require(0 < self.low <= self.high < 1, "overlap must have 0 < low <= high < 1", (self.low, self.high))
        for name in ("every", "longest"):
            require(getattr(self, name) >= 1, f"overlap.{name} must be at least 1", getattr(self, name))


def fixed(cycles: int, rl_steps: int, opd_steps: int) -> list[str]:
    """The phases of Algorithm 1."""
    return (["rl"] * rl_steps + ["opd"] * opd_steps) * cycles


def by_overlap(bounds: OverlapConfig, steps: int, overlap: Callable[[], float]) -> Callable[[list[str]], str]:
    """From the phases so far to the next, `steps` in all; `overlap()` measures the branches as they are, in [0, 1]."""

    def govern(phases: list[str]) -> str:
        if len(phases) >= steps:
            return "consolidate"
        now = phases[-1] if phases else "rl"
        length = sum(1 for _ in takewhile(lambda phase: phase == now, reversed(phases)))
        if not length or (length % bounds.every and length < bounds.longest):
            return now
        other, found = "opd" if now == "rl" else "rl", overlap()
        if found < bounds.low if now == "rl" else found >= bounds.high:
            return other
        if length < bounds.longest:
            return now
        logger.warning("phase %s ends after overlap.longest = %d steps at an overlap of %.3f", now, length, found)
        return other

    return govern
