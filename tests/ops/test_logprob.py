"""logprob against its definition, its properties, and every message."""

import pytest
import torch
from kernel_cases import RUNS, SHAPES, SMALL_WORKSPACE, assert_as_good_as_torch, cast, gradients, make, relative

from copd_kernels import Head, logprob


def compare(head, tokens, backend, device, dtype=torch.float32, **options):
    """Ours, eager in the same dtype, and float64: three outputs, and the gradients of each."""
    run = {}
    for name, kind, where in ((backend, dtype, device), ("reference", dtype, device), ("exact", torch.float64, "cpu")):
        h = cast(head, kind, where)
        outputs = logprob(h, tokens.to(where), backend="reference" if name == "exact" else name, **options)
        run[name] = dict(outputs._asdict())
        for output, value in outputs._asdict().items():
            u = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=where)
            made = gradients(value, h, u, last=output == "lse")
            run[name] |= {f"{g} of {output}": x for g, x in made.items()}
    for name in run["exact"]:
        assert_as_good_as_torch(name, run[backend][name], run["reference"][name], run["exact"][name], dtype)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, backend, device):
    N, D, V = SHAPES[shape]
    workspace = max(SMALL_WORKSPACE, 4 * V)
    compare(make(N, D, V), torch.randint(0, V, (N,)), backend, device, workspace_bytes=workspace)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_option_and_an_ignored_token_match_reference(dtype, recompute, backend, device):
    N, D, V = SHAPES["ragged"]
    # several chunks, forward where logits are recomputed and backward in any case
    workspace = SMALL_WORKSPACE if recompute else N * V * (8 if dtype == torch.float64 else 4)
    bias = torch.randn(V + 4, dtype=dtype).requires_grad_()
    head = make(N, D, V, dtype, padding=4, scale=0.7, softcap=4.0, bias=bias)
    tokens = torch.randint(0, V, (N,))
    tokens[::5] = -1
    compare(
        head,
        tokens,
        backend,
        device,
        dtype,
        temperature=1.3,
        ignore_index=-1,
        workspace_bytes=workspace,
        recompute=recompute,
    )


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("token", [7, 8])
def test_peaked_rows_keep_their_gradient(token, backend, device):
    head = make(32, 16, 300, device=device, spread=0.3)
    with torch.no_grad():
        head.hidden[:, 0], head.lm_head[:, 0] = 1.0, 0.0
        head.lm_head[7, 0] = 24.0
    tokens = torch.full((32,), token, device=device)
    h = cast(head, torch.float64)
    exact = logprob(h, tokens.cpu(), backend="reference")
    for name, got in logprob(head, tokens, backend=backend)._asdict().items():
        want = getattr(exact, name)
        assert relative(got, want) <= 1e-4, name
        wanted = gradients(want.sum(), h)
        errors = {g: relative(x, wanted[g]) for g, x in gradients(got.sum(), head).items()}
        assert max(errors.values()) <= 1e-3, (name, errors)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_an_ignored_token_gives_zero_and_no_gradient_even_if_it_is_not_a_number(backend, device):
    head = make(9, 8, 50, device=device)
    with torch.no_grad():
        head.hidden[[2, 8]] = torch.nan
    tokens = torch.randint(0, 50, (9,), device=device)
    tokens[[2, 8]] = -100
    outputs = logprob(head, tokens, backend=backend)
    assert all((x[[2, 8]] == 0).all() and x.isfinite().all() for x in outputs)
    for g in gradients(sum(x.sum() for x in outputs), head).values():
        assert g.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_masked_word_has_no_mass(backend, device):
    bias = torch.zeros(50, device=device)
    bias[3] = -torch.inf
    head = make(9, 8, 50, device=device, bias=bias)
    others = [i for i in range(50) if i != 3]
    tokens = torch.randint(0, 49, (9,), device=device)
    got = logprob(head, torch.tensor(others, device=device)[tokens], backend=backend)
    want = logprob(Head(head.hidden, head.lm_head[others]), tokens, backend="reference")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)
    (dhidden,) = torch.autograd.grad(sum(x.sum() for x in got), head.hidden)
    assert dhidden.isfinite().all()


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_probabilities_of_all_tokens_sum_to_one(backend, device):
    head = make(1, 8, 211, device=device)
    everywhere = Head(head.hidden.expand(211, 8), head.lm_head)
    logp = logprob(everywhere, torch.arange(211, device=device), backend=backend).logp
    torch.testing.assert_close(logp.exp().sum().cpu(), torch.tensor(1.0))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_a_tiny_upstream_gradient_does_not_underflow_in_half_precision(backend, device):
    head = make(37, 16, 211, torch.float16, device)
    tokens = torch.randint(0, 211, (37,), device=device)
    logp = logprob(head, tokens, backend=backend).logp
    plain, tiny = (gradients(logp, head, torch.full_like(logp, u)) for u in (1.0, 2.0**-12))
    for name, g in tiny.items():
        # what is left is the subnormal spacing of the fp16 result itself
        torch.testing.assert_close(g.double() * 2**12, plain[name].double(), rtol=1e-3, atol=2.0**-12)


def test_gradcheck_passes_in_float64():
    head = make(4, 3, 7, torch.float64)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 6, -100, 3])

    def outputs(hidden, lm_head, bias):
        return logprob(Head(hidden, lm_head, bias, scale=1.2, softcap=3.0), tokens, temperature=0.9)

    assert torch.autograd.gradcheck(outputs, (head.hidden, head.lm_head, bias))


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "kept"])
def test_two_calls_and_two_backwards_are_identical_to_the_bit(recompute, backend, device):
    head = make(21, 16, 500, device=device)
    options = {"recompute": recompute, "workspace_bytes": SMALL_WORKSPACE if recompute else 21 * 500 * 4}
    tokens = torch.randint(0, 500, (21,), device=device)
    runs = []
    for _ in range(2):
        value = logprob(head, tokens, backend=backend, **options).logp
        runs += [{"logp": value, **gradients(value.sum(), head)} for _ in range(2)]
    for other in runs[1:]:
        assert all(torch.equal(other[name], x) for name, x in runs[0].items())


def test_no_token_gives_empty_results_and_zero_gradients():
    head = make(0, 8, 50)
    outputs = logprob(head, torch.empty(0, dtype=torch.int64))
    assert all(x.shape == (0,) for x in outputs)
    assert (gradients(outputs.logp.sum(), head)["dlm_head"] == 0).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "tokens must be int64; got torch.int32", {"tokens": torch.zeros(5, dtype=torch.int32)}),
        (ValueError, r"tokens must have shape \(5,\); got \(4,\)", {"tokens": torch.zeros(4, dtype=torch.int64)}),
        (ValueError, "tokens must be in 0..49 or -100; got 50", {"tokens": torch.full((5,), 50)}),
        (ValueError, "tokens must be in 0..49 or -100; got -1", {"tokens": torch.full((5,), -1)}),
        (ValueError, "temperature must be positive; got -1", {"temperature": -1}),
        (ValueError, "workspace_bytes must be positive; got 0", {"workspace_bytes": 0}),
        (ValueError, "recompute must be True, False or 'auto'; got 'never'", {"recompute": "never"}),
    ],
)
def test_bad_input_is_named(error, message, arguments):
    with pytest.raises(error, match="logprob: " + message):
        logprob(make(5, 8, 50), **{"tokens": torch.zeros(5, dtype=torch.int64)} | arguments)
