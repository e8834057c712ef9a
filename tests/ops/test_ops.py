"""Good manners: opcheck, compile, autocast, passes, memory, and the 16-bit gradient path of CUDA."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from kernel_cases import DIVERGENCES, cast, gradients, make, relative
from torch._dynamo.testing import CompileCounterWithBackend

from copd_kernels import Head, TopK, agreement, kl, logprob, mutual_kl, schedule, topk
from copd_kernels.agreement import agreement_op
from copd_kernels.flatten import flatten, number, scale
from copd_kernels.kl import kl_op
from copd_kernels.logprob import logprob_backward, logprob_op
from copd_kernels.mutual import mutual_op
from copd_kernels.reference import log_softmax
from copd_kernels.rows import BACKENDS
from copd_kernels.topk import topk_op

N, D, V = 12, 8, 50


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("routed", [False, True])
def test_opcheck_passes_for_kl(routed, per_token):
    index = torch.arange(N) % 2 if routed else None
    rows = N // 2 if routed else N
    flat = flatten([make(N, D, V), make(rows, D, V).detach(), make(rows, D, V).detach()])
    weight = torch.ones(1, 1) if routed else torch.full((2, 1), 0.5)
    tensors = (*(x[0] for x in flat[:3]), *(x[1:] for x in flat[:3]))
    want = [not per_token, not per_token, False]
    temperature = torch.rand(N) + 0.5 if per_token else number(1.3)
    numbers = (torch.rand(N), flat.numbers, number(0.5), temperature, flat.vocab_size)
    options = ("reverse", "torch", 0, per_token, routed, want, False)
    torch.library.opcheck(kl_op, (*tensors, [], weight, index, *numbers, "", ",", "", "mixture", *options))


@pytest.mark.parametrize("per_token", [False, True])
def test_opcheck_passes_for_lists_and_topk(per_token):
    teacher = make(N, D, V).detach()
    flat = flatten([make(N, D, V), teacher])
    tensors = (*(x[0] for x in flat[:3]), *(x[1:] for x in flat[:3]), [*topk(teacher, 5)])
    numbers = (torch.rand(N), flat.numbers, number(0.5), number(1.0), flat.vocab_size)
    options = ("reverse", "torch", 0, per_token, True, [not per_token, not per_token, False], False)
    weight = torch.full((2, 1), 0.5)
    torch.library.opcheck(
        kl_op, (*tensors, weight, None, *numbers, "", ",bucket", "teacher 3 bucket", "mean", *options)
    )
    flat = flatten([teacher])
    torch.library.opcheck(topk_op, (*(x[0] for x in flat[:3]), flat.numbers, number(1.3), V, 5, "torch", 0))


@pytest.mark.parametrize("recompute", [True, False])
def test_opcheck_passes_for_logprob(recompute):
    head, tokens = make(N, D, V), torch.randint(0, V, (N,))
    temperature = torch.rand(N) + 0.5 if recompute else number(1.3)
    numbers = torch.tensor([0.7, 0.0], dtype=torch.float64)
    tensors = (head.hidden, head.lm_head, torch.empty(0), tokens, numbers, temperature)
    rest = (V, "", -100, "torch", 0)
    torch.library.opcheck(logprob_op, (*tensors, *rest, recompute, not recompute, False))
    tensors = [x.detach() for x in tensors]
    kept, sides, top = logprob_op(*tensors, *rest, recompute, False, False)[3:6]
    assert kept.shape == (0 if recompute else N, V)
    backward = (*tensors, *rest, kept, sides, top, torch.rand(3, N), [True, True, False])
    torch.library.opcheck(logprob_backward, backward)


def test_opcheck_passes_for_mutual_kl_agreement_and_scale():
    flat = flatten([make(N, D, V), make(N, D, V)])
    tensors = (*flat[:3], torch.ones(2), torch.ones(N), flat.numbers, number(0.5), number(1.3))
    options = (flat.vocab_size, "", [0, 1, 1, 0], "reverse", "torch", 0, [True, True, False] * 2, False)
    torch.library.opcheck(mutual_op, (*tensors, *options))
    flat = flatten([make(N, D, V).detach() for _ in range(3)])
    torch.library.opcheck(agreement_op, (*flat, 5, number(1.3), "torch", 0))
    torch.library.opcheck(scale, (torch.rand(5, 3), torch.tensor(2.0), torch.bfloat16))


def test_compiles_without_a_graph_break():
    def loss(hidden, lm_head, other, tokens):
        head, teacher = Head(hidden, lm_head), Head(other, lm_head)
        together = mutual_kl([head, teacher]).loss + agreement(head, teacher, k=3).forward_kl.sum()
        per_token = kl(head, teacher, reduction="none", divergence="jsd")
        kept = logprob(head, tokens, recompute=False, stats=True).entropy.sum()
        kept = kept + kl(head, [TopK(*topk(teacher, 3)), teacher]) + kl(head, [teacher] * 2, combine="mixture")
        return logprob(head, tokens).logp.sum() + kept + kl(head, [teacher] * 2) + per_token.sum() + together

    student, teacher, tokens = make(N, D, V), make(N, D, V), torch.randint(0, V, (N,))
    arguments = (student.hidden, student.lm_head, teacher.hidden, tokens)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    eager = loss(*arguments)
    torch.testing.assert_close(compiled, eager)
    for name, g in gradients(compiled, student).items():
        torch.testing.assert_close(g, gradients(eager, student)[name])


NUMBERS = {
    "kl": lambda s, t, T, beta: kl(s, t, divergence="jsd", temperature=T, beta=beta),
    "kl, per token": lambda s, t, T, beta: kl(s, t, divergence="jsd", temperature=T, beta=beta, reduction="none").sum(),
    "logprob": lambda s, t, T, beta: logprob(s, torch.arange(N), temperature=T).logp.sum(),
    "mutual_kl": lambda s, t, T, beta: mutual_kl([s, t], divergence="jsd", temperature=T, beta=beta).loss,
    "topk": lambda s, t, T, beta: kl(
        s, TopK(*topk(t, 5, temperature=T), temperature=T), divergence="jsd", temperature=T, beta=beta
    ),
    "agreement": lambda s, t, T, beta: s.hidden.sum() * agreement(s, t, temperature=T).forward_kl.sum(),
}


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("dynamic", [True, None])
def test_ten_temperatures_betas_scales_and_softcaps_are_one_graph(dynamic, op):
    student, teacher = make(N, D, V), make(N, D, V)

    def run(T, beta, scale, softcap):
        return NUMBERS[op](replace(student, scale=scale, softcap=softcap), replace(teacher, scale=softcap), T, beta)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    for i in range(10):
        numbers = (0.5 + i / 10, 0.05 + i / 11, 0.7 + i / 20, 2.0 + i / 3)
        got, want = compiled(*numbers), run(*numbers)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, student.hidden)[0] for x in (got, want)))
    # torch takes the very first numbers for constants, unless it is told not to
    assert counter.frame_count == (1 if dynamic else 2)


def test_autocast_is_honoured():
    student, teacher, tokens = make(N, D, V), make(N, D, V), torch.randint(0, V, (N,))
    low = [cast(h, torch.bfloat16) for h in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = kl(student, teacher), logprob(student, tokens).logp
    assert torch.equal(mixed[0], kl(*low))
    assert torch.equal(mixed[1], logprob(low[0], tokens).logp)
    for value in mixed:
        assert all(g.dtype == torch.float32 for g in gradients(value.sum(), student).values())


def gemm_passes(run, N, V, D) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        run()
    return sum(event.flops for event in profile.key_averages()) / (2 * N * V * D)


def leaves(T, N=256, V=1000, D=256, **fields):
    return [make(N, D, V, **fields) for _ in range(T + 1)]


def frozen(head: Head) -> Head:
    return Head(head.hidden, head.lm_head.detach())


def with_list(heads):
    return [*heads[:-1], TopK(*topk(heads[-1], 8))]


def routed(T):
    student, *teachers = leaves(T)
    index = torch.arange(256) % T
    teachers = [Head(t.hidden[index == j], t.lm_head) for j, t in enumerate(teachers)]
    return lambda: kl(student, teachers, teacher_index=index).backward()


def log_probs(**options):
    (head,) = leaves(0)
    return lambda: logprob(head, torch.arange(256), **options).entropy.sum().backward()


PASSES = {
    "kl, one teacher": (4, lambda: (lambda s, t: lambda: kl(s, t).backward())(*leaves(1))),
    "kl, four teachers": (7, lambda: (lambda s, *t: lambda: kl(s, t, divergence="jsd").backward())(*leaves(4))),
    "kl, frozen lm_head": (3, lambda: (lambda s, t: lambda: kl(frozen(s), t).backward())(*leaves(1))),
    "kl, no gradient": (2, lambda: (lambda s, t: lambda: kl(s.detach(), t))(*leaves(1))),
    "kl, per token": (6, lambda: (lambda s, t: lambda: kl(s, t, reduction="none").sum().backward())(*leaves(1))),
    "kl, routed to four": (4, lambda: routed(4)),
    "logprob": (3, lambda: log_probs()),
    "logprob, logits made again": (4, lambda: log_probs(recompute=True)),
    "logprob, logits just fit": (3, lambda: log_probs(workspace_bytes=256 * 1000 * 4)),
    "logprob, logits that do not fit": (4, lambda: log_probs(workspace_bytes=255 * 1000 * 4, recompute=False)),
    "mutual_kl, three heads": (9, lambda: (lambda *h: lambda: mutual_kl(h).loss.backward())(*leaves(2))),
    "kl, a list": (3, lambda: (lambda s, t: lambda: kl(s, t).backward())(*with_list(leaves(1)))),
    "kl, a list and a head": (4, lambda: (lambda s, *t: lambda: kl(s, t).backward())(*with_list(leaves(2)))),
    "kl, four as a mixture": (
        7,
        lambda: (lambda s, *t: lambda: kl(s, t, combine="mixture", stats=True).loss.backward())(*leaves(4)),
    ),
    "agreement, two teachers": (3, lambda: (lambda s, *t: lambda: agreement(s, t))(*leaves(2))),
}


def test_a_narrow_head_makes_its_logits_again_on_a_cpu():
    (head,) = leaves(0, D=48)
    passes = gemm_passes(lambda: logprob(head, torch.arange(256)).logp.sum().backward(), 256, 1000, 48)
    assert passes == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("op", PASSES)
def test_spends_no_more_gemm_passes_than_promised(op):
    promised, build = PASSES[op]
    passes = gemm_passes(build(), 256, 1000, 256)
    assert passes == pytest.approx(promised, rel=0.02), f"{op}: {passes:.2f} passes, promised {promised}"


MEMORY_SCRIPT = """
import resource, sys, torch
from copd_kernels import Head, kl, logprob, mutual_kl
torch.set_num_threads(1)
op, N = sys.argv[1], int(sys.argv[2])
V, D = 20000, 16
def head():
    return Head(torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True))
