"""The float64 reference itself, against 400-digit arithmetic on rows where eager PyTorch is wrong."""

import mpmath
import pytest
import torch
from kernel_cases import DIVERGENCES

from copd_kernels import Head, kl, logprob

V = 9
STUDENT, TEACHER = torch.randn(2, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOP, OTHER = torch.eye(V, dtype=torch.float64)[:2]
ROWS = {
    "plain": (STUDENT, TEACHER),
    "nearly equal": (STUDENT, STUDENT + 0.01 * TEACHER),
    "nearly uniform": (1e-2 * STUDENT, 1e-2 * TEACHER),
    "a gap of 40, one top": (STUDENT + 40 * TOP, TEACHER + 41 * TOP),
    "a gap of 40, two tops": (STUDENT + 40 * TOP, TEACHER + 41 * OTHER),
    "a gap of 300": (STUDENT + 300 * TOP, STUDENT + 0.3 * TEACHER + 301 * TOP),
    "logits of 1e16": (1e16 * (TOP + OTHER) - 2 * TOP, 1e16 * (TOP + OTHER) - 4 * OTHER),
}


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(400):
        yield


def head(z):
    """A head whose logits are its bias, whose gradient is that of the logits."""
    return Head(z.new_zeros(1, 1), z.new_zeros(V, 1), z.clone().requires_grad_())


def softmax(z):
    e = [mpmath.exp(mpmath.mpf(x)) for x in z.tolist()]
    return [x / mpmath.fsum(e) for x in e]


def mean(p, x):
    return mpmath.fsum(a * b for a, b in zip(p, x, strict=True))


def exact_kl(divergence, z, t, beta):
    """Value and gradient by the student's logits."""
    p, q = softmax(z), softmax(t)
    if divergence == "jsd":
        m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
        u, w = ([mpmath.log(a / b) for a, b in zip(x, m, strict=True)] for x in (p, q))
        centre = mean(p, u)
        return beta * mean(q, w) + (1 - beta) * centre, [
            (1 - beta) * a * (x - centre) for a, x in zip(p, u, strict=True)
        ]
    log_ratio = [mpmath.log(a / b) for a, b in zip(p, q, strict=True)]
    reverse, forward = mean(p, log_ratio), -mean(q, log_ratio)
    by_reverse = [a * (x - reverse) for a, x in zip(p, log_ratio, strict=True)]
    by_forward = [a - b for a, b in zip(p, q, strict=True)]
    by_both = [a + b for a, b in zip(by_reverse, by_forward, strict=True)]
    return {
        "reverse": (reverse, by_reverse),
        "forward": (forward, by_forward),
        "symmetric": (reverse + forward, by_both),
    }[divergence]


def relative(got, want):
    """Largest error over the largest number: of one value, or of a gradient."""
    return float(max(abs(mpmath.mpf(a) - b) for a, b in zip(got, want, strict=True)) / max(abs(x) for x in want))


@pytest.mark.parametrize("beta", [1e-8, 0.3, 1 - 1e-8])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("row", ROWS)
def test_divergences_and_their_gradients_are_right_to_eleven_digits(row, divergence, beta):
    z, t = ROWS[row]
    student = head(z)
    value = kl(student, head(t), divergence=divergence, beta=beta, backend="reference")
    (dlogits,) = torch.autograd.grad(value, student.bias)
    want, gradient = exact_kl(divergence, z, t, mpmath.mpf(beta))
    assert relative([value.item()], [want]) < 1e-11
    assert relative(dlogits.tolist(), gradient) < 1e-11


@pytest.mark.parametrize("row", ROWS)
def test_log_probs_and_entropy_are_right_to_eleven_digits(row):
    z, _ = ROWS[row]
    p = softmax(z)
    entropy = -mean(p, [mpmath.log(x) for x in p])
    for token in range(V):
        got = logprob(head(z), torch.tensor([token]), backend="reference")
        assert relative([got.logp.item()], [mpmath.log(p[token])]) < 1e-11
        assert relative([got.entropy.item()], [entropy]) < 1e-11
        student = head(z)
        (dlogits,) = torch.autograd.grad(
            logprob(student, torch.tensor([token]), backend="reference").logp, student.bias
        )
        assert relative(dlogits.tolist(), [(v == token) - x for v, x in enumerate(p)]) < 1e-11
