"""Gradient error against float64 over KL, from teachers nearly equal to the student to far ones.

Two nearly equal distributions have a small gradient, the difference of two large numbers; what was rounded before the
difference is what is lost. The error that fp32 logits leave grows as KL**-0.5.
"""

import pytest
import torch

from bench import measure, rivals
from bench.cases import Case, draw, exact
from bench.results import OURS

LEVELS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def bench_gradient_error(record, scale, device, dtype, divergence):
    contenders = {OURS: rivals.ours()} | rivals.DISTILL
    errors = {name: [] for name in contenders}
    values = []
    for level in LEVELS:
        # small, and the same on every device
        shrink = max((16, 16), scale.shrink)
        case = Case("kl", "qwen3-8b", 32, dtype, device, shrink, divergence=divergence, kl=level)
        inputs = draw(case)
        want = exact(inputs)
        values.append(want.value.item())
        for name, run in contenders.items():
            entry = measure.Entry(name)
            measure.check(entry, run, inputs, want)
            errors[name].append(entry.gradient_error)
        gate = measure.GATE[dtype][1] * max(1.0, (1e-2 / level) ** 0.5 if dtype == torch.float32 else 1.0)
        assert errors[OURS][-1] <= gate, f"{errors[OURS]} at KL {LEVELS[: len(values)]}"
    entries = [{"name": name, "gradient_error": found} for name, found in errors.items()]
    names = {"op": "accuracy", "dtype": str(dtype).removeprefix("torch."), "divergence": divergence}
    record(names | {"value": values, "entries": entries})
