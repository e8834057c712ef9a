"""kl against its definition, its properties, and every message."""

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    RUNS,
    SHAPES,
    SMALL_WORKSPACE,
    assert_as_good_as_torch,
    cast,
    gradients,
    make,
    relative,
)

from copd_kernels import Head, kl, rows
from copd_kernels.reference import log_softmax


def compare(student, teachers, backend, device, dtype=torch.float32, upstream=False, **options):
    """Ours, eager in the same dtype, and float64: values and gradients."""
    run = {}
    for name, kind, where in (
        (backend, dtype, device),
        ("reference", dtype, device),
        ("exact", torch.float64, "cpu"),
    ):
        s, ts = cast(student, kind, where), [cast(t, kind, where) for t in teachers]
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        value = kl(s, ts, backend="reference" if name == "exact" else name, **moved)
        u = (
            torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=where).view(value.shape)
            if upstream
            else None
        )
        run[name] = {"value": value, **gradients(value, s, u)}
    for name in run["exact"]:
        assert_as_good_as_torch(name, run[backend][name], run["reference"][name], run["exact"][name], dtype)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, divergence, backend, device):
    N, D, V = SHAPES[shape]
    student, teachers = make(N, D, V), [make(N, D + 3, V), make(N, D, V)]
    compare(student, teachers, backend, device, divergence=divergence, workspace_bytes=max(SMALL_WORKSPACE, 12 * V))


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bias_scale_softcap_padding_temperature_and_weights_match_reference(divergence, backend, device):
    N, D, V = SHAPES["ragged"]
    bias = torch.randn(V + 4).requires_grad_()
    student = make(N, D, V, padding=4, scale=0.7, softcap=4.0, bias=bias)
    teachers = [make(N, 8, V, softcap=9.0), make(N, D, V, scale=1.5), make(N, 5, V)]
    compare(
        student,
        teachers,
        backend,
        device,
        divergence=divergence,
        beta=0.3,
        temperature=1.7,
        teacher_weight=torch.rand(3, N),
        token_weight=torch.rand(N) * 1e-6,
        workspace_bytes=SMALL_WORKSPACE,
    )


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_and_reduction_matches_reference(dtype, reduction, backend, device):
    N, D, V = SHAPES["ragged"]
    student, teachers = make(N, D, V, dtype), [make(N, D, V, dtype)]
    compare(student, teachers, backend, device, dtype, reduction == "none", reduction=reduction, divergence="symmetric")


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_routed_tokens_match_reference(divergence, backend, device):
    N, D, V = 61, 16, 211
    index = torch.randint(-1, 4, (N,))
    index[index == 2] = 0  # a teacher without tokens
    teachers = [make(int((index == j).sum()), 8 + j, V) for j in range(4)]
    options = {"teacher_index": index, "token_weight": torch.rand(N), "divergence": divergence}
    compare(make(N, D, V), teachers, backend, device, workspace_bytes=SMALL_WORKSPACE, **options)


