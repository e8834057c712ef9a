"""kl by workspace: what is read and written once a chunk, `dlm_head`'s fp32 accumulator above all, costs less in higher
chunks. `bench/results/counts.md` says between which bounds.
"""

from functools import partial

import pytest
import torch

from bench.cases import Case, draw
from bench.measure import Clock, differentiate
from bench.results import OURS
from copd_kernels import kl
from copd_kernels.rows import missing
from copd_kernels.schedule import WORKSPACE_BYTES

SIZES = (0.5, 1, 2, 4)  # of the default


@pytest.mark.parametrize("T", [1, 4])
def bench_workspace(benchmark, record, scale, device, T):
    case = Case("kl", "qwen3-8b", scale.N, scale.dtype, device, shrink=scale.shrink, T=T)
    if device == "cpu" and not case.quick:
        pytest.skip("a CPU's chunks are low whatever the workspace")
    inputs, clock = draw(case), Clock(device)
    # an interpreter is not worth timing
    every = ("triton", "native") if device == "cuda" else ("native", "torch")
    names = [name for name in every if missing(name, torch.device(device)) is None]

    def run(backend: str, workspace_bytes: int, x) -> torch.Tensor:
        return kl(x.student, x.teachers, backend=backend, workspace_bytes=workspace_bytes)

    entries, calls = [], []
    for backend in names:
        for size in SIZES:
            workspace_bytes = int(size * WORKSPACE_BYTES[device])
            call = partial(differentiate, partial(run, backend, workspace_bytes), inputs)
            call()
            entry = {"name": f"{workspace_bytes / 2**30:g} GiB, {backend} rows", "ms": []}
            entries.append(entry | {"peak_mib": clock.peak(call)})
            calls.append(call)

    def interleaved() -> None:
        for entry, call in zip(entries, calls, strict=True):
            entry["ms"].append(clock.time(call))

    benchmark.pedantic(interleaved, rounds=scale.rounds)
    shape = {
        "model": case.model,
        "shrink": case.shrink,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": device,
    }
    shape |= {"N": case.N, "D": case.D, "V": case.V, "T": T}
    record({"op": "workspace", "library": OURS} | shape | {"entries": entries})
