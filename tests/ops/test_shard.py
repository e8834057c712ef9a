"""A vocabulary split over ranks gives what the whole one gives: values, gradients, the same bits on every rank."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from kernel_cases import FLOOR, relative
from split_cases import CHUNKED, KINDS, D, N, V, every_op, heads, leaves, mesh, parts, split, whole
from torch.distributed.tensor import DTensor, Replicate

from copd_kernels import agreement, kl, logprob, mutual_kl
from copd_kernels.agreement import agreement_op
from copd_kernels.flatten import flatten, number
from copd_kernels.kl import kl_op
from copd_kernels.logprob import logprob_op


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


def variety(heads, place):
    """What heads and arguments may be beside the ordinary; `place` puts plain hidden states where the heads' are."""
    student, *teachers = heads
    weight, index = torch.tensor([0.5, 2.0, 0.0]).to(student.hidden.dtype), torch.tensor([1, 0, -1, 2, 1])
    temperature = torch.linspace(0.7, 1.5, N)
    apart = [replace(t, hidden=place(whole(t.hidden)[index == j])) for j, t in enumerate(teachers)]
    tokens = torch.tensor([0, 3, -100, V - 1, 4])
    none = [replace(head, hidden=place(whole(head.hidden)[:0]).requires_grad_()) for head in heads]
    with torch.autocast("cpu", torch.bfloat16, enabled=student.hidden.dtype == torch.float32):
        told = kl(student, teachers, divergence="symmetric", temperature=temperature, stats=True)
        beside = logprob(student, tokens, stats=True)
        values = {
            "weighted": kl(student, teachers, teacher_weight=weight),
            "weighted jsd": kl(student, teachers, divergence="jsd", beta=0.05, teacher_weight=weight),
            "routed": kl(student, apart, divergence="forward", teacher_index=index),
            "mixture": kl(student, teachers, divergence="jsd", combine="mixture", teacher_weight=weight),
            "product": kl(student, teachers, combine="product", temperature=temperature),
            "told": told.loss,
            "a temperature a token": logprob(student, tokens, temperature=temperature).logp.sum(),
            "logits kept": logprob(student, tokens, recompute=False).entropy.sum(),
            "no token": kl(none[0], none[1]) + logprob(none[0], tokens[:0]).logp.sum() + mutual_kl(none).loss,
        }
    results = {"entropy": told.entropy, "teacher_kl": told.teacher_kl}
    results |= {name: getattr(beside, name).double() for name in ("is_top1", "mean_logits", "log_sum_sq_probs")}
    for name, value in values.items():
        learner = none[0] if name == "no token" else student
        tensors = list(parts(learner).values())
        made = torch.autograd.grad(value, tensors, retain_graph=True)
        results[name] = value.detach()
        assert [g.dtype for g in made] == [x.dtype for x in tensors]
        results |= {f"{name}, {part}": whole(g) for part, g in zip(parts(learner), made, strict=True)}
    return results


def of_variety(dtype):
    return heads("random", dtype, 4, scale=0.7, softcap=5.0)


def variety_on_ranks():
    over = mesh()
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        place = lambda x: DTensor.from_local(x, over, [Replicate()], run_check=False)  # noqa: E731
        found[dtype] = variety([split(head, over) for head in of_variety(dtype)], place)
    return found


def test_teachers_temperatures_autocast_and_no_token_at_all(ranks):
    for found in ranks(3, variety_on_ranks):
        for dtype, mine in found.items():
            exact = variety([leaves(head, torch.float64) for head in of_variety(dtype)], lambda x: x)
            alone = variety(of_variety(dtype), lambda x: x)
            for name, want in exact.items():
                error, allowed = relative(mine[name], want), 2 * relative(alone[name], want) + FLOOR[dtype]
                assert error <= allowed, f"{dtype}, {name}: {error:.2e}, allowed {allowed:.2e}"


def traffic():
    """Of each op: collectives a chunk, and bytes a token that a rank sends in all-gathers and in all-reduces."""
    over = mesh()
    student, teacher = (split(head, over) for head in heads("random", torch.float32))
    tokens = torch.arange(N)
    runs = {
        **{d: lambda d=d: kl(student, teacher, divergence=d).backward() for d in ("reverse", "forward", "jsd")},
        "none": lambda: kl(student, teacher, reduction="none").sum().backward(),
        "logprob": lambda: logprob(student, tokens).logp.sum().backward(),
        "mutual_kl": lambda: mutual_kl([student, teacher]).loss.backward(),
        "agreement": lambda: agreement(student, teacher, k=5),
    }
    sent, found = [], {}
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(parts, x, **options):
        sent.append((0, x.numel() * x.itemsize))
        gather(parts, x, **options)

    def all_reduce(x, **options):
        sent.append((1, x.numel() * x.itemsize))
        reduce(x, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    try:
        for name, run in runs.items():
            sent.clear()
            run()
            sums = [sum(size for kind, size in sent if kind == k) for k in (0, 1)]
            found[name] = [sum(kind == 0 for kind, _ in sent), sums[0] / N, sums[1] / N]
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return found


def test_five_numbers_a_side_and_the_hidden_states_gradient_travel(ranks):
    dhidden = 4 * D
    assert ranks(2, traffic)[0] == {
        "reverse": [1, 40, dhidden],
        "forward": [1, 40, dhidden],
        "jsd": [2, 52, dhidden],
        "none": [2, 80, dhidden],
        "logprob": [1, 20, dhidden],
        "mutual_kl": [2, 80, 2 * dhidden],
        # the top-k ids and their logits of both
        "agreement": [2, 40 + 2 * 5 * 8, 0],
    }


def compiled():
    over = mesh()
    student, teacher = (split(head, over) for head in heads("random", torch.float32))
    tokens = torch.arange(N)

    def loss(hidden, lm_head, bias, other):
        head = replace(student, hidden=hidden, lm_head=lm_head, bias=bias)
        of = replace(teacher, hidden=other)
        together = mutual_kl([head, of]).loss + agreement(head, of, k=3).forward_kl.sum()
        return kl(head, of, divergence="jsd") + logprob(head, tokens).logp.sum() + together

    arguments = (*parts(student).values(), teacher.hidden)
    values, gradients = [], []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = run(*arguments)
        values.append(value.detach())
        gradients.append([whole(g) for g in torch.autograd.grad(value, arguments[:3])])
    flat = flatten([student, teacher.detach()])
    tensors = (*(x[0] for x in flat[:3]), *(x[1:] for x in flat[:3]), [], torch.ones(1, 1), None, torch.ones(N))
    texts = (flat.shard, "", "", "mean", "jsd", "torch")
    rest = (number(0.5), number(1.0), flat.vocab_size, *texts, 0, False, True, [True] * 3, False)
    torch.library.opcheck(kl_op, (*tensors, flat.numbers, *rest))
    rest = (number(1.0), flat.vocab_size[0], flat.shard, -100, "torch", 0, False, False, False)
    torch.library.opcheck(logprob_op, (*(x[0] for x in flat[:3]), tokens, flat.numbers[0], *rest))
    flat = flatten([student.detach(), teacher.detach()])
    torch.library.opcheck(agreement_op, (*flat, 3, number(1.0), "torch", 0))
    return values, gradients


def test_compiles_without_a_graph_break_and_passes_opcheck(ranks):
    for values, gradients in ranks(2, compiled):
        assert torch.equal(*values)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