# student close to teacher, KL about 0.01: where 16-bit logits lose 7-26 % of the gradient
GATES = {torch.float32: (5e-5, 1e-5), torch.float16: (3e-3, 1e-4), torch.bfloat16: (3e-3, 1e-4)}


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", GATES, ids=str)
def test_nearly_equal_distributions_keep_their_gradient(dtype, divergence, backend, device):
    student = make(64, 64, 1000, dtype, device)
    teacher = make(64, 64, 1000, dtype, device, like=student, noise=0.05)
    exact_student = cast(student, torch.float64)
    exact = kl(exact_student, cast(teacher, torch.float64), divergence=divergence, backend="reference")
    assert 1e-3 < exact < 5e-2
    ours = kl(student, teacher, divergence=divergence, backend=backend)
    gradient_gate, loss_gate = GATES[dtype]
    assert relative(ours, exact) <= loss_gate
    want = gradients(exact, exact_student)
    errors = {name: relative(g, want[name]) for name, g in gradients(ours, student, last=True).items()}
    assert max(errors.values()) <= gradient_gate, errors


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("margin", [22.0, 30.0])
@pytest.mark.parametrize("same_top", [True, False])
def test_peaked_rows_keep_their_gradient(same_top, margin, divergence, backend, device):
    N, D, V = 32, 16, 300
    student = make(N, D, V, device=device, spread=0.3)
    teacher = make(N, D, V, device=device, like=student, noise=0.1)
    # one direction of hidden space lifts one token far above the others, by more in the teacher
    with torch.no_grad():
        for head, token, lift in ((student, 7, margin), (teacher, 7 if same_top else 8, margin + 1)):
            head.hidden[:, 0], head.lm_head[:, 0] = 1.0, 0.0
            head.lm_head[token, 0] = lift
    exact_student = cast(student, torch.float64)
    assert log_softmax(exact_student).max(-1).values.min() > -1e-6
    exact = kl(exact_student, cast(teacher, torch.float64), divergence=divergence, backend="reference")
    want = gradients(exact, exact_student)
    got = gradients(kl(student, teacher, divergence=divergence, backend=backend), student)
    errors = {name: relative(g, want[name]) for name, g in got.items()}
    assert max(errors.values()) <= 1e-3, errors


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand_stay_finite_and_right(divergence, backend, device):
    student, teacher = make(9, 8, 101), make(9, 8, 101)
    signs = torch.where(torch.rand(101) < 0.5, 1e4, -1e4)
    with torch.no_grad():
        for head in (student, teacher):
            head.hidden[:, 0], head.lm_head[:, 0] = 1.0, signs
    compare(student, [teacher], backend, device, divergence=divergence)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_heads_have_no_divergence_and_no_gradient(divergence, backend, device):
    student = make(33, 16, 211, device=device)
    value = kl(student, cast(student, torch.float32, device), divergence=divergence, backend=backend)
    assert abs(value.item()) < 1e-7
    assert all(g.abs().max() < 1e-8 for g in gradients(value, student).values())


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_teachers_are_one_teacher(divergence, backend, device):
    student, teacher = make(33, 16, 211, device=device), make(33, 16, 211, device=device)
    one = kl(student, teacher, divergence=divergence, backend=backend)
    four = kl(student, [teacher] * 4, divergence=divergence, backend=backend)
    torch.testing.assert_close(one, four, rtol=1e-6, atol=0)
    for name, g in gradients(one, student).items():
        torch.testing.assert_close(g, gradients(four, student)[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_masked_token_contributes_nothing_even_if_it_is_not_a_number(reduction, poison, backend, device):
    N, D, V = SHAPES["ragged"]
    keep = torch.rand(N) > 0.4
    clean = make(N, D, V, device=device), make(N, D, V, device=device)
    dirty = cast(clean[0], torch.float32, device), cast(clean[1], torch.float32, device)
    with torch.no_grad():
        for head in dirty:
            head.hidden[~keep] = poison
    results = []
    for student, teacher in (clean, dirty):
        value = kl(student, teacher, token_weight=keep.to(device), reduction=reduction, backend=backend)
        results.append({"value": value, **gradients(value, student, torch.ones_like(value), last=True)})
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name]), name
    assert (results[0]["dhidden"][~keep] == 0).all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_word_masked_on_both_sides_counts_nothing(backend, device):
    bias = torch.zeros(50)
    bias[[3, 49]] = -torch.inf
    student, teacher = (make(7, 8, 50, device=device, bias=bias.to(device)) for _ in range(2))
    without = [Head(h.hidden, h.lm_head[[i for i in range(50) if i not in (3, 49)]]) for h in (student, teacher)]
    for divergence in DIVERGENCES:
        got = kl(student, teacher, divergence=divergence, backend=backend)
        want = kl(*without, divergence=divergence, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        (dhidden,) = torch.autograd.grad(got, student.hidden)
        assert dhidden.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("word", ["top", "other"])
def test_a_word_only_the_teacher_excludes_makes_reverse_kl_infinite(word, backend, device):
    student, plain = make(1, 8, 50, device=device), make(1, 8, 50, device=device)
    top = int(log_softmax(student).argmax())
    bias = torch.zeros(50, device=device)
    bias[top if word == "top" else (top + 1) % 50] = -torch.inf
    teacher = Head(plain.hidden, plain.lm_head, bias)
    assert kl(student, teacher, divergence="reverse", backend=backend).item() == torch.inf
    for divergence in ("forward", "jsd"):
        got = kl(student, teacher, divergence=divergence, backend=backend)
        want = kl(student, teacher, divergence=divergence, backend="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("word", [1, 700, 5000, 8999])
def test_reverse_kl_is_infinite_wherever_in_a_long_row_the_excluded_word_is(word, backend, device):
    """The word is the largest of its tile, not of the row, so nothing may subtract its infinite log-ratio."""
    student, teacher = make(1, 8, 9000, device=device), make(1, 8, 9000, device=device)
    ranks = torch.zeros(9000, device=device)
    ranks[word], ranks[4000] = 30, 40
    excluded = torch.zeros(9000, device=device)
    excluded[word] = -torch.inf
    student, teacher = Head(student.hidden, student.lm_head, ranks), Head(teacher.hidden, teacher.lm_head, excluded)
    assert kl(student, teacher, divergence="reverse", backend=backend).item() == torch.inf


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("weight", [None, 0.0])
def test_no_token_gives_zero_loss_and_zero_gradients(weight, backend, device):
    N = 0 if weight is None else 5
    student, teacher = make(N, 8, 50, device=device), make(N, 8, 50, device=device)
    token_weight = torch.zeros(N, device=device)
    value = kl(student, teacher, token_weight=token_weight, backend=backend)
    assert value.item() == 0
    for g in gradients(value, student).values():
        assert (g == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_passes_in_float64(divergence, reduction):
    student, teachers = make(4, 3, 7, torch.float64), [make(4, 5, 7, torch.float64) for _ in range(2)]
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(hidden, lm_head, bias):
        head = Head(hidden, lm_head, bias, scale=1.2, softcap=3.0)
        return kl(head, teachers, divergence=divergence, temperature=0.9, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (student.hidden, student.lm_head, bias))


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_calls_and_two_backwards_are_identical_to_the_bit(reduction, backend, device):
    student, teacher = make(21, 16, 500, device=device), make(21, 16, 500, device=device)
    runs = []
    for _ in range(2):
        value = kl(student, teacher, reduction=reduction, backend=backend, workspace_bytes=SMALL_WORKSPACE)
        runs += [gradients(value, student, torch.ones_like(value)) for _ in range(2)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], g) for name, g in runs[0].items())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_raises(reduction):
    student = make(5, 8, 50)
    value = kl(student, make(5, 8, 50), reduction=reduction).square().sum()
    (dhidden,) = torch.autograd.grad(value, student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|does not require grad"):
        dhidden.sum().backward()


def test_gradients_do_not_reach_teachers_or_weights():
    student, teacher = make(5, 8, 50), make(5, 8, 50)
    weight = torch.ones(5, requires_grad=True)
    kl(student, teacher, token_weight=weight).backward()
    assert teacher.hidden.grad is None
    assert teacher.lm_head.grad is None
    assert weight.grad is None


def test_teachers_may_have_another_dtype():
    student, teacher = make(37, 16, 211), make(37, 24, 211, torch.bfloat16)
    got = kl(student, teacher)
    want = kl(cast(student, torch.float64), cast(teacher, torch.float64), backend="reference")
    assert relative(got, want) < 1e-5


def test_leading_dimensions_are_kept():
    flat = make(12, 8, 50), make(12, 8, 50)
    shaped = [Head(h.hidden.view(3, 4, 8), h.lm_head) for h in flat]
    assert torch.equal(kl(*shaped, reduction="none"), kl(*flat, reduction="none").view(3, 4))


def test_inputs_may_be_strided_or_expanded():
    student, teacher = make(12, 8, 50), make(12, 8, 50)
    hidden = torch.stack([student.hidden.detach()] * 2, -1)[..., 0].requires_grad_()
    row = torch.randn(1, 8)
    cases = [
        (Head(hidden, student.lm_head), student),
        (Head(student.hidden, student.lm_head.detach().T.contiguous().T), student),
        (Head(student.hidden, row.expand(50, 8)), Head(student.hidden, row.repeat(50, 1))),
    ]
    for strided, plain in cases:
        torch.testing.assert_close(kl(strided, teacher), kl(plain, teacher))


BAD = {
    "teachers must not be empty": {"teachers": []},
    "teachers[0] must have student's vocabulary of 50 tokens; got 49": {"teachers": make(5, 8, 49)},
    "teachers[0].hidden must have shape": {"teachers": make(4, 8, 50)},
    "divergence must be one of": {"divergence": "kl"},
    "beta must be in (0, 1) for jsd": {"divergence": "jsd", "beta": 1.0},
    "temperature must be positive": {"temperature": 0.0},
    "reduction must be mean, sum or none": {"reduction": "batchmean"},
    "workspace_bytes must be positive": {"workspace_bytes": -1},
    "backend must be one of": {"backend": "cuda"},
    "teacher_weight must have shape (1,) or (1, 5)": {"teacher_weight": torch.ones(2)},
    "teacher_weight must be None with teacher_index": {
        "teacher_weight": torch.ones(1),
        "teacher_index": torch.zeros(5, dtype=torch.int64),
    },
    "teacher_index must have shape (5,)": {"teacher_index": torch.zeros(4, dtype=torch.int64)},
    "teacher_index must be in -1..0": {"teacher_index": torch.ones(5, dtype=torch.int64)},
    "teachers[0].hidden must hold the 4 tokens routed to it": {"teacher_index": torch.tensor([0, 0, -1, 0, 0])},
    "token_weight must have shape (5,)": {"token_weight": torch.ones(4)},
    "token_weight must be >= 0": {"token_weight": torch.tensor([1.0, 1, -1, 1, 1])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_named(message):
    arguments = {"teachers": make(5, 8, 50)} | BAD[message]
    with pytest.raises(ValueError, match="kl: ") as error:
        kl(make(5, 8, 50), **arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("teacher_index must be int64", {"teacher_index": torch.zeros(5, dtype=torch.int32)}),
        ("teacher_weight must be floating", {"teacher_weight": torch.ones(1, dtype=torch.int64)}),
        ("token_weight must be floating or bool", {"token_weight": torch.ones(5, dtype=torch.int64)}),
    ],
)
def test_bad_dtypes_are_named(message, arguments):
    with pytest.raises(TypeError, match=message):
        kl(make(5, 8, 50), make(5, 8, 50), **arguments)


def test_an_absent_backend_names_the_fix(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("COPD_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        kl(make(5, 8, 50), make(5, 8, 50))


def test_more_teachers_than_the_triton_rows_hold_names_another_backend():
    teacher = make(2, 8, 50)
    with pytest.raises(NotImplementedError, match=r"kl: teachers must .* at most 12; got 13 .*'torch'"):
        kl(make(2, 8, 50), [teacher] * 13, backend="triton")


def test_where_no_backend_is_named_one_is_taken_that_holds_all_teachers(monkeypatch):
    monkeypatch.setattr(rows, "DEFAULTS", {"cpu": ("triton", "torch")})
    assert rows.resolve("kl", None, torch.device("cpu"), heads=13, teachers=12) == "triton"
    assert rows.resolve("kl", None, torch.device("cpu"), heads=14, teachers=13) == "torch"
    assert rows.resolve("mutual_kl", None, torch.device("cpu"), heads=33, teachers=2) == "torch"
