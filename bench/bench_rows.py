"""The rows alone, without their GEMMs: bytes they must move over time, beside a plain copy of as many bytes.

Every logit is read once and every dlogit written once: R·V·(4 (T + 1) + width of dlogits) bytes. The gradient of the
fp32 logits comes in bf16 on a GPU, in fp32 on a CPU.
"""

import pytest
import torch

from bench.cases import MODELS
from bench.measure import Clock
from bench.results import OURS
from copd_kernels.rows import BACKENDS, load, missing


@pytest.mark.parametrize("T", [1, 2, 4])
@pytest.mark.parametrize("model", ["qwen3-8b", "llama-3"])
def bench_rows(benchmark, record, scale, device, model, T):
    R, V = min(2048, scale.N), MODELS[model][1] // scale.shrink[1]
    z = 3 * torch.randn(T + 1, R, V, device=device)
    dlogits = torch.empty(R, V, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    weight = torch.rand(T, R, device=device)
    moved = z.nbytes + dlogits.nbytes
    source, target = torch.empty(2, moved // 2, dtype=torch.uint8, device=device)

    def call(backend):
        return lambda: load(backend).kl(z, 0, list(range(1, T + 1)), "reverse", 0.5, weight, None, dlogits)

    names = [name for name in BACKENDS if missing(name, torch.device(device)) is None]
    if "triton" in names and device == "cpu":
        names.remove("triton")  # an interpreter is not worth timing
    want = call("torch")()
    for name in names:
        torch.testing.assert_close(call(name)(), want, rtol=1e-4, atol=1e-5)
    runs = {f"{name} rows": call(name) for name in names} | {"copy": lambda: target.copy_(source)}
    ms, clock = {name: [] for name in runs}, Clock(device)

    def interleaved() -> None:
        for name, run in runs.items():
            ms[name].append(clock.time(run))

    interleaved()
    ms = {name: [] for name in runs}
    benchmark.pedantic(interleaved, rounds=scale.rounds)
    entries = [{"name": name, "ms": times} for name, times in ms.items()]
    shape = {"model": model, "shrink": scale.shrink, "R": R, "V": V, "T": T, "device": device, "bytes": moved}
    record({"op": "rows", "library": OURS} | shape | {"entries": entries})
