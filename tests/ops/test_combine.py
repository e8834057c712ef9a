"""Several teachers as one, by their mixture or their product, against the definitions."""

import pytest
import torch
from kernel_cases import DIVERGENCES, RUNS, assert_as_good_as_torch, cast, each, gradients, make, relative

from copd_kernels import Head, kl
from copd_kernels.reference import diverge, log_softmax

# two chunks of them for four heads, the second shorter
N, D, V = 7, 16, 67
WORKSPACE = 4_300
KINDS = ("mixture", "product")


def by_hand(student, teachers, weight, combine, divergence, beta=0.5, temperature=1.0):
    """In float64: w·D of each token."""
    log_p, *log_q = (log_softmax(cast(h, torch.float64), temperature).detach() for h in (student, *teachers))
    share = (weight / weight.sum(0)).double().unsqueeze(-1)
    stacked = torch.stack(log_q)
    mixture, product = (share * stacked.exp()).sum(0).log(), (share * stacked).sum(0).log_softmax(-1)
    together = mixture if combine == "mixture" else product
    return weight.double().sum(0) * diverge(log_p, together, divergence, beta)


@pytest.mark.parametrize(("backend", "device", "divergence", "combine"), each(DIVERGENCES, KINDS))
def test_matches_reference_and_its_definition(combine, divergence, backend, device):
    student = make(N, D, V, softcap=4.0, bias=torch.randn(V).requires_grad_())
    teachers = [make(N, 8, V, softcap=9.0), make(N, D, V, scale=1.5), make(N, 5, V)]
    weight, tokens = torch.rand(3, N), torch.rand(N)
    weight[0, 2] = weight[2, 2] = weight[1, 3] = tokens[::4] = weight[:, 5] = 0
    options = {"divergence": divergence, "beta": 0.3, "temperature": 1.7, "combine": combine}
    made = []
    runs = (backend, torch.float32, device), ("reference", torch.float32, device), ("reference", torch.float64, "cpu")
    for name, dtype, where in runs:
        s, *ts = (cast(h, dtype, where) for h in (student, *teachers))
        weights = {"teacher_weight": weight.to(where), "token_weight": tokens.to(where)}
        value = kl(s, ts, backend=name, workspace_bytes=WORKSPACE, reduction="none", **weights, **options)
        u = torch.linspace(-1, 2, N, dtype=value.dtype, device=where)
        made.append({"value": value, **gradients(value, s, u)})
        total = kl(s, ts, backend=name, workspace_bytes=WORKSPACE, reduction="sum", **weights, **options)
        made[-1] |= {f"{key} of the sum": g for key, g in gradients(total, s).items()}
    for name in made[0]:
        assert_as_good_as_torch(name, *(x[name] for x in made), torch.float32)
    some = torch.tensor([1, 2, 3, 6])
    want = tokens * torch.nan_to_num(by_hand(student, teachers, weight, combine, divergence, 0.3, 1.7))
    torch.testing.assert_close(made[0]["value"][some].cpu().double(), want[some].double(), rtol=1e-5, atol=1e-6)
    assert (made[0]["value"][[0, 4, 5]] == 0).all()


@pytest.mark.parametrize("combine", ["mean", *KINDS])
def test_equal_teachers_are_one_of_their_weight(combine):
    student, teacher = make(N, D, V, torch.float64), make(N, D, V, torch.float64)
    weight = torch.rand(3, dtype=torch.float64)
    got = kl(student, [teacher] * 3, teacher_weight=weight, combine=combine)
    torch.testing.assert_close(got, weight.sum() * kl(student, teacher))
    again = gradients(weight.sum() * kl(student, teacher), student)
    for name, g in gradients(got, student).items():
        torch.testing.assert_close(g, again[name])


def test_a_mixture_is_no_further_and_a_product_is_what_the_mean_is_nearest_to():
    student, teachers = make(N, D, V, torch.float64), [make(N, D, V, torch.float64) for _ in range(3)]
    mean, mixture, product = (kl(student, teachers, combine=x, reduction="none") for x in ("mean", *KINDS))
    assert (mixture <= mean).all()
    # sum_j w_j KL(p || q_j) = KL(p || m) + a constant: the same gradient
    for name, g in gradients(mean.sum(), student).items():
        torch.testing.assert_close(g, gradients(product.sum(), student)[name])


