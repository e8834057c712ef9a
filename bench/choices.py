"""What follows for the defaults: where an op's time goes by count, and what higher chunks or other rows change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.cases import MODELS, Case
from bench.predict import GEMM_FLOPS, GPU, GPUS, TODAY, Plan, Rows, both, case_of, clustered, parts, share

if TYPE_CHECKING:
    from bench.counts import Row

GIB = 1 << 30
TEACHERS = (1, 2, 4)
PLANS = {f"{gib:g} GiB": Plan(int(gib * GIB)) for gib in (1.5, 3, 6, 12)}
PLANS["3 GiB, two chunks a GEMM"] = Plan(3 * GIB, served=2)
PARTS = ("GEMMs", "rows", "accumulator", "launches", "softcap")
TEXT = """
## Where the time goes

Of `kl`, reverse, forward and backward, in hundredths: Triton's rows / the C++ rows. Predicted by count, not measured.

| | head | T | chunk | {parts} |
|---|---|---|---|{part_rules}
{times}
## Chunk height and workspace

Tokens a chunk and the share of the roof of `kl`, reverse, on Triton's rows: from what it is if nothing hides the
accumulator to what it is if a GEMM moves it while it multiplies. Predicted by count, not measured.

| | head | T | {plans} |
|---|---|---|{plan_rules}
{heights}
## Triton's rows or the C++ rows

Time of the rows of `kl` alone, the C++ ones over Triton's, reverse / JSD; "c" where a cluster holds a row of every
head. Predicted by count, not measured.

| | T | {models} |
|---|---|{model_rules}
{rows}
## Choices

- **Workspace on CUDA: 3 GiB, as it is.** A `dlm_head` GEMM has time to move its accumulator in chunks of
  {tokens} tokens or more; today's are lower for
  {low}.
  Twice the memory gains at most {doubled:.2f} of the roof if cuBLAS overlaps nothing, {hidden:.2f} if it overlaps all
  it can: only a clock can tell.
- **Chunk height: what the workspace holds.** Only the accumulator and the launches depend on it.
- **One `dlm_head` GEMM for two chunks: not built.** Within the same memory it gains at most {served:.2f}, if cuBLAS
  overlaps nothing, and costs height otherwise: it waits for the same measurement.
- **Rows on CUDA: Triton's, whatever the architecture, V and T.** By count the C++ rows are ahead on sm_90 where a
  cluster holds the rows of student and one teacher, even or behind with more teachers, and far behind in the JSD, which
  they compute with about twice as many instructions. sm_80 has no clusters, and those of sm_100 are not counted. A
  cluster of 16 blocks takes most of a GPC's multiprocessors and leaves the rest idle, which is not counted either: a
  clock decides.

## First on a GPU

    STAGES="build tests rows workspace kl" bench/gpu.sh OUT_DIR

| stage | decides | changes |
|---|---|---|
| `rows` | whether rows reach their bound: 0.85 of a copy or better | tiles in `copd_kernels/rows/triton.py` |
| `workspace` | whether the accumulator hides, T = 1 and 4 | `schedule.WORKSPACE_BYTES`; one GEMM for two chunks |
| `kl`, `workspace` | native or Triton rows, T = 1 and 4 | `rows.DEFAULTS` |
"""


def times(backends: Sequence[Rows]) -> Iterator[str]:
    for case, gpu in heads():
        every = [parts(case, rows, gpu) for rows in backends]
        cells = [" / ".join(f"{100 * x[name] / sum(x.values()):.1f}" for x in every) for name in PARTS]
        yield f"| {gpu.name} | {case.model} | {case.T} | {TODAY.height(case):,} | {' | '.join(cells)} |\n"


def heights(triton: Rows) -> Iterator[str]:
    for case, gpu in heads():
        cells = []
        for plan in PLANS.values():
            ends = [share(case, triton, gpu, replace(plan, behind=behind)) for behind in (False, True)]
            cells.append(f"{plan.height(case):,}: {ends[0]:.2f}–{ends[1]:.2f}")
        yield f"| {gpu.name} | {case.model} | {case.T} | {' | '.join(cells)} |\n"


def rows_alone(triton: Rows, native: Rows) -> Iterator[str]:
    for gpu in GPUS:
        for T in TEACHERS:
            cells = []
            for model in MODELS:
                cases = [case_of("kl", model, T, divergence) for divergence in ("reverse", "jsd")]
                ratios = [native.seconds(case, gpu) / triton.seconds(case, gpu) for case in cases]
                cells.append(" / ".join(f"{x:.2f}" for x in ratios) + " c" * clustered(cases[0].V, T + 1))
            yield f"| {gpu.name} | {T} | {' | '.join(cells)} |\n"


def gain(triton: Rows, name: str, behind: bool = False) -> float:
    """The most that a plan adds to the share of any head here."""
    plans = [replace(plan, behind=behind) for plan in (TODAY, PLANS[name])]
    shares = [[share(case, triton, gpu, plan) for plan in plans] for case, gpu in heads()]
    return max(new - old for old, new in shares)


def heads() -> Iterator[tuple[Case, GPU]]:
    for gpu in GPUS:
        for model in MODELS:
            for T in (1, 4):
                yield case_of("kl", model, T), gpu


def enough(gpu: GPU) -> float:
    """Tokens from which on two operations a weight and token take as long as 8 bytes a weight."""
    return 4 * GEMM_FLOPS / gpu.bandwidth


def render(counts: Sequence[Row]) -> str:
    """Of the rows of sm_90."""
    triton, native = both(counts)
    low = [f"{c.model} with T = {c.T} ({gpu.name})" for c, gpu in heads() if TODAY.height(c) < enough(gpu)]
    return TEXT.format(
        parts=" | ".join(PARTS), part_rules="---|" * len(PARTS), times="".join(times([triton, native])),
        plans=" | ".join(PLANS), plan_rules="---|" * len(PLANS), heights="".join(heights(triton)),
        models=" | ".join(MODELS), model_rules="---|" * len(MODELS), rows="".join(rows_alone(triton, native)),
        tokens=" or ".join(f"{enough(gpu):.0f} ({gpu.name})" for gpu in GPUS), low=", ".join(low),
        doubled=gain(triton, "6 GiB"), hidden=gain(triton, "6 GiB", behind=True),
        served=gain(triton, "3 GiB, two chunks a GEMM"),
    )  # fmt: skip
