"""Rows that are no distribution, what has no weight, and where a divergence ends, on every backend."""

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    FLOOR,
    RUNS,
    SMALL_WORKSPACE,
    assert_as_good_as_torch,
    cast,
    gradients,
    make,
    relative,
)

from copd_kernels import Head, agreement, kl, logprob, mutual_kl, schedule
from copd_kernels.reference import diverge, log_softmax
from copd_kernels.rows import load
from copd_kernels.rows.stats import logprob as logprob_from

V = 4100
# what makes a row of logits no distribution, a row each; the first row and the last stay as they are
SPOILS = ["no mass", "two infinities", *((torch.nan, column) for column in (0, 1, 4099)), (torch.inf, 130)]
R = len(SPOILS) + 2
BAD = slice(1, -1)


def spoil(rows):
    """(R, V) logits with those rows spoiled."""
    rows = rows.clone()
    rows[1] = -torch.inf
    rows[2, [3, 3000]] = torch.inf
    for r, (value, column) in enumerate(SPOILS[2:], start=3):
        rows[r, column] = value
    return rows


def run_kl(backend, z, weight, divergence, dtype=None):
    dlogits = torch.full_like(z[0], torch.nan, dtype=dtype)
    value = load(backend).kl(z, 0, list(range(1, z.shape[0])), divergence, 0.3, weight, None, dlogits)
    return value, dlogits


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("side", [0, 1, 2], ids=["student", "teacher", "second teacher"])
def test_a_row_that_is_no_distribution_gives_nan_and_touches_no_other(side, divergence, backend, device):
    z = 3 * torch.randn(3, R, V, device=device)
    weight = torch.rand(2, R, device=device) + 0.1
    value, dlogits = run_kl(backend, z, weight, divergence)
    z[side] = spoil(z[side])
    got, g = run_kl(backend, z, weight, divergence)
    log_p, log_q = torch.log_softmax(z.double(), -1)[[0, 0]], torch.log_softmax(z.double(), -1)[1:]
    assert torch.equal(got.isnan(), diverge(log_p, log_q, divergence, 0.3).isnan())
    assert got.isnan().any(0)[BAD].all()
    assert g[BAD].isnan().all()
    for r in (0, -1):
        assert torch.equal(got[:, r], value[:, r])
        assert torch.equal(g[r], dlogits[r])


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_row_that_is_no_distribution_has_no_log_probabilities(backend, device):
    z, tokens = 3 * torch.randn(1, R, V, device=device), torch.randint(0, V, (R,), device=device)
    z[0] = spoil(z[0])
    upstream, g = torch.rand(3, R, device=device) + 0.1, torch.full_like(z[0], 7)
    side = load(backend).logprob(z, tokens)
    for number in logprob_from(side):
        assert number[BAD].isnan().all()
        assert number[[0, -1]].isfinite().all()
    load(backend).logprob_grad(z, side, tokens, *upstream, None, g)
    assert g[BAD].isnan().all()
    assert g[[0, -1]].isfinite().all()
    upstream[:, BAD] = 0
    load(backend).logprob_grad(z, side, tokens, *upstream, 20.0, g)
    assert (g[BAD] == 0).all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_has_no_weight_contributes_exactly_nothing_to_a_gradient(divergence, backend, device):
    z = 3 * torch.randn(3, R, V, device=device)
    weight = torch.rand(2, R, device=device) + 0.1
    weight[1] = 0
    bad = z.clone()
    bad[2] = spoil(z[2])
    bad[2, 0, 5] = -torch.inf
    _, g = run_kl(backend, bad, weight, divergence)
    torch.testing.assert_close(g, run_kl(backend, z[:2].contiguous(), weight[:1], divergence)[1])
    weight[:, BAD] = 0
    bad[:2] = torch.stack([spoil(rows) for rows in z[:2]])
    _, g = run_kl(backend, bad, weight, divergence)
    assert (g[BAD] == 0).all()
    assert g.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), [*RUNS, pytest.param("reference", "cpu", id="reference-cpu")])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_of_weight_zero_may_hold_anything(divergence, backend, device):
    student, teacher, other = (make(6, 5, 31, device=device) for _ in range(3))
    excluded = torch.zeros(31, device=device)
    excluded[4] = -torch.inf
    weight = torch.tensor([1.0, 0.0], device=device)
    want = kl(student, teacher, divergence=divergence, backend=backend)
    for second in (Head(other.hidden, other.lm_head, excluded), Head(other.hidden, other.lm_head * torch.nan)):
        got = kl(student, [teacher, second], divergence=divergence, teacher_weight=weight, backend=backend)
        torch.testing.assert_close(got, want)
        for name, g in gradients(got, student).items():
            torch.testing.assert_close(g, gradients(want, student)[name])


