"""mutual_kl against its definition, its properties, and every message."""

import pytest
import torch
from kernel_cases import DIVERGENCES, RUNS, SMALL_WORKSPACE, assert_as_good_as_torch, cast, gradients, make

from copd_kernels import kl, mutual_kl


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("edges", [None, [(1, 0), (0, 1), (2, 0)], [(0, 2)]], ids=["all", "hub", "one"])
def test_matches_reference(edges, divergence, backend, device):
    N, V = 37, 211
    heads = [make(N, 19, V, softcap=5.0), make(N, 8, V, scale=0.5), make(N, 19, V)]
    E = 6 if edges is None else len(edges)
    options = {"edge_weight": torch.rand(E), "token_weight": torch.rand(N) > 0.3}
    run = {}
    for name, dtype, where in (
        (backend, torch.float32, device),
        ("reference", torch.float32, device),
        ("exact", torch.float64, "cpu"),
    ):
        hs = [cast(h, dtype, where) for h in heads]
        chosen = "reference" if name == "exact" else name
        moved = {k: v.to(where) for k, v in options.items()}
        workspace = {"backend": chosen, "workspace_bytes": SMALL_WORKSPACE}
        result = mutual_kl(hs, edges=edges, divergence=divergence, beta=0.3, temperature=1.2, **moved, **workspace)
        wrt = [x for h in hs for x in (h.hidden, h.lm_head)]
        grads = torch.autograd.grad(result.loss, wrt, allow_unused=True, materialize_grads=True)
        run[name] = {"loss": result.loss, "edge_kl": result.edge_kl, **{f"{i}": g for i, g in enumerate(grads)}}
        assert not result.edge_kl.requires_grad
    for name in run["exact"]:
        results = (run[which][name] for which in (backend, "reference", "exact"))
        assert_as_good_as_torch(name, *results, torch.float32)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_is_the_sum_of_kl_over_its_edges(backend, device):
    heads = [make(37, 16, 211, device=device) for _ in range(3)]
    result = mutual_kl(heads, backend=backend)
    edges = [(s, t) for s in range(3) for t in range(3) if s != t]
    single = [kl(heads[s], heads[t], backend=backend) for s, t in edges]
    torch.testing.assert_close(result.edge_kl, torch.stack(single).detach())
    torch.testing.assert_close(result.loss, sum(single))
    for head in heads:
        mine, theirs = gradients(result.loss, head), gradients(sum(single), head)
        for name, g in mine.items():
            torch.testing.assert_close(g, theirs[name], rtol=1e-4, atol=1e-7)


def test_a_head_that_only_teaches_gets_no_gradient():
    student, teacher = make(5, 8, 50), make(5, 8, 50)
    mutual_kl([student, teacher], edges=[(0, 1)]).loss.backward()
    assert student.hidden.grad.abs().sum() > 0
    assert teacher.hidden.grad is None


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_gives_finite_gradients_and_no_token_gives_zero(dtype, backend, device):
    for N in (0, 7):
        heads = [make(N, 8, 50, dtype, device) for _ in range(2)]
        result = mutual_kl(heads, backend=backend)
        assert (result.loss > 0) == (N > 0)
        for head in heads:
            assert all(g.isfinite().all() for g in gradients(result.loss, head).values())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("heads must have at least two entries; got 1", {"heads": 1}),
        ("edges must not be empty", {"edges": []}),
        (r"edges must be pairs of two different indices in 0..1; got \(0, 0\)", {"edges": [(0, 0)]}),
        (r"edges must be pairs of two different indices in 0..1; got \(0, 2\)", {"edges": [(0, 2)]}),
        ("edges must name no pair twice", {"edges": [(0, 1), (0, 1)]}),
        (r"edge_weight must have shape \(E=2,\); got \(3,\)", {"edge_weight": torch.ones(3)}),
        ("token_weight must have shape", {"token_weight": torch.ones(3)}),
        ("divergence must be one of", {"divergence": "l2"}),
    ],
)
def test_bad_values_are_named(message, arguments):
    heads = [make(5, 8, 50) for _ in range(arguments.pop("heads", 2))]
    with pytest.raises(ValueError, match="mutual_kl: " + message):
        mutual_kl(heads, **arguments)


def test_heads_of_different_vocabularies_are_named():
    with pytest.raises(
        ValueError, match=r"mutual_kl: heads\[1\] must have heads\[0\]'s vocabulary of 50 tokens; got 51"
    ):
        mutual_kl([make(5, 8, 50), make(5, 8, 51)])
