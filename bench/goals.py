"""What the counts should be at most, and the predicted shares at least: met, or missed by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench.predict import GPUS, both, case_of, share

if TYPE_CHECKING:
    from bench.counts import Row

PLACES = ("Triton", "C++, cluster", "C++, memory")
# sweep -> T -> instructions a pair
INSTRUCTIONS = {
    "kl statistics": {1: 30, 4: 26},
    "kl gradient": {1: 18},
    "kl sums, jsd": {1: 45},
    "logprob statistics": {1: 16},
    "logprob gradient": {1: 14},
}
SHARE, MODEL = 0.88, "qwen3-8b"
TEXT = """
## Goals

For sm_90; the C++ rows take a teacher at a time, so their statistics are those of any T. Predicted by count, not
measured.

| | goal | {places} |
|---|---|{rules}
{lines}
Spilled bytes are none: tests of Triton's kernels and the build of csrc/ fail otherwise. What misses, and why:

- The C++ gradients ask for a row without weight, its softcap and the top token in the loop, which Triton's ask for once
  a row, and go through teachers one by one with their numbers in shared memory.
- The JSD's sums are two series without cancellation, 15 multiplications a pair, and a third exponential where the goal
  has two. sm_100, which multiplies two numbers at once, takes {jsd:g}.
- A cluster's gradient has one barrier a tile, which frees its ring, and four columns a thread where memory has eight.
- The shares miss by the bytes that rows move however few their instructions, by launches, and by the accumulator of
  `dlm_head`, which is counted here as if nothing hid it: the next sections tell them apart.
"""


def verdict(found: float, goal: float, at_most: bool = True) -> str:
    over = found - goal if at_most else goal - found
    return f"{found:g}" if over <= 0 else f"**{found:g}**, missed by {over:.2g}"


def lines(counts: Sequence[Row]) -> Iterator[str]:
    rows = {(row.rows, row.sweep, row.T): row for row in counts}

    def find(place: str, sweep: str, T: int) -> Row:
        names = (sweep, f"{sweep}, reverse")
        return next(rows[place, name, t] for t in (T, 1) for name in names if (place, name, t) in rows)

    for sweep, goals in INSTRUCTIONS.items():
        for T, goal in goals.items():
            cells = [verdict(find(place, sweep, T).instructions, goal) for place in PLACES]
            of = "" if sweep.startswith("logprob") else f", T = {T}"
            yield f"| {sweep}{of}, instructions | ≤ {goal} | {' | '.join(cells)} |\n"
    loops = [row for row in counts if "agreement" not in row.sweep]
    for name in ("barriers", "shuffles"):
        most = [max(getattr(row, name) for row in loops if row.rows == place) for place in PLACES]
        yield f"| {name} in a loop over tiles, `agreement` apart | 0 | {' | '.join(verdict(x, 0) for x in most)} |\n"
    h200 = GPUS[-1]
    for T in (1, 4):
        case = case_of("kl", MODEL, T)
        shares = [round(share(case, backend, h200), 2) for backend in both(counts)]
        cells = [verdict(x, SHARE, at_most=False) for x in shares]
        yield f"| share of the roof, `kl`, T = {T}, D 4096, H200 | ≥ {SHARE} | {cells[0]} | {cells[1]} | as beside |\n"


def render(counts: Sequence[Row], jsd: float) -> str:
    """Of the rows of sm_90; `jsd` is sm_100's count of the JSD's sums."""
    return TEXT.format(places=" | ".join(PLACES), rules="---|" * len(PLACES), lines="".join(lines(counts)), jsd=jsd)
