"""What the counts of `counts.py` bound on a GPU: a sweep's time by resource, and an op's share of its bare GEMMs.

Every resource is taken to be used at its rate without a gap, and a sweep to last as long as the one it needs longest.
What follows is how good an op can be, not how good it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import TYPE_CHECKING

import torch

from bench import work
from bench.cases import MODELS, Case
from copd_kernels import schedule

if TYPE_CHECKING:
    from bench.counts import Row

N = 16_384
PROCESSORS, CLOCK = 132, 1.75e9
# of a multiprocessor of compute capability 9.0 a clock, as CUDA's programming guide has them: threads' instructions,
# those of `sass.ALU`, special functions, bytes of shared memory and of the first cache together
RATES = {"issue": 128, "alu": 64, "special": 16, "L1": 128}
GEMM_FLOPS = 0.70 * 989e12
LAUNCH = 3e-6
DIVERGENCES = ("reverse", "forward", "symmetric", "jsd")
# of a block of csrc/ for logits, its columns a segment, and the most blocks of a cluster
SHARED_BYTES, SEGMENT, CLUSTER = 227 * 1024 - 4480, 2048, 16
TEXT = """
## What bounds a sweep

On sm_90, in picoseconds a pair, from the counts above and these rates: {processors} multiprocessors at {clock:g} GHz,
each with {issue} instructions of a thread a clock, {alu} of `alu`, {special} of `special` and {L1} bytes of shared
memory and first cache; device memory at nine tenths of its peak, {memories}. A sweep
cannot last less than its largest entry. Predicted by count, not measured.

| rows | sweep | T | issue | alu | special | L1 | {names} |
|---|---|---|---|---|---|---|{rules}
{bounds}
## Share of the GEMMs

The GEMMs that an op needs over the time of all it does, predicted by count, not measured: {tokens} tokens, bf16,
forward and backward, default workspace. Assumed:

- GEMMs reach {gemms:.0f} TFLOP/s, 0.70 of the peak, and nothing overlaps with them, not even the fp32 accumulator of
  `dlm_head`, which each of its GEMMs reads and writes: 8 bytes a weight and chunk.
- Raw logits lack a bias and a token's temperature beside the softcap; biases are read from the second cache.
- Sweeps last as long as their bound; what the C++ rows read from a cluster is copied while the gradient is made.
- A launch beside them costs {launch:g} µs.

The first figure is that of Triton's rows, the second that of the C++ rows. `mutual_kl` has T + 1 heads. `logprob` makes
its logits again, a fourth GEMM pass where three are needed. `agreement` is not here: its time is torch.topk's.