heads, tokens = [head() for _ in range(3)], torch.randint(0, V, (N,))
run = {
    "kl": lambda: kl(heads[0], heads[1:], workspace_bytes=16 << 20),
    "kl none": lambda: kl(heads[0], heads[1:], reduction="none", workspace_bytes=16 << 20).sum(),
    "logprob": lambda: logprob(heads[0], tokens, workspace_bytes=16 << 20).logp.sum(),
    "logprob, not to be recomputed": lambda: logprob(
        heads[0], tokens, workspace_bytes=16 << 20, recompute=False
    ).logp.sum(),
    "mutual_kl": lambda: mutual_kl(heads, workspace_bytes=16 << 20).loss,
}[op]
small = Head(heads[0].hidden[:8], heads[0].lm_head)
kl(small, small).backward()  # libraries load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("op", ["kl", "kl none", "logprob", "logprob, not to be recomputed", "mutual_kl"])
def test_peak_memory_is_the_workspace_whatever_the_number_of_tokens(op):
    # (N, V) alone would be 305 MiB in fp32; allowed: workspace, three heads' gradients and accumulators, blocks, slack
    command = [sys.executable, "-c", MEMORY_SCRIPT, op, "4000"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
    assert grown < 80, f"{grown:.0f} MiB"


def widened_addmm(out, a, b, *, alpha=1.0, accumulate=False):
    torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), alpha=alpha, out=out)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_dlogits_keep_the_gradient(backend, dtype, divergence, monkeypatch):
    """CUDA hands the GEMM 16-bit dlogits; here the same path runs with the product widened."""
    monkeypatch.setattr(schedule, "addmm", widened_addmm)
    monkeypatch.setattr("copd_kernels.flatten.operand_dtype", lambda hidden, _: hidden.dtype)
    monkeypatch.setattr(
        "copd_kernels.schedule.dlogits_dtype", lambda operand, like: operand if operand != like.dtype else None
    )
    student = make(64, 64, 1000, dtype)
    teacher = make(64, 64, 1000, dtype, like=student, noise=0.05)
    # Triton's interpreter stores bf16 by truncation; its compiled stores round
    gate = 6e-3 if backend == "triton" and dtype == torch.bfloat16 else 3e-3
    for weight in (1.0, 1e-9):
        exact_student = cast(student, torch.float64)
        options = {"divergence": divergence, "reduction": "sum", "token_weight": torch.full((64,), weight)}
        want = gradients(kl(exact_student, cast(teacher, torch.float64), backend="reference", **options), exact_student)
        got = kl(student, teacher, backend=backend, **options)
        # the result itself must not underflow fp16: ask for the gradient of a multiple
        got = gradients(got, student, torch.tensor(1 / weight))
        errors = {name: relative(g, want[name] / weight) for name, g in got.items()}
        assert max(errors.values()) <= gate, errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_word_masked_with_the_lowest_half_keeps_the_gradient(backend, monkeypatch):
    monkeypatch.setattr(schedule, "addmm", widened_addmm)
    monkeypatch.setattr("copd_kernels.flatten.operand_dtype", lambda hidden, _: hidden.dtype)
    monkeypatch.setattr(
        "copd_kernels.schedule.dlogits_dtype", lambda operand, like: operand if operand != like.dtype else None
    )
    student, teacher = make(16, 16, 50, torch.float16, spread=1.0), make(16, 16, 50, torch.float16)
    mask = torch.zeros(50, dtype=torch.float16)
    mask[7] = torch.finfo(torch.float16).min
    student, teacher = replace(student, bias=(-mask.sign() * 3).requires_grad_()), replace(teacher, bias=mask)
    wide = [cast(head, torch.float64) for head in (student, teacher)]
    assert log_softmax(wide[0])[:, 7].exp().max() > 0.2
    want = gradients(kl(*wide, backend="reference"), wide[0])
    got = gradients(kl(student, teacher, backend=backend), student)
    assert max(relative(got[name], want[name]) for name in ("dhidden", "dlm_head")) <= 3e-3


