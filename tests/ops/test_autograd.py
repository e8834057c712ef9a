"""What surrounds an op in training: checkpointing, hooks on saved tensors, teachers made in inference mode."""

import pytest
import torch
from kernel_cases import gradients, make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from copd_kernels import Head, agreement, kl, logprob, mutual_kl

N, D, V = 6, 8, 30
OPS = {
    "kl": lambda a, b: kl(a, [b, b]),
    "kl none": lambda a, b: kl(a, [b, b], reduction="none").sum(),
    "logprob": lambda a, _: sum(x.sum() for x in logprob(a, torch.arange(N), recompute=True)),
    "logprob, kept": lambda a, _: sum(x.sum() for x in logprob(a, torch.arange(N), recompute=False)),
    "mutual_kl": lambda a, b: mutual_kl([a, b, Head(b.hidden + 1, b.lm_head)]).loss,
    # it has no gradient: it must not disturb that of what stands beside it
    "agreement": lambda a, b: a.hidden.square().sum() + agreement(a, b).overlap.sum(),
}
ops = pytest.mark.parametrize("op", OPS)


@ops
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_those_without(op, reentrant):
    a, b = make(N, D, V), make(N, D, V)
    tensors = (a.hidden, a.lm_head, b.hidden, b.lm_head)

    def f(h, w, other, v):
        return OPS[op](Head(h, w), Head(other, v))

    students = tensors[:2] if op != "agreement" else tensors[:1]
    want = torch.autograd.grad(f(*tensors), students)
    checkpoint(f, *tensors, use_reentrant=reentrant).backward()
    for student, g in zip(students, want, strict=True):
        torch.testing.assert_close(student.grad, g)


@ops
def test_every_saved_tensor_is_unpacked_once(op):
    counts = {"packed": 0, "unpacked": 0}

    def count(what):
        def hook(x):
            counts[what] += 1
            return x

        return hook

    with saved_tensors_hooks(count("packed"), count("unpacked")):
        loss = OPS[op](make(N, D, V), make(N, D, V))
    loss.backward()
    assert counts["unpacked"] == counts["packed"] > 0


@ops
def test_a_graph_that_is_kept_gives_the_gradients_again_and_those_of_one_that_is_not(op):
    a, b = make(N, D, V), make(N, D, V)
    students = [a.hidden, a.lm_head] if op != "agreement" else [a.hidden]
    loss = OPS[op](a, b)
    first = torch.autograd.grad(loss, students, retain_graph=True)
    copies = [g.clone() for g in first]
    # the last backward may write over what was saved, not over what an earlier one gave
    last = torch.autograd.grad(3 * loss, students)
    for before, copy, after in zip(first, copies, last, strict=True):
        assert before.equal(copy)
        torch.testing.assert_close(after, 3 * before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("routed", [False, True])
def test_kl_takes_what_inference_mode_made(reduction, routed):
    student, teacher = make(N, D, V), make(N, D, V).detach()
    options = {"teacher_index": torch.zeros(N, dtype=torch.int64)} if routed else {"teacher_weight": torch.rand(1, N)}
    options |= {"token_weight": torch.rand(N)}
    want = gradients(kl(student, teacher, reduction=reduction, **options).sum(), student)
    with torch.inference_mode():
        teacher = Head(teacher.hidden.clone(), teacher.lm_head.clone(), vocab_size=V)
        options = {name: x.clone() for name, x in options.items()}
    got = gradients(kl(student, teacher, reduction=reduction, **options).sum(), student)
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


def test_the_other_ops_take_what_inference_mode_made():
    student, teacher = make(N, D, V), make(N, D, V).detach()

    def losses(teacher, tokens, weight):
        agreed = agreement(student, teacher)
        mutual = mutual_kl([student, teacher], edges=[(0, 1)], edge_weight=weight[:1], token_weight=weight)
        return logprob(student, tokens).logp.sum() + mutual.loss + agreed.reverse_kl.sum()

    want = gradients(losses(teacher, torch.arange(N), torch.ones(N)), student)
    with torch.inference_mode():
        made = Head(teacher.hidden.clone(), teacher.lm_head.clone()), torch.arange(N), torch.ones(N)
    got = gradients(losses(*made), student)
    for name, g in want.items():
        torch.testing.assert_close(got[name], g)


@ops
def test_a_dry_run_gives_shapes(op):
    with FakeTensorMode():
        a = Head(*(torch.randn(n, D, requires_grad=True) for n in (N, V)))
        b = Head(torch.randn(N, D), torch.randn(V, D))
        loss = OPS[op](a, b)
        weighted = kl(a, b, token_weight=torch.ones(N), reduction="none")
        loss.backward()
    assert (loss.shape, weighted.shape, a.hidden.grad.shape) == ((), (N,), (N, D))