| | op | T | launches a chunk | {models} |
|---|---|---|---|{model_rules}
{shares}"""


@dataclass(frozen=True)
class GPU:
    name: str
    peak: float
    """bytes a second of its memory"""

    @property
    def bandwidth(self) -> float:
        return 0.9 * self.peak


GPUS = (GPU("H100", 3.35e12), GPU("H200", 4.8e12))


def bounds(row: Row) -> dict[str, float]:
    """Seconds a pair that each resource of a multiprocessor needs."""
    used = {"issue": row.instructions, "alu": row.alu, "special": row.special}
    used["L1"] = row.shared_bytes + row.global_bytes
    return {name: used[name] / (rate * PROCESSORS * CLOCK) for name, rate in RATES.items()}


def memory_bytes(row: Row) -> float:
    """Bytes of device memory a pair; a cluster reads its rows once, for the statistics; biases stay in the cache."""
    if "raw" in row.sweep:
        return row.global_bytes * 2 / 3
    once = 4 * (row.T + 1) / row.T if row.sweep.startswith("kl") else 4.0
    return row.global_bytes + (once if row.rows.endswith("cluster") and "statistics" in row.sweep else 0)


class Rows:
    """The sweeps of one backend."""

    def __init__(self, backend: str, counts: Sequence[Row]) -> None:
        self.backend = backend
        self.counts = {(row.rows, row.sweep, row.T): row for row in counts}

    def find(self, rows: str, sweep: str, T: int) -> Row:
        """Of this T, or of one teacher at a time."""
        found = self.counts.get((rows, sweep, T))
        return found or self.counts[rows, sweep, 1]

    def seconds(self, case: Case, gpu: GPU, raw: bool = False) -> float:
        """A student's column of logits with all its teachers; `raw`: Triton's statistics complete them."""
        divergence = case.divergence
        op = "logprob" if case.op == "logprob" else "kl"
        T = case.T if case.op in ("kl", "mutual_kl") else 1
        heads = 1 if op == "logprob" else T + 1
        place, suffix = "Triton", ""
        if self.backend == "native":
            place = "C++, cluster" if clustered(case.V, heads) else "C++, memory"
            suffix = f", {divergence}" if op == "kl" else ""
        sweeps = [self.find(place, f"{op} statistics{', raw logits' if raw else suffix}", T)]
        if op == "kl" and divergence == "jsd":
            sweeps.append(self.find(place, "kl sums, jsd", T))
        sweeps.append(self.find(place, f"{op} gradient" + (f", {divergence}" if op == "kl" else ""), T))
        compute = [T * max(bounds(row).values()) for row in sweeps]
        memory = [T * memory_bytes(row) / gpu.bandwidth for row in sweeps]
        if place == "C++, cluster":
            # the ring is filled while the last sweep frees it
            return sum(compute[:-1]) + max(compute[-1], sum(memory))
        return sum(map(max, compute, memory))

    def softcap(self, case: Case, gpu: GPU) -> float:
        """Of every head's logits: in Triton's first sweep, in the C++ rows a sweep of its own."""
        if self.backend == "triton":
            return self.seconds(case, gpu, raw=True) - self.seconds(case, gpu)
        row = self.find("C++, memory", "softcap", 1)
        once = max(*bounds(row).values(), memory_bytes(row) / gpu.bandwidth)
        return sum(sweep.project for sweep in work.sweeps(case)) * once


def clustered(V: int, heads: int) -> bool:
    """Whether a row of every head fits the shared memory of a cluster, as `cut` in csrc/ decides."""
    slots = SHARED_BYTES // (heads * SEGMENT * 4 + 8)
    return ceil(ceil(V / CLUSTER) / SEGMENT) <= slots


@dataclass(frozen=True)
class Plan:
    """What may be chosen of an op's chunks."""

    workspace_bytes: int = 0
    served: int = 1
    """chunks whose dlogits one dlm_head GEMM takes"""
    behind: bool = False
    """whether a dlm_head GEMM moves its accumulator while it multiplies"""

    def height(self, case: Case) -> int:
        heads = {"logprob": 1, "routed_kl": 2}.get(case.op, case.T + 1)
        device = torch.device("cuda")
        row_bytes = schedule.row_stride(case.V, device) * (4 * heads + self.served * case.dtype.itemsize)
        tokens = case.N // case.T if case.op == "routed_kl" else case.N
        chunk = schedule.chunks(tokens, schedule.budget(self.workspace_bytes, device) // row_bytes)[0]
        return chunk.stop - chunk.start


TODAY = Plan()


def launches(case: Case, backend: str) -> int:
    """A chunk's, beside its GEMMs."""
    return counted(case.op, case.T, case.divergence, case.softcap, backend)


@cache
def counted(op: str, T: int, divergence: str, softcap: float | None, backend: str) -> int:
    from bench import launches

    if op == "logprob":
        found = launches.of_logprob(backend, softcap=softcap)
    elif op == "mutual_kl":
        found = launches.of_mutual_kl(backend, T + 1, divergence, softcap=softcap)
    else:
        found = launches.of_kl(backend, T, divergence, routed=op == "routed_kl", softcap=softcap)
    return found.kernels.total()


def parts(case: Case, rows: Rows, gpu: GPU, plan: Plan = TODAY) -> dict[str, float]:
    """Seconds a logit: the GEMMs that the op needs, and what it does beside them."""
    gemm = 2 * case.D / GEMM_FLOPS
    needed = work.flops_needed(case) / (2.0 * case.N * case.V * case.D) * gemm
    students = case.T + 1 if case.op == "mutual_kl" else 1
    height = plan.height(case)
    # each dlm_head GEMM of a chunk reads and writes the accumulator; at the end it is scaled into the gradient
    accumulator = case.D * 8 / (height * plan.served) / gpu.bandwidth
    if plan.behind:
        accumulator = max(0.0, accumulator - gemm)
    beside = {
        "GEMMs": needed,
        "again": work.passes_spent(case) * gemm - needed,
        "rows": students * rows.seconds(case, gpu),
        "accumulator": students * (accumulator + case.D * 6 / case.N / gpu.bandwidth),
        "launches": launches(case, rows.backend) * LAUNCH / (height * case.V),
        "softcap": 0.0,
    }
    if case.softcap:
        beside["softcap"] = rows.softcap(case, gpu)
    return beside


def share(case: Case, rows: Rows, gpu: GPU, plan: Plan = TODAY) -> float:
    """Of the time of an op that its needed GEMMs take."""
    times = parts(case, rows, gpu, plan)
    return times["GEMMs"] / sum(times.values())


def case_of(op: str, model: str, T: int, divergence: str = "reverse") -> Case:
    return Case(op, model, N, torch.bfloat16, "cuda", T=T, divergence=divergence)


def ops() -> Iterator[tuple[str, str, int]]:
    """(op, divergence, T)"""
    for divergence in DIVERGENCES:
        for T in (1, 2, 4):
            yield "kl", divergence, T
    yield "routed_kl", "reverse", 4
    for T in (1, 2):
        yield "mutual_kl", "reverse", T
    yield "logprob", "", 1


def render(counts: Sequence[Row]) -> str:
    """What follows from the rows of sm_90."""
    lines = []
    for row in counts:
        ps = [f"{seconds * 1e12:.2f}" for seconds in bounds(row).values()]
        ps += [f"{memory_bytes(row) / gpu.bandwidth * 1e12:.2f}" for gpu in GPUS]
        lines.append(f"| {row.rows} | {row.sweep} | {row.T} | {' | '.join(ps)} |\n")
    backends = both(counts)
    shares = []
    for gpu in GPUS:
        for op, divergence, T in ops():
            cases = [case_of(op, model, T, divergence or "reverse") for model in MODELS]
            cells = [" / ".join(f"{share(case, rows, gpu):.2f}" for rows in backends) for case in cases]
            beside = " / ".join(str(launches(cases[0], rows.backend)) for rows in backends)
            name = f"{op}, {divergence}" if divergence else op
            shares.append(f"| {gpu.name} | {name} | {T} | {beside} | {' | '.join(cells)} |\n")
    return TEXT.format(
        processors=PROCESSORS, clock=CLOCK / 1e9, **RATES,
        tokens=f"{N:,}", gemms=GEMM_FLOPS / 1e12, launch=LAUNCH * 1e6,
        memories=", ".join(f"{gpu.name} {gpu.peak / 1e12:g} TB/s" for gpu in GPUS),
        names=" | ".join(gpu.name for gpu in GPUS), rules="---|" * len(GPUS),
        models=" | ".join(MODELS), model_rules="---|" * len(MODELS), bounds="".join(lines), shares="".join(shares),
    )  # fmt: skip


def both(counts: Sequence[Row]) -> list[Rows]:
    return [Rows("triton", counts), Rows("native", counts)]
