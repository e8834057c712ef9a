"""Liger's names over these ops: the value and gradient of Liger's own code on the same tensors."""

import itertools

import pytest
import torch

from copd_kernels.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss

N, V, D, E = 13, 37, 8, 5


def tensors(dtype=torch.float32, bias=False):
    g = torch.Generator().manual_seed(0)
    shapes = {"student_input": (N, D), "student_weight": (V, D), "teacher_input": (N, E), "teacher_weight": (V, E)}
    shapes |= {"student_bias": (V,), "teacher_bias": (V,)} if bias else {}
    made = {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(V, (N,), generator=g)
    labels[::3] = -100
    return made, labels


def run(loss, made, labels, **extra):
    """The loss's outputs and the gradients of the student's tensors."""
    mine = {name: x.clone().requires_grad_(name.startswith("student")) for name, x in made.items()}
    order = ("student_input", "student_weight", "teacher_input", "teacher_weight")
    biases = [mine.get(name) for name in ("student_bias", "teacher_bias")] if "student_bias" in mine else []
    out = loss(*(mine[name] for name in order), labels, *biases)
    outputs = out if isinstance(out, tuple) else (out,)
    (outputs[0] * 3).backward()
    return [x.detach() for x in outputs], [x.grad for x in mine.values() if x.requires_grad]


def close(ours, theirs, tolerance=1e-6):
    for x, y in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert (x - y).norm() <= tolerance * y.norm() + 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("hard", "both", "bias"), [(0.0, False, False), (0.5, False, True), (0.5, True, False)])
def test_the_chunked_loss_is_ligers(beta, hard, both, bias):
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    options = {"beta": beta, "weight_hard_loss": hard, "temperature": 1.7, "return_soft_hard_loss": both}
    case = tensors(bias=bias)
    theirs = run(liger.LigerFusedLinearJSDLoss(**options, compiled=False, chunk_size=4), *case)
    close(run(LigerFusedLinearJSDLoss(**options), *case), theirs)


def test_the_chunked_loss_takes_ligers_arguments_and_defaults():
    import inspect

    liger = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    for method in ("__init__", "forward"):
        theirs, ours = (inspect.signature(getattr(c, method)).parameters for c in (liger, LigerFusedLinearJSDLoss))
        assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", [True, False])
def test_the_plain_jsd_is_the_formula_that_liger_states(beta, masked):
    made, labels = tensors(torch.float64)

    def stated(student, weight, teacher, teacher_weight, labels):
        log_p, log_q = ((x @ w.T / 1.7).log_softmax(-1) for x, w in ((student, weight), (teacher, teacher_weight)))
        m = beta * log_q.exp() + (1 - beta) * log_p.exp()
        to_m = [(log.exp() * (log - m.log())).sum(-1) for log in (log_q, log_p)]
        # the limits of the JSD over beta (1 - beta), which Liger takes at the ends
        ends = {0.0: (log_q.exp() * (log_q - log_p)).sum(-1), 1.0: (log_p.exp() * (log_p - log_q)).sum(-1)}
        d = ends.get(beta, beta * to_m[0] + (1 - beta) * to_m[1])
        return d.mean() if labels is None else d[labels != -100].mean()

    labels = labels if masked else None
    close(run(LigerFusedLinearJSD(beta, temperature=1.7), made, labels), run(stated, made, labels), 1e-9)


def test_trainers_may_pass_sequences():
    made, labels = tensors()
    (flat,), _ = run(LigerFusedLinearJSDLoss(), made, labels)
    shaped = {name: x.reshape(1, N, -1) if name.endswith("input") else x for name, x in made.items()}
    (loss,), (grad, _) = run(LigerFusedLinearJSDLoss(), shaped, labels.reshape(1, N))
    torch.testing.assert_close(loss, flat)
    assert grad.shape == (1, N, D)


def test_without_a_label_the_loss_is_zero_and_so_is_its_gradient():
    made, labels = tensors()
    (loss,), grads = run(LigerFusedLinearJSDLoss(), made, labels.fill_(-100))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def test_a_padded_teacher_is_refused():
    made, labels = tensors()
    made["teacher_weight"] = torch.randn(V + 3, E)
    message = f"LigerFusedLinearJSDLoss: teacher_weight must have student_weight's {V} rows; got {V + 3}; slice"
    with pytest.raises(ValueError, match=message):
        run(LigerFusedLinearJSDLoss(), made, labels)
