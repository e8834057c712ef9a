"""Teachers known by k log-probs a token, divergences on a few words, and `topk`, against their definitions."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    RUNS,
    assert_as_good_as_torch,
    cast,
    each,
    gradients,
    make,
    relative,
)

from copd_kernels import Head, TopK, kl, logprob, topk
from copd_kernels.reference import log_softmax

TAILS = ("bucket", "renormalise", "ignore")
HOW = [*zip(DIVERGENCES, [*TAILS, "bucket"], strict=True)]
# two chunks of them for three heads and the sum of their gradients, the second shorter
N, D, V, K = 7, 16, 67, 5
WORKSPACE = 5_400


def listed(head, k=K, tail="bucket", dtype=torch.float32, temperature=1.0, at=slice(None)):
    ids, logp = topk(Head(head.hidden[at].double(), head.lm_head.double()), k, temperature=temperature)
    return TopK(ids, logp.to(dtype), tail, temperature)


def moved(x, dtype, device):
    if isinstance(x, TopK):
        return TopK(x.ids.to(device), x.logp.to(device), x.tail, x.temperature)
    return cast(x, dtype, device) if isinstance(x, Head) else x.to(device) if isinstance(x, torch.Tensor) else x


def compare(student, teachers, backend, device, dtype=torch.float32, **options):
    made = []
    runs = (backend, dtype, device), ("reference", dtype, device), ("reference", torch.float64, "cpu")
    for name, kind, where in runs:
        s, ts = moved(student, kind, where), [moved(t, kind, where) for t in teachers]
        chosen = {key: moved(x, kind, where) for key, x in options.items()}
        value = kl(s, ts, backend=name, workspace_bytes=WORKSPACE, **chosen)
        u = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=where).view(value.shape)
        made.append({"value": value, **gradients(value, s, u)})
    for name in made[0]:
        assert_as_good_as_torch(name, *(x[name] for x in made), dtype)
    return made[0]


@pytest.mark.parametrize(("backend", "device", "divergence", "tail"), each(DIVERGENCES, TAILS))
def test_a_list_matches_reference(tail, divergence, backend, device):
    compare(make(N, D, V), [listed(make(N, 8, V), tail=tail)], backend, device, divergence=divergence, beta=0.3)


@pytest.mark.parametrize(("backend", "device", "how", "reduction"), each(HOW, ["sum", "none"]))
def test_lists_and_heads_teach_together(how, reduction, backend, device):
    divergence, tail = how
    teachers = [make(N, 8, V, softcap=9.0), listed(make(N, 4, V), tail=tail, temperature=1.3)]
    teachers += [make(N, D, V), listed(make(N, 4, V), k=3, temperature=1.3)]
    weight, tokens = torch.rand(4, N), torch.rand(N)
    weight[1, ::3], weight[2, 4], tokens[::4] = 0, 0, 0
    student = make(N, D, V, padding=3, softcap=4.0, scale=0.7, bias=torch.randn(V + 3).requires_grad_())
    options = {"teacher_weight": weight, "token_weight": tokens, "temperature": 1.3, "reduction": reduction}
    compare(student, teachers, backend, device, divergence=divergence, **options)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_lists_and_heads_are_routed(divergence, backend, device):
    index = torch.tensor([2, -1, 0, 1, 1, 0, 2, 0, 1])
    sizes = [(index == j).sum().item() for j in range(3)]
    teachers = [make(sizes[0], 8, V), listed(make(sizes[1], 4, V)), listed(make(sizes[2], 4, V), tail="renormalise")]
    compare(make(9, D, V), teachers, backend, device, divergence=divergence, teacher_index=index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_dtype_matches_reference(divergence, dtype):
    teachers = [listed(make(N, 8, V)), make(N, D, V, dtype)]
    compare(make(N, D, V, dtype), teachers[:1], "torch", "cpu", dtype, divergence=divergence)
    compare(make(N, D, V, dtype), teachers, "torch", "cpu", dtype, divergence=divergence)


@pytest.mark.parametrize(("backend", "device", "divergence", "tail"), each(DIVERGENCES, TAILS))
def test_a_list_of_every_token_is_the_head(tail, divergence, backend, device):
    student, teacher = make(N, D, V, device=device), make(N, D, V, device=device)
    got = kl(student, listed(teacher, V, tail), divergence=divergence, backend=backend)
    want = kl(student, teacher, divergence=divergence, backend=backend)
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-7)
    for name, g in gradients(got, student).items():
        assert relative(g, gradients(want, student)[name]) < 1e-5


def by_hand(student, teacher: TopK, divergence):
    """The definitions of `TopK`, word by word in float64."""
    p = log_softmax(cast(student, torch.float64)).exp()
    result = []
    for row, ids, logp in zip(p, teacher.ids, teacher.logp.double(), strict=True):
        named = logp != -torch.inf
        a, b = row[ids[named]], logp[named].exp()
        if teacher.tail == "bucket":
            a, b = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (a, b))
        if teacher.tail == "renormalise":
            a, b = a / a.sum(), b / b.sum()
        m = 0.3 * b + 0.7 * a
        reverse, forward = (a * (a / b).log()).sum(), (b * (b / a).log()).sum()
        jsd = 0.3 * (b * (b / m).log()).sum() + 0.7 * (a * (a / m).log()).sum()
        result.append({"reverse": reverse, "forward": forward, "symmetric": reverse + forward, "jsd": jsd}[divergence])
    return torch.stack(result)


@pytest.mark.parametrize("backend", ["torch", "native", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_list_is_compared_as_its_definition_says(tail, divergence, backend):
    student, teacher = make(N, D, V), listed(make(N, 8, V, spread=1.0), tail=tail)
    # entries that are absent: their ids are not read, be they out of range or another's
    teacher.logp[2, 3:], teacher.ids[2, 3:] = -torch.inf, torch.tensor([10**9, teacher.ids[2, 0]])
    got = kl(student, teacher, divergence=divergence, beta=0.3, reduction="none", backend=backend)
    want = by_hand(student, teacher, divergence)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    exact = cast(student, torch.float64)
    expected = gradients(kl(exact, teacher, divergence=divergence, beta=0.3, backend="reference"), exact)
    got = gradients(kl(student, teacher, divergence=divergence, beta=0.3, backend=backend), student)
    assert all(relative(g, expected[name]) < 1e-5 for name, g in got.items())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck_passes_in_float64(tail, divergence):
    student, teacher = make(3, 3, 11, torch.float64), listed(make(3, 4, 11), 4, tail, torch.float64)
    others = [teacher, make(3, 5, 11, torch.float64).detach()]

    def loss(hidden, lm_head, teachers):
        return kl(Head(hidden, lm_head, softcap=3.0), teachers, divergence=divergence, beta=0.3, reduction="none")

    for teachers in (teacher, others):
        arguments = (student.hidden, student.lm_head, teachers)
        assert torch.autograd.gradcheck(lambda h, w, t=teachers: loss(h, w, t), arguments[:2])


@pytest.mark.parametrize(("backend", "device", "divergence"), each(DIVERGENCES))
def test_a_peaked_row_keeps_its_gradient(divergence, backend, device):
    student = make(8, 16, 300, device=device, spread=0.3)
    with torch.no_grad():
        student.hidden[:, 0], student.lm_head[:, 0] = 1.0, 0.0
        student.lm_head[7, 0] = 22.0
    teacher = listed(make(8, 16, 300, device=device, like=student, noise=0.1), 8, dtype=torch.float64)
    exact = cast(student, torch.float64)
    on_cpu = moved(teacher, None, "cpu")
    want = gradients(kl(exact, on_cpu, divergence=divergence, backend="reference"), exact)
    got = gradients(kl(student, teacher, divergence=divergence, backend=backend), student)
    assert max(relative(g, want[name]) for name, g in got.items()) < 1e-3


def test_a_one_hot_list_has_a_finite_divergence():
    student, one = make(N, D, V), TopK(torch.randint(0, V, (N, 1)), torch.zeros(N, 1))
    least = 2 * torch.finfo(torch.float32).eps
    p = log_softmax(cast(student, torch.float64)).exp().gather(1, one.ids).squeeze(1)
    want = p * (p / (1 - least)).log() + (1 - p) * ((1 - p) / least).log()
    torch.testing.assert_close(kl(student, one, reduction="none").double(), want, rtol=1e-5, atol=1e-5)
    forward = kl(student, one, divergence="forward", reduction="none")
    torch.testing.assert_close(forward, -logprob(student, one.ids[:, 0]).logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("tail", TAILS)
def test_what_is_masked_reaches_nothing_and_what_is_not_comes_out(tail, backend, device):
    student, teacher = make(N, D, V, device=device), listed(make(N, 8, V, device=device), tail=tail)
    teacher.logp[2], teacher.ids[4] = torch.nan, 10**9
    mask = torch.ones(N, device=device)
    mask[[2, 4]] = 0
    clean = [0, 1, 3, 5, 6]
    short = TopK(teacher.ids[clean], teacher.logp[clean], tail)
    got = kl(student, teacher, token_weight=mask, backend=backend)
    want = kl(Head(student.hidden[clean], student.lm_head), short, backend=backend)
    torch.testing.assert_close(got, want)
    for name, g in gradients(got, student).items():
        torch.testing.assert_close(g, gradients(want, student)[name])
    teacher.ids[4] = teacher.ids[3]
    broken = kl(student, teacher, reduction="none", backend=backend)
    assert broken.isnan().nonzero().tolist() == [[2]]
    (dhidden,) = torch.autograd.grad(broken.sum(), student.hidden)
    assert dhidden.isnan().any(1).nonzero().tolist() == [[2]]
    with torch.no_grad():
        student.hidden[5] = torch.inf
    value = kl(student, teacher, reduction="none", backend=backend)
    assert value.isnan().nonzero().tolist() == [[2], [5]]


@pytest.mark.parametrize(("backend", "device", "how", "support"), each(HOW, ["student", "teacher"]))
def test_heads_on_a_support_match_reference(how, support, backend, device):
    divergence, tail = how
    teachers, weight = [make(N, 8, V, softcap=9.0), make(N, D, V)], torch.rand(2, N)
    weight[0, 3] = 0
    student = make(N, D, V, softcap=4.0)
    options = {"support": support, "k": K, "tail": tail, "teacher_weight": weight, "divergence": divergence}
    compare(student, teachers, backend, device, temperature=1.2, **options)


def test_a_support_of_each_teacher_is_the_list_of_each():
    student, teachers = make(N, D, V, torch.float64), [make(N, 8, V, torch.float64), make(N, D, V, torch.float64)]
    for tail in TAILS:
        got = kl(student, teachers, support="teacher", k=K, tail=tail)
        lists = [TopK(*topk(teacher, K), tail=tail) for teacher in teachers]
        torch.testing.assert_close(got, kl(student, lists))
        mixed = kl(student, [lists[0], teachers[1]], support="teacher", k=K, tail=tail)
        torch.testing.assert_close(got, mixed)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_stats_of_lists_are_those_of_each_alone(backend, device):
    student = make(N, D, V, device=device)
    teachers = [listed(make(N, 8, V, device=device)), make(N, D, V, device=device)]
    got = kl(student, teachers, stats=True, backend=backend)
    for j, teacher in enumerate(teachers):
        torch.testing.assert_close(got.teacher_kl[j], kl(student, teacher, backend=backend).detach())
    torch.testing.assert_close(got.entropy, logprob(student, teachers[0].ids[:, 0]).entropy.detach())


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_topk_matches_reference(backend, device):
    bias = torch.randn(V + 4, device=device)
    head = make(N, D, V, device=device, padding=4, scale=0.7, softcap=4.0, bias=bias)
    temperature = torch.rand(N, device=device) + 0.5
    ids, logp = topk(head, K, temperature=temperature, backend=backend, workspace_bytes=3 * 4 * V)
    want = (log_softmax(cast(head, torch.float64)) + 0).to(device)
    z = want / temperature.unsqueeze(1)
    want = torch.log_softmax(z.double(), -1).topk(K)
    assert torch.equal(ids, want.indices)
    torch.testing.assert_close(logp.double(), want.values, rtol=1e-5, atol=1e-5)
    assert not logp.requires_grad
    assert topk(Head(head.hidden[:0], head.lm_head, vocab_size=V), K, backend=backend)[0].shape == (0, K)
    deep = replace(head, hidden=head.hidden[:6].view(2, 3, D), bias=None)
    assert [x.shape for x in topk(deep, 2, backend=backend)] == [(2, 3, 2)] * 2


HEAD, TOKENS = make(3, 8, 50), torch.tensor([[1, 2], [3, 4], [5, 6]])
LOGP = torch.full((3, 2), math.log(0.3))


def spoiled(x, row, column, value):
    x = x.clone()
    x[row, column] = value
    return x


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"kl: teachers\[0\].ids must be in 0..49; got 50", lambda: kl(HEAD, TopK(spoiled(TOKENS, 1, 1, 50), LOGP))),
        (r"kl: teachers\[0\].ids must be in 0..49; got -1", lambda: kl(HEAD, TopK(spoiled(TOKENS, 1, 1, -1), LOGP))),
        (
            r"kl: teachers\[1\].ids must name no token twice in a row; got 3",
            lambda: kl(HEAD, [HEAD, TopK(spoiled(TOKENS, 1, 1, 3), LOGP)]),
        ),
        (
            r"kl: teachers\[0\].logp must be at most 0; got 0.5",
            lambda: kl(HEAD, TopK(TOKENS, spoiled(LOGP, 1, 1, 0.5))),
        ),
        (
            r"kl: teachers\[0\].logp must be log-probs of at most 1 in all; got 1",
            lambda: kl(HEAD, TopK(TOKENS, LOGP + 0.7)),
        ),
        (
            r"kl: temperature must be that of teachers\[0\], 1.0; got 2.0; its log-probs cannot be made those of anoth",
            lambda: kl(HEAD, TopK(TOKENS, LOGP), temperature=2.0),
        ),
        (
            r"kl: temperature must be that of teachers\[0\], 1.0; got one a token",
            lambda: kl(HEAD, TopK(TOKENS, LOGP), temperature=torch.ones(3)),
        ),
        (
            r"kl: teachers\[0\].ids must have shape \(\*\(3,\), k\); got \(2,\)",
            lambda: kl(HEAD, TopK(TOKENS[:2], LOGP[:2])),
        ),
        (
            r"kl: teachers\[0\].ids must hold the 3 tokens routed to it; got 2 rows",
            lambda: kl(HEAD, TopK(TOKENS[:2], LOGP[:2]), teacher_index=torch.zeros(3, dtype=torch.int64)),
        ),
        (
            r"kl: combine must be 'mean' with a TopK teacher; got 'mixture'",
            lambda: kl(HEAD, TopK(TOKENS, LOGP), combine="mixture"),
        ),
        (
            r"kl: support must be None or 'teacher' with a TopK; got 'student'; ",
            lambda: kl(HEAD, TopK(TOKENS, LOGP), support="student", k=3),
        ),
        (r"kl: support must be one of student, teacher; got 'both'", lambda: kl(HEAD, HEAD, support="both", k=3)),
        (r"kl: k must be in 1..50; got 51", lambda: kl(HEAD, HEAD, support="student", k=51)),
        (r"kl: k must be None without a support; got 5", lambda: kl(HEAD, HEAD, k=5)),
        (r"kl: tail must be one of bucket, renormalise, ignore; got 'none'", lambda: kl(HEAD, HEAD, tail="none")),
        (r"TopK: tail must be one of bucket, renormalise, ignore; got 'none'", lambda: TopK(TOKENS, LOGP, "none")),
        (r"TopK: logp must have ids' shape \(3, 2\); got \(3, 1\)", lambda: TopK(TOKENS, LOGP[:, :1])),
        (r"TopK: ids must have shape \(..., k\); got \(3, 0\)", lambda: TopK(TOKENS[:, :0], LOGP[:, :0])),
        (r"topk: k must be in 1..50; got 0", lambda: topk(HEAD, 0)),
    ],
)
def test_bad_input_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("TopK: ids must be int64; got torch.int32", lambda: TopK(TOKENS.int(), LOGP)),
        ("TopK: logp must be floating; got torch.int64", lambda: TopK(TOKENS, TOKENS)),
        ("TopK: ids must be a tensor; got list", lambda: TopK([[1, 2]], LOGP)),
        ("kl: k must be an integer; got NoneType", lambda: kl(HEAD, HEAD, support="student")),
        ("topk: head must be a Head; got Tensor", lambda: topk(TOKENS, 3)),
    ],
)
def test_bad_kinds_are_named(message, call):
    with pytest.raises(TypeError, match=message):
        call()


def test_rounded_log_probs_of_all_tokens_pass():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        teacher = listed(make(64, 8, V, spread=1.0), V, dtype=dtype)
        assert kl(make(64, D, V), teacher).isfinite()


@pytest.mark.parametrize("support", ["student", "teacher"])
def test_a_support_goes_with_routing_and_temperatures_a_token(support):
    index = torch.tensor([1, -1, 0, 1, 1, 0, 0])
    teachers = [make(int((index == j).sum()), 8, V, softcap=9.0) for j in range(2)]
    options = {"teacher_index": index, "temperature": torch.rand(N) + 0.5, "support": support, "k": K}
    compare(make(N, D, V, softcap=4.0), teachers, "torch", "cpu", divergence="symmetric", **options)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a head"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_sixteen_bit_dlogits_keep_the_gradient(backend, dtype, beside, monkeypatch):
    """As CUDA hands them to the GEMM, here with the product widened."""

    def widened(out, a, b, *, alpha=1.0, accumulate=False):
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), alpha=alpha, out=out)

    monkeypatch.setattr("copd_kernels.schedule.addmm", widened)
    monkeypatch.setattr("copd_kernels.flatten.operand_dtype", lambda hidden, _: hidden.dtype)
    monkeypatch.setattr(
        "copd_kernels.schedule.dlogits_dtype", lambda operand, like: operand if operand != like.dtype else None
    )
    student = make(32, 32, 300, dtype, softcap=8.0)
    teachers = [listed(make(32, 32, 300, dtype, like=student, noise=0.1), 16)]
    teachers += [make(32, 32, 300, dtype, like=student, noise=0.1)] if beside else []
    exact = cast(student, torch.float64)
    weight = torch.full((32,), 1e-5)
    want = kl(exact, [moved(t, torch.float64, "cpu") for t in teachers], token_weight=weight, backend="reference")
    got = kl(student, teachers, token_weight=weight, backend=backend)
    wanted = gradients(want, exact)
    assert max(relative(g, wanted[name]) for name, g in gradients(got, student).items()) < 4e-3


def test_lists_made_in_inference_mode_teach_per_token_too():
    student, teacher = make(N, D, V), make(N, D, V)
    with torch.inference_mode():
        apart = listed(teacher)
    for reduction in ("mean", "none"):
        value = kl(student, apart, reduction=reduction)
        want = kl(student, TopK(apart.ids.clone(), apart.logp.clone()), reduction=reduction)
        pairs = zip(gradients(value.sum(), student).values(), gradients(want.sum(), student).values(), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    ("lists", "options"),
    [
        ([0], {}),
        ([0, 2], {"temperature": 1.3}),
        ([], {"support": "student", "k": K}),
        ([], {"combine": "mixture"}),
        ([], {"combine": "product", "stats": True}),
    ],
)
def test_rows_with_a_gap_between_them_give_the_same(lists, options, backend, monkeypatch):
    """As a GPU has them, where V is ragged."""
    student, teachers = make(N, D, V, softcap=4.0), [make(N, 8, V) for _ in range(3)]
    T = options.get("temperature", 1.0)
    teachers = [listed(t, temperature=T) if j in lists else t for j, t in enumerate(teachers)]

    def run():
        result = kl(student, teachers, backend=backend, workspace_bytes=WORKSPACE, **options)
        loss = result.loss if isinstance(result, tuple) else result
        told = logprob(student, torch.arange(N), backend=backend, stats=True)
        beside = topk(student, K, backend=backend)[1], told.mean_logits, told.log_sum_sq_probs
        return [loss.detach(), *gradients(loss, student).values(), *beside]

    want = run()
    monkeypatch.setattr("copd_kernels.schedule.ALIGNED", {"cpu": 16})
    for x, y in zip(run(), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
