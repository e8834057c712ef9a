"""Logits that lack bias, softcap or a token's temperature: the sweep that reads them first is as good as a pass."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import RUNS

from copd_kernels.rows import load
from copd_kernels.rows.raw import Raw

# in Triton two pieces a row, the last with a whole tile and part of one
R, V = 3, 2500
LACKS = {"softcap": (False, True, False), "bias, temperature": (True, False, True), "all": (True, True, True)}


def draw(lacks, device, dtype=torch.float32):
    """Logits of three heads and what they lack, the last head nothing but the temperature."""
    bias, cap, temperature = LACKS[lacks]
    z = 4 * torch.randn(3, R, V, device=device, dtype=dtype)
    offsets = torch.randn(3, V, device=device, dtype=dtype)
    offsets[2] = 0
    warm = torch.rand(R, device=device, dtype=dtype) + 0.5
    raw = Raw(V, offsets if bias else None, [3.0, 5.0, 0.0] if cap else [0.0] * 3, warm if temperature else None)
    return z, raw.of_chunk(raw.temperature)


def at_once(z, raw, rows):
    z, raw = z.clone(), replace(raw, left=set(raw.left))
    raw.complete(z, rows.complete)
    assert not raw.left
    return z


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("lacks", LACKS)
def test_a_pass_completes_raw_logits(lacks, backend, device):
    z, raw = draw(lacks, device)
    want = z.double()
    if raw.bias is not None:
        want += raw.bias.unsqueeze(1)
    for x, cap in zip(want, raw.caps, strict=True):
        if cap:
            x.copy_(cap * torch.tanh(x / cap))
    if raw.temperature is not None:
        want /= raw.temperature.unsqueeze(1)
    torch.testing.assert_close(at_once(z, raw, load(backend)).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize(
    ("lacks", "dtype"), [("softcap", torch.float32), ("all", torch.float32), ("all", torch.float64)], ids=str
)
def test_a_divergence_completes_what_it_reads(lacks, dtype, backend, device):
    rows, weight = load(backend), torch.rand(2, R, device=device, dtype=dtype)
    z, raw = draw(lacks, device, dtype)
    cap = raw.caps[0] if raw.temperature is None else raw.caps[0] / raw.temperature
    complete, dlogits, got = at_once(z, raw, rows), torch.empty_like(z[0]), torch.empty_like(z[0])
    want = rows.kl(complete, 0, [1, 2], "reverse", 0.5, weight, cap, dlogits)
    value = rows.kl(z, 0, [1, 2], "reverse", 0.5, weight, cap, got, None, raw)
    near = {"rtol": 1e-5, "atol": 1e-6}
    assert not raw.left
    torch.testing.assert_close(z, complete, **near)
    torch.testing.assert_close(value, want, **near)
    torch.testing.assert_close(got, dlogits, **near)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_heads_that_are_partly_complete_are_not_completed_twice(backend, device):
    rows = load(backend)
    z, raw = draw("all", device)
    complete = at_once(z, raw, rows)
    # of the student alone, then of one teacher asked twice beside another
    side, want = rows.logprob(z[:1], raw=raw), rows.logprob(complete[:1])
    torch.testing.assert_close(side.lse, want.lse, rtol=1e-5, atol=1e-6)
    assert raw.left == {1, 2}
    got = rows.kl(z, 0, [1, 1, 2], "forward", 0.5, raw=raw)
    assert not raw.left
    torch.testing.assert_close(z, complete, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, rows.kl(complete, 0, [1, 1, 2], "forward", 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("lacks", LACKS)
def test_log_probabilities_and_their_gradient_complete_what_they_read(lacks, backend, device):
    rows, tokens = load(backend), torch.randint(0, V, (R,), device=device)
    z, raw = draw(lacks, device)
    cap = raw.caps[0] or None
    if cap and raw.temperature is not None:
        cap = cap / raw.temperature
    upstream, (got, want) = torch.rand(3, R, device=device), torch.empty(2, R, V, device=device)
    made_again, complete = z.clone(), at_once(z, raw, rows)
    side = rows.logprob(complete[:1], tokens)
    found = rows.logprob(z[:1], tokens, None, raw)
    for a, b in zip(found, side, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[0], complete[0], rtol=1e-5, atol=1e-6)
    rows.logprob_grad(complete[:1], side, tokens, *upstream, cap, want)
    rows.logprob_grad(made_again[:1], side, tokens, *upstream, cap, got, raw.of_chunk(raw.temperature))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_agreement_completes_what_it_reads(backend, device):
    rows = load(backend)
    z, raw = draw("all", device)
    complete = at_once(z, raw, rows)
    for got, want in zip(rows.agreement(z, 0, [1, 2], 9, raw), rows.agreement(complete, 0, [1, 2], 9), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