@pytest.mark.parametrize(("backend", "device", "divergence", "combine"), each(DIVERGENCES, KINDS))
def test_nearly_equal_distributions_keep_their_gradient(combine, divergence, backend, device):
    student = make(16, 32, 500, device=device)
    teachers = [make(16, 32, 500, device=device, like=student, noise=0.07) for _ in range(2)]
    exact = cast(student, torch.float64)
    options = {"divergence": divergence, "combine": combine}
    want = kl(exact, [cast(t, torch.float64) for t in teachers], backend="reference", **options)
    assert 1e-3 < want < 1e-1
    got = kl(student, teachers, backend=backend, **options)
    assert relative(got, want) < 1e-5
    wanted = gradients(want, exact)
    assert max(relative(g, wanted[name]) for name, g in gradients(got, student).items()) < 5e-5


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("combine", KINDS)
def test_what_has_no_weight_says_nothing_and_nan_comes_out(combine, backend, device):
    student, first, second = (make(N, D, V, device=device) for _ in range(3))
    weight = torch.rand(2, N, device=device)
    weight[1, 2] = 0
    with torch.no_grad():
        second.hidden[2], second.hidden[4] = torch.nan, torch.inf
    value = kl(student, [first, second], teacher_weight=weight, combine=combine, reduction="none", backend=backend)
    assert value.isnan().nonzero().tolist() == [[4]]
    alone = kl(student, first, reduction="none", backend=backend)
    torch.testing.assert_close(value[2], weight[0, 2] * alone[2])
    (dhidden,) = torch.autograd.grad(value.sum(), student.hidden)
    assert dhidden.isnan().any(1).nonzero().tolist() == [[4]]
    broken = Head(second.hidden.detach(), torch.full_like(second.lm_head, torch.nan))
    silent = torch.tensor([1.0, 0.0], device=device)
    got = kl(student, [first, broken], teacher_weight=silent, combine=combine, backend=backend)
    torch.testing.assert_close(got, kl(student, first, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "native", "reference"])
def test_words_that_one_teacher_masks(backend):
    mask = torch.zeros(V)
    mask[:60] = -torch.inf
    student, free = make(N, D, V), make(N, D, V)
    bound = make(N, D, V, bias=mask)
    mixture, product = (kl(student, [free, bound], combine=x, divergence="forward", backend=backend) for x in KINDS)
    assert mixture.isfinite()
    assert product.isfinite()
    disjoint = make(N, D, V, bias=torch.where(mask == 0, -torch.inf, 0.0))
    assert kl(student, [disjoint, bound], combine="mixture", backend=backend).isfinite()
    assert kl(student, [disjoint, bound], combine="product", backend=backend).isnan()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("combine", KINDS)
def test_stats_tell_each_teacher_apart(combine, backend, device):
    student, teachers = make(N, D, V, device=device), [make(N, D, V, device=device) for _ in range(2)]
    weight = torch.rand(2, N, device=device)
    weight[1, 3] = 0
    got = kl(student, teachers, teacher_weight=weight, combine=combine, stats=True, backend=backend)
    want = kl(student, teachers, teacher_weight=weight, stats=True, backend=backend)
    torch.testing.assert_close(got.teacher_kl, want.teacher_kl)
    torch.testing.assert_close(got.entropy, want.entropy)
    assert torch.equal(got.loss, kl(student, teachers, teacher_weight=weight, combine=combine, backend=backend))


@pytest.mark.parametrize("combine", KINDS)
def test_a_support_and_a_temperature_a_token_go_with_it(combine):
    student, teachers = make(N, D, V, softcap=4.0), [make(N, 8, V), make(N, D, V)]
    options = {"combine": combine, "support": "student", "k": 5, "reduction": "none"}
    options["temperature"] = torch.rand(N) + 0.5
    made = []
    for name, dtype in (("torch", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        s, *ts = (cast(h, dtype) for h in (student, *teachers))
        value = kl(s, ts, backend=name, **options)
        made.append({"value": value, **gradients(value.sum(), s)})
    for name in made[0]:
        assert_as_good_as_torch(name, *(x[name] for x in made), torch.float32)


def test_routed_tokens_have_one_teacher_in_any_case():
    index = torch.randint(0, 2, (N,))
    student, teachers = make(N, D, V), [make(int((index == j).sum()), D, V) for j in range(2)]
    want = kl(student, teachers, teacher_index=index)
    for combine in KINDS:
        assert torch.equal(kl(student, teachers, teacher_index=index, combine=combine), want)


def test_bad_input_is_named():
    head = make(N, D, V)
    with pytest.raises(ValueError, match="kl: combine must be one of mean, mixture, product; got 'sum'"):
        kl(head, head, combine="sum")
    weight = torch.tensor([1.0, -0.5])
    with pytest.raises(ValueError, match=r"kl: teacher_weight must be >= 0 for a mixture; got -0.5"):
        kl(head, [head, head], combine="mixture", teacher_weight=weight)
