"""agreement against its definition, its properties, and every message."""

import pytest
import torch
from kernel_cases import RUNS, SHAPES, SMALL_WORKSPACE, assert_as_good_as_torch, cast, make

from copd_kernels import Head, agreement


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, backend, device):
    N, D, V = SHAPES[shape]
    student = make(N, D, V)
    teachers = [make(N, D, V, like=student, noise=0.3), make(N, D + 1, V, softcap=7.0)]
    exact = agreement(cast(student, torch.float64), [cast(t, torch.float64) for t in teachers], backend="reference")
    student, teachers = cast(student, torch.float32, device), [cast(t, torch.float32, device) for t in teachers]
    eager = agreement(student, teachers, backend="reference")
    ours = agreement(student, teachers, backend=backend, workspace_bytes=max(SMALL_WORKSPACE, 12 * V))
    for name in ("forward_kl", "reverse_kl"):
        assert_as_good_as_torch(name, *(getattr(x, name) for x in (ours, eager, exact)), torch.float32)
    assert torch.equal(ours.overlap.cpu().double(), exact.overlap.float().double())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("k", [1, 3, 40])
def test_equal_logits_rank_by_id(k, backend, device):
    # logits of a handful of values only: ties everywhere, also across the boundary
    hidden = torch.ones(9, 1, device=device)
    heads = [Head(hidden, torch.randint(0, 4, (40, 1), device=device).float()) for _ in range(3)]
    got = agreement(heads[0], heads[1:], k=k, backend=backend)
    want = agreement(heads[0], heads[1:], k=k, backend="reference")
    assert torch.equal(got.overlap, want.overlap)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_head_agrees_with_itself(backend, device):
    head = make(9, 8, 211, device=device)
    got = agreement(head, head, backend=backend)
    assert (got.overlap == 1).all()
    assert got.forward_kl.abs().max() < 1e-6
    assert got.reverse_kl.abs().max() < 1e-6


def test_shapes_are_kept_and_no_gradient_flows():
    student, teacher = make(12, 8, 50), make(12, 8, 50)
    shaped = [Head(h.hidden.view(3, 4, 8), h.lm_head) for h in (student, teacher)]
    for x in agreement(shaped[0], [shaped[1]] * 2):
        assert x.shape == (2, 3, 4)
        assert not x.requires_grad
    empty = agreement(make(0, 8, 50), make(0, 8, 50))
    assert empty.overlap.shape == (1, 0)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("teachers must not be empty", {"teachers": []}),
        ("k must be in 1..50; got 0", {"k": 0}),
        ("k must be in 1..50; got 51", {"k": 51}),
        ("temperature must be positive", {"temperature": 0}),
    ],
)
def test_bad_values_are_named(message, arguments):
    with pytest.raises(ValueError, match="agreement: " + message):
        agreement(make(5, 8, 50), **{"teachers": make(5, 8, 50)} | arguments)