@pytest.fixture
def bf16_products():
    """What a CPU with bf16 units does with widened operands when it is told to; others ignore it."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_products_of_bf16_summed_in_fp32_keep_the_gradient(divergence):
    student = make(256, 128, 4096, torch.bfloat16)
    teacher = make(256, 128, 4096, torch.bfloat16, like=student, noise=0.05)
    exact_student = cast(student, torch.float64)
    want = kl(exact_student, cast(teacher, torch.float64), divergence=divergence, backend="reference")
    got = kl(student, teacher, divergence=divergence)
    assert relative(got, want) <= 1e-4
    wanted = gradients(want, exact_student)
    errors = {name: relative(g, wanted[name]) for name, g in gradients(got, student).items()}
    assert max(errors.values()) <= 3e-3, errors


def test_heads_of_different_dtypes_teach_each_other_in_their_own(monkeypatch):
    heads = [make(64, 16, 200, torch.bfloat16), make(64, 24, 200), make(64, 16, 200, torch.float16)]
    exact = [cast(h, torch.float64) for h in heads]
    want = mutual_kl(exact, backend="reference").loss
    monkeypatch.setattr(schedule, "addmm", widened_addmm)
    monkeypatch.setattr("copd_kernels.flatten.operand_dtype", lambda hidden, _: hidden.dtype)
    monkeypatch.setattr(
        "copd_kernels.schedule.dlogits_dtype", lambda operand, like: operand if operand != like.dtype else None
    )
    got = mutual_kl(heads).loss
    for head, e in zip(heads, exact, strict=True):
        wanted = gradients(want, e)
        assert all(relative(g, wanted[name]) < 5e-3 for name, g in gradients(got, head).items())


@pytest.mark.gpu
def test_offsets_reach_past_two_to_the_31():
    head = make(16, 16, 152064, torch.bfloat16, "cuda")
    wide = Head(head.hidden.repeat(1000, 1), head.lm_head)
    tokens = torch.randint(0, 152064, (16,), device="cuda")
    got = logprob(wide, tokens.repeat(1000), workspace_bytes=10 << 30).logp.view(1000, 16)
    assert (got == got[0]).all()


def test_a_dry_run_gives_shapes():
    def run(student, teacher, tokens):
        weight = torch.ones(N, device=tokens.device)
        per_token = kl(student, teacher, token_weight=weight, reduction="none")
        scalars = kl(student, teacher, token_weight=weight), mutual_kl([student, teacher], token_weight=weight).loss
        assert [x.shape for x in scalars] == [(), ()]
        assert all(x.shape == (N,) for x in (per_token, *logprob(student, tokens)))
        assert all(x.shape == (1, N) for x in agreement(student, teacher, k=3))
        told = kl(student, TopK(*topk(teacher, 3)), stats=True)
        assert [x.shape for x in told] == [(), (N,), (1,)]

    with torch._subclasses.fake_tensor.FakeTensorMode():
        run(make(N, D, V), make(N, D, V), torch.zeros(N, dtype=torch.int64))
    head = Head(torch.empty(N, D, device="meta"), torch.empty(V, D, device="meta"))
    run(head, head, torch.zeros(N, dtype=torch.int64, device="meta"))
