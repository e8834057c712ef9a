"""A vocabulary split over ranks gives what the whole one gives: values, gradients, the same bits on every rank."""

import pytest
import torch
from kernel_cases import FLOOR, relative
from split_cases import CHUNKED, KINDS, every_op, heads, leaves, mesh, split


def on_ranks(dtype, backend):
    over = mesh()
    found = {}
    for kind in KINDS:
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


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, torch.float64), (3, torch.float64), (4, torch.float64), (3, torch.float32)]
)
def test_every_op_is_as_exact_as_over_whole_rows(ranks, size, dtype):
    found, *others = ranks(size, on_ranks, dtype, "torch")
    for kind in KINDS:
        exact = every_op([leaves(head, torch.float64) for head in heads(kind, dtype)], backend="reference")
        alone = every_op(heads(kind, dtype), backend="torch", **CHUNKED)
        for name, want in exact.items():
            mine, one, sure = found[kind][name], alone[name], want.isfinite()
            assert torch.equal(mine.isfinite(), one.isfinite()), (kind, name)
            allowed = 2 * relative(one[sure], want[sure]) + FLOOR[dtype] + rounding(kind, want, dtype)
            error = relative(mine[sure], want[sure])
            assert error <= allowed, f"{kind}, {name}: {error:.2e}, allowed {allowed:.2e}"
    for other in others:
        assert all(same_bits(other[kind][name], x) for kind in KINDS for name, x in found[kind].items())
