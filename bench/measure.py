"""One contest: every contender checked against float64, then timed in interleaved rounds on the same inputs.

A contender that raises, or whose result is wrong, stays in the table with the reason. Memory is what the process (on
CUDA, the allocator) grew by at its peak beyond the inputs, in a call of its own: it starts with all free memory given
back, which a loop's next step does not.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import work
from bench.cases import Case, Exact, Inputs, draw, exact
from bench.results import OURS, ROOF
from bench.rivals import Contender, Unsupported, ours
from copd_kernels.rows import resolve

MIB = 1 << 20
WATERMARK = Path("/proc/self/clear_refs")
# relative error this library may have in what is timed, and beyond which a rival is wrong: half a gradient, a tenth of
# a loss
GATE = {torch.float32: (1e-5, 5e-5), torch.float16: (1e-4, 3e-3), torch.bfloat16: (1e-4, 5e-3)}
WRONG = (0.1, 0.5)
# upstream gradient, as a fp16 trainer has it: a mean over tokens would be subnormal
LOSS_SCALE = {torch.float16: 2.0**12}


@dataclass
class Entry:
    """A contender's row; times in ms."""

    name: str
    backend: str | None = None
    why: str | None = None
    """no time or a wrong result: the reason"""
    loss_error: float | None = None
    """relative, against float64"""
    gradient_error: float | None = None
    """relative Frobenius norm against float64, the worst of dhidden and dlm_head"""
    ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None


class Clock:
    """Time and peak memory of one call."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.linux = WATERMARK.exists()
        # what imports left is never garbage: looking through it again and again takes longer than a small op
        gc.collect()
        gc.freeze()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def settle(self) -> None:
        """Nothing of what came before runs on, or is left to collect."""
        gc.collect()
        self.wait()

    def time(self, call: Callable[[], object]) -> float:
        """ms of one call"""
        self.settle()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, call: Callable[[], object]) -> float | None:
        """MiB that one call adds at its peak; None where the system cannot tell."""
        before = self.low()
        call()
        return self.risen(before)

    def low(self) -> int:
        """Bytes in use, from which `risen` counts on."""
        self.settle()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if self.linux:
            # freed memory goes back to the system, and the high-water mark down to what is left
            ctypes.CDLL(None).malloc_trim(0)
            WATERMARK.write_text("5")
            return resident("VmRSS")
        return 0

    def risen(self, before: int) -> float | None:
        if self.cuda:
            self.wait()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        return (resident("VmHWM") - before) / MIB if self.linux else None


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def contest(benchmark, case: Case, rivals: dict[str, Contender], rounds: int, backends: tuple[str, ...] = ()) -> dict:
    """This library under pytest-benchmark's clock, the rivals between its rounds; the result as a row of the JSON.

    `backends` names rows of this library that are measured beside its default.
    """
    inputs, clock = draw(case), Clock(case.device)
    want = exact(inputs)
    mine = Entry(OURS, backend=resolve(case.op, None, torch.device(case.device)))
    contenders = {f"{OURS}, {name} rows": ours(name) for name in backends if name != mine.backend} | rivals
    check(mine, ours(), inputs, want)
    assert mine.why is None, f"{case}: {mine}"
    loss_gate, gradient_gate = GATE[case.dtype]
    assert mine.loss_error <= loss_gate, f"{case}: {mine}"
    assert mine.gradient_error is None or mine.gradient_error <= gradient_gate, f"{case}: {mine}"

    entries = [Entry(name) for name in contenders]
    for entry in entries:
        check(entry, contenders[entry.name], inputs, want)
    roof, bare = Entry(ROOF), work.roof(inputs)
    bare()
    calls = [(mine, partial(differentiate, ours(), inputs)), (roof, bare)]
    calls += [(e, partial(differentiate, contenders[e.name], inputs)) for e in entries if e.loss_error is not None]
    for entry, call in calls:
        entry.peak_mib = clock.peak(call)

    def others() -> None:
        for entry, call in calls[1:]:
            entry.ms.append(clock.time(call))
        clock.settle()

    def timed() -> None:
        differentiate(ours(), inputs)
        clock.wait()

    benchmark.pedantic(timed, setup=others, rounds=rounds)
    if benchmark.enabled:
        mine.ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    row = describe(case, inputs) | {"entries": [asdict(entry) for entry in (mine, *entries, roof)]}
    benchmark.extra_info["row"] = row
    return row


@contextmanager
def products(case: Case) -> Iterator[None]:
    """On a CPU, what a GPU's GEMM does with bf16: products of bf16 numbers, summed and kept in fp32.

    Whoever widens its operands gains; dlogits are rounded to bf16, as on a GPU.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if case.device == "cpu" and case.dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def differentiate(run: Contender, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    if not inputs.leaves:
        with torch.no_grad():
            return run(inputs), []
    value = run(inputs)
    upstream = torch.full_like(value, LOSS_SCALE.get(inputs.case.dtype, 1.0))
    return value.detach(), list(torch.autograd.grad(value, inputs.leaves, upstream))


def check(entry: Entry, run: Contender, inputs: Inputs, want: Exact) -> None:
    """The first call: warms up, and fills in the errors or the reason why there is no result."""
    try:
        value, gradients = differentiate(run, inputs)
    except Unsupported as reason:
        entry.why = str(reason)
    except ImportError as error:
        entry.why = f"cannot be imported: {first_line(error)}"
    except Exception as error:  # a rival's failure is a result; ours is asserted on
        entry.why = f"fails: {type(error).__name__}: {first_line(error)}"
        if inputs.case.device == "cuda":
            torch.cuda.empty_cache()
    else:
        entry.loss_error = float(((value.double() - want.value).abs() / want.value.abs()).max())
        if gradients:
            factor = LOSS_SCALE.get(inputs.case.dtype, 1.0)
            pairs = zip(gradients, want.gradients, strict=True)
            entry.gradient_error = max(relative(got, exact, factor) for got, exact in pairs)
        if not (entry.loss_error <= WRONG[0] and (entry.gradient_error or 0) <= WRONG[1]):
            entry.why = "wrong"


def relative(got: Tensor, want: Tensor, factor: float) -> float:
    """||got / factor - want|| / ||want||; a (U, D) `want` stands for N / U repetitions that share the mean."""
    repeats = got.shape[0] // want.shape[0]
    squares = [(part.double() * (repeats / factor) - want).square().sum() for part in got.split(want.shape[0])]
    return float((sum(squares) / repeats).sqrt() / want.norm())


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:120]


def describe(case: Case, inputs: Inputs) -> dict:
    """The case and the work in it, without results."""
    return asdict(case) | {
        "dtype": str(case.dtype).removeprefix("torch."),
        "products": torch.backends.mkldnn.matmul.fp32_precision,
        "D": case.D,
        "V": case.V,
        "passes": work.passes_spent(case),
        "flops": work.flops_needed(case),
        "bytes": work.bytes_needed(inputs),
        "outputs_mib": work.outputs_mib(inputs.leaves),
    }