@pytest.mark.parametrize(("backend", "device"), [*RUNS, pytest.param("reference", "cpu", id="reference-cpu")])
def test_an_edge_of_weight_zero_may_end_anywhere(backend, device):
    heads = [make(6, 5, 31, device=device) for _ in range(3)]
    with torch.no_grad():
        heads[2].lm_head[:] = torch.nan
    options = {"edges": [(0, 1), (1, 0), (0, 2), (2, 0)], "backend": backend}
    out = mutual_kl(heads, edge_weight=torch.tensor([1.0, 0.5, 0.0, 0.0], device=device), **options)
    assert out.edge_kl.isnan().tolist() == [False, False, True, True]
    torch.testing.assert_close(out.loss, out.edge_kl[0] + 0.5 * out.edge_kl[1])
    for head in heads[:2]:
        assert all(g.isfinite().all() for g in gradients(out.loss, head).values())


@pytest.mark.parametrize(("backend", "device"), [*RUNS, pytest.param("reference", "cpu", id="reference-cpu")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_is_no_distribution_agrees_with_nothing(side, backend, device):
    student, teacher = make(6, 5, 31, device=device), make(6, 5, 31, device=device)
    with torch.no_grad():
        (student if side == "student" else teacher).hidden[2] = torch.nan
    for x in agreement(student, teacher, backend=backend):
        assert x.isnan().tolist() == [[n == 2 for n in range(6)]]


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_token_without_upstream_gradient_may_be_nan(backend, device):
    head = make(6, 5, 31, device=device)
    with torch.no_grad():
        head.hidden[3] = torch.nan
    out = logprob(head, torch.arange(6, device=device), backend=backend)
    assert out.logp.isnan().tolist() == [n == 3 for n in range(6)]
    upstream = torch.ones(6, device=device)
    upstream[3] = 0
    for g in gradients(out.logp, head, upstream).values():
        assert g.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [1e-8, 1e-4, 0.02, 0.98, 1 - 1e-4, 1 - 1e-6, 1 - 1e-8])
def test_the_jsd_is_right_where_beta_nears_its_ends(beta, dtype, backend, device):
    student, teacher = make(9, 16, 300), make(9, 16, 300)
    run = {}
    for name, kind, where in ((backend, dtype, device), ("eager", dtype, device), ("exact", torch.float64, "cpu")):
        s, t = cast(student, kind, where), cast(teacher, kind, where)
        options = {"divergence": "jsd", "beta": beta, "backend": backend if name == backend else "reference"}
        value = kl(s, t, **options)
        run[name] = {"value": value, **gradients(value, s)}
    for name in run["exact"]:
        assert_as_good_as_torch(name, run[backend][name], run["eager"][name], run["exact"][name], dtype)


# of logits and, where teacher and student are alike, of the noise between them
ALIKE = {"uniform": (1e-3, None), "nearly uniform": (0.05, None), "near": (3.0, 0.05), "nearer": (3.0, 5e-4)}


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alike", ALIKE)
def test_values_of_nearly_equal_rows_are_right_to_a_rounding_of_their_log_ratios(alike, divergence, backend, device):
    """Each value is a difference of mean log-ratios, so it cannot be better known than the largest of them."""
    spread, noise = ALIKE[alike]
    student = make(16, 32, 300, device=device, spread=spread)
    like = {} if noise is None else {"like": student, "noise": noise}
    teacher = make(16, 32, 300, device=device, spread=spread, **like)
    wide = cast(student, torch.float64), cast(teacher, torch.float64)
    options = {"divergence": divergence, "reduction": "none"}
    exact = kl(*wide, backend="reference", **options)
    eager = kl(student, teacher, backend="reference", **options)
    log_ratio = (log_softmax(wide[0]) - log_softmax(wide[1])).abs().max()
    rounding = float(torch.finfo(torch.float32).eps * log_ratio * 16**0.5 / exact.norm())
    allowed = 2 * relative(eager, exact) + FLOOR[torch.float32] + rounding
    assert relative(kl(student, teacher, backend=backend, **options), exact) <= allowed


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", ["reverse", "symmetric"])
def test_a_gradient_beyond_half_precision_is_infinite_and_never_a_wrong_number(divergence, backend, device):
    """A teacher masks words with fp16's lowest number; the student gives them 2 %, and next to nothing."""
    z = torch.zeros(2, 3, 50, device=device)
    z[1, 0, 7] = z[1, 1, 7] = -65504
    z[0, 1, 7] = -20
    weight = torch.full((1, 3), 256.0, device=device)
    _, wide = run_kl(backend, z, weight, divergence)
    _, narrow = run_kl(backend, z, weight, divergence, torch.float16)
    assert wide[0].abs().max() > 65504
    assert narrow[0].isinf().any()
    assert torch.equal(narrow, wide.half())


def apart(rows, gap=5):
    """The same rows, with NaN between them."""
    wide = torch.full((*rows.shape[:-1], rows.shape[-1] + gap), torch.nan, dtype=rows.dtype, device=rows.device)
    wide[..., :-gap] = rows
    return wide[..., :-gap]


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_lies_between_rows_reaches_no_divergence(divergence, backend, device):
    z, weight = 3 * torch.randn(3, 4, 1003, device=device), torch.rand(2, 4, device=device)
    value, dlogits = run_kl(backend, z, weight, divergence)
    spread = apart(z)
    got = load(backend).kl(spread, 0, [1, 2], divergence, 0.3, weight, None, spread[0])
    assert torch.equal(got, value)
    assert torch.equal(spread[0], dlogits)
    assert spread[0].as_strided((4, 5), (1008, 1), 1003).isnan().all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_what_lies_between_rows_reaches_no_other_result(backend, device):
    rows = load(backend)
    z, upstream = 3 * torch.randn(2, 4, 1003, device=device), torch.rand(3, 4, device=device)
    tokens, dlogits = torch.randint(0, 1003, (4,), device=device), torch.full_like(z[0], torch.nan)
    side, spread, out = rows.logprob(z[:1]), apart(z), apart(torch.full_like(z[0], torch.nan), 7)
    for got, want in zip(rows.logprob(spread[:1]), side, strict=True):
        assert torch.equal(got, want)
    rows.logprob_grad(z[:1], side, tokens, *upstream, 2.0, dlogits)
    rows.logprob_grad(spread[:1], side, tokens, *upstream, 2.0, out)
    assert torch.equal(out, dlogits)
    for got, want in zip(rows.agreement(spread, 0, [1], 5), rows.agreement(z, 0, [1], 5), strict=True):
        assert torch.equal(got, want)
    lacks = torch.randn(1003, device=device), 2.0, torch.rand(4, device=device) + 0.5
    rows.complete(spread[0], *lacks)
    rows.complete(z[0], *lacks)
    assert torch.equal(spread, z)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_rows_of_a_ragged_vocabulary_start_aligned_on_a_gpu_and_nothing_else_changes(backend, device, monkeypatch):
    tokens = torch.randint(0, 211, (37,), device=device)

    def run():
        heads = [make(37, 8, 211, device=device) for _ in range(2)]
        loss = kl(*heads, divergence="symmetric", backend=backend, workspace_bytes=SMALL_WORKSPACE)
        results = loss, *logprob(heads[0], tokens, backend=backend, recompute=False)
        return [x.detach() for x in results] + [*gradients(loss + results[1].sum(), heads[0]).values()]

    torch.manual_seed(0)
    want = run()
    monkeypatch.setattr(schedule, "ALIGNED", {"cpu": 16, "cuda": 1})
    torch.manual_seed(0)
    got = run()
    assert schedule.Workspace(5, 1, 211, torch.empty(0), 0).logits(slice(0, 5)).stride() == (5 * 224, 224, 1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
