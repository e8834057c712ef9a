"""A vocabulary split over ranks gives what the whole one gives: values, gradients, the same bits on every rank."""

import pytest
import torch
from kernel_cases import FLOOR, relative
from split_cases import CHUNKED, KINDS, every_op, heads, leaves, mesh, split


def on_ranks(kinds, dtype, backend):
    over = mesh()
    found = {}
    for kind in kinds:
        mine = [split(head, over) for head in heads(kind, dtype)]
        found[kind] = every_op(mine, backend=backend, **CHUNKED)
    again = every_op(mine, backend=backend, **CHUNKED)
    assert all(same_bits(again[name], x) for name, x in found[kind].items())
    return found


def same_bits(a, b):
    return a.numpy().tobytes() == b.numpy().tobytes()


def rounding(kind, want, dtype):
    """A value near 0 is a difference of sums, in the oracle too, and cannot be better known than these."""
    return float(torch.finfo(dtype).eps * want.numel() ** 0.5 / want.norm()) if kind == "nearly equal" else 0.0


RUNS = {
    "two ranks": (2, KINDS, torch.float64, "torch"),
    "three ranks": (3, KINDS, torch.float64, "torch"),
    "four ranks": (4, KINDS, torch.float64, "torch"),
    "three ranks in fp32": (3, KINDS, torch.float32, "torch"),
    "triton": (2, ("masked words", "padded"), torch.float64, "triton"),
}


@pytest.mark.parametrize("run", RUNS)
def test_every_op_is_as_exact_as_over_whole_rows(ranks, run):
    size, kinds, dtype, backend = RUNS[run]
    found, *others = ranks(size, on_ranks, kinds, dtype, backend)
    for kind in kinds:
        exact = every_op([leaves(head, torch.float64) for head in heads(kind, dtype)], backend="reference")
        alone = every_op(heads(kind, dtype), backend="torch", **CHUNKED)
        for name, want in exact.items():
            mine, one, sure = found[kind][name], alone[name], want.isfinite()
            assert torch.equal(mine.isfinite(), one.isfinite()), (kind, name)
            allowed = 2 * relative(one[sure], want[sure]) + FLOOR[dtype] + rounding(kind, want, dtype)
            error = relative(mine[sure], want[sure])
            assert error <= allowed, f"{kind}, {name}: {error:.2e}, allowed {allowed:.2e}"
    for other in others:
        assert all(same_bits(other[kind][name], x) for kind in kinds for name, x in found[kind].items())
