"""What the ops tell beside their results, and a temperature for each token, against their definitions."""

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    RUNS,
    SHAPES,
    SMALL_WORKSPACE,
    assert_as_good_as_torch,
    cast,
    each,
    gradients,
    make,
    relative,
)

from copd_kernels import Head, kl, logprob
from copd_kernels.reference import log_softmax

TOKENS = torch.zeros(5, dtype=torch.int64)
# two chunks of them for three heads, the second shorter
SMALL = (7, 16, 67)
KINDS = [("sum", False, 4.0), ("none", True, None), ("none", False, 4.0)]  # reduction, routed, softcap
EXTRA = ("is_top1", "mean_logits", "log_sum_sq_probs")


def runs(backend, device, dtype=torch.float32):
    return (backend, dtype, device), ("reference", dtype, device), ("reference", torch.float64, "cpu")


def logprobs(head, tokens, backend, device, dtype=torch.float32, **options):
    """Ours, eager in the same dtype, and float64."""
    for name, kind, where in runs(backend, device, dtype):
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        yield logprob(cast(head, kind, where), tokens.to(where), backend=name, stats=True, **moved)


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize("shape", ["one-token", "ragged", "past-a-tile", "tall"])
def test_what_logprob_tells_beside_matches_reference(shape, backend, device):
    N, D, V = SHAPES[shape]
    head = make(N, D, V)
    tokens = log_softmax(head).argmax(-1)
    tokens[::2] = torch.randint(0, V, tokens[::2].shape)
    workspace = max(SMALL_WORKSPACE, 4 * V)
    ours, eager, exact = logprobs(head, tokens, backend, device, workspace_bytes=workspace)
    assert torch.equal(ours.is_top1.cpu(), exact.is_top1)
    for name in EXTRA[1:]:
        results = (getattr(x, name) for x in (ours, eager, exact))
        assert_as_good_as_torch(name, *results, torch.float32)
    assert not any(getattr(ours, name).requires_grad for name in EXTRA)
    plain = logprob(cast(head, torch.float32, device), tokens.to(device), backend=backend, workspace_bytes=workspace)
    assert all(torch.equal(x, y) for x, y in zip(plain, ours, strict=False))


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_what_logprob_tells_beside_is_what_its_names_say(backend, device):
    head = make(9, 8, 50, device=device, softcap=3.0, bias=torch.randn(50, device=device))
    with torch.no_grad():
        head.hidden[4], head.hidden[5] = torch.nan, 0
        head.bias.zero_()  # row 5: all logits are equal
    tokens = torch.randint(1, 50, (9,), device=device)
    tokens[3], tokens[5], tokens[6] = -100, 0, log_softmax(head, 0.7)[6].argmax()
    out = logprob(head, tokens, temperature=0.7, backend=backend, stats=True)
    log_p = log_softmax(head, 0.7)
    z = log_p + out.lse.unsqueeze(-1)
    counts = (tokens != -100) & (torch.arange(9, device=device) != 4)
    assert torch.equal(out.is_top1, (log_p.argmax(-1) == tokens) & counts)
    assert out.is_top1[5]
    assert out.is_top1[6]
    torch.testing.assert_close(out.mean_logits[counts], z.mean(-1)[counts], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.log_sum_sq_probs[counts], log_p.exp().square().sum(-1).log()[counts])
    assert (out.mean_logits[3], out.log_sum_sq_probs[3]) == (0, 0)
    assert out.mean_logits[4].isnan()
    assert out.log_sum_sq_probs[4].isnan()


def test_a_peaked_row_keeps_its_sum_of_squares():
    z = torch.zeros(1, 300)
    z[0, 7] = 30.0
    got = logprob(Head(torch.eye(1), z.T.contiguous()), torch.zeros(1, dtype=torch.int64), stats=True).log_sum_sq_probs
    want = -2 * torch.log1p(299 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize(("backend", "device"), RUNS)
@pytest.mark.parametrize(("divergence", "reduction"), zip(DIVERGENCES, ["mean", "none"] * 2, strict=True))
def test_what_kl_tells_beside_matches_reference_and_changes_nothing(divergence, reduction, backend, device):
    N, D, V = SMALL
    student, teachers = make(N, D, V), [make(N, 8, V, softcap=9.0), make(N, D, V), make(N, 5, V)]
    weight, tokens = torch.rand(3, N), torch.rand(N)
    weight[0, ::3], weight[2], weight[:, 5], tokens[::4] = 0, 0, 0, 0  # the third teacher teaches nobody
    options = {"teacher_weight": weight, "token_weight": tokens, "divergence": divergence, "reduction": reduction}
    results = []
    for name, dtype, where in ((backend, torch.float32, device), ("reference", torch.float64, "cpu")):
        s, ts = cast(student, dtype, where), [cast(t, dtype, where) for t in teachers]
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        result = kl(s, ts, backend=name, workspace_bytes=4_300, stats=True, **moved)
        plain = kl(s, ts, backend=name, workspace_bytes=4_300, **moved)
        assert torch.equal(result.loss, plain)
        pairs = [gradients(x.sum(), s).values() for x in (result.loss, plain)]
        assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
        results.append(result)
    got, want = results
    assert relative(got.entropy, want.entropy) < 2e-6
    assert (got.entropy[::4] == 0).all()
    assert (got.entropy[5], got.teacher_kl[2]) == (0, 0)
    assert relative(got.teacher_kl, want.teacher_kl) < 2e-6
    assert not got.entropy.requires_grad
    assert not got.teacher_kl.requires_grad
    for j in (0, 1):
        keep = (tokens * weight[j] != 0).nonzero().squeeze(1)
        one = [Head(h.hidden[keep], h.lm_head, softcap=h.softcap) for h in (student, teachers[j])]
        alone = kl(*one, token_weight=tokens[keep], divergence=divergence, backend="reference")
        torch.testing.assert_close(got.teacher_kl[j].cpu(), alone.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "device"), RUNS)
def test_what_kl_tells_of_routed_tokens_matches_reference(backend, device):
    N, D, V = 21, 16, 67
    index = torch.randint(-1, 3, (N,))
    index[index == 1] = 0  # a teacher without tokens
    student, teachers = make(N, D, V), [make(int((index == j).sum()), 8 + j, V) for j in range(3)]
    results = []
    for name, where in ((backend, device), ("reference", "cpu")):
        s, ts = cast(student, torch.float32, where), [cast(t, torch.float32, where) for t in teachers]
        options = {"teacher_index": index.to(where), "workspace_bytes": SMALL_WORKSPACE}
        results.append(kl(s, ts, backend=name, stats=True, **options))
    got, want = results
    assert relative(got.entropy, want.entropy) < 2e-6
    assert (got.entropy.cpu()[index == -1] == 0).all()
    assert relative(got.teacher_kl, want.teacher_kl) < 2e-6
    assert got.teacher_kl[1] == 0


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "recompute"), each([torch.float32, torch.bfloat16], [True, False])
)
def test_a_temperature_a_token_matches_reference_for_logprob(recompute, dtype, backend, device):
    softcap = 4.0 if recompute else None
    N, D, V = SHAPES["ragged"]
    head, tokens = make(N, D, V, dtype, softcap=softcap, scale=0.7), torch.randint(0, V, (N,))
    temperature = torch.rand(N) + 0.4
    tokens[::5], temperature[::5] = -100, torch.tensor([0.0, torch.nan, -1.0]).repeat(3)[: len(tokens[::5])]
    workspace = SMALL_WORKSPACE if recompute else N * V * 4
    options = {"temperature": temperature, "workspace_bytes": workspace, "recompute": recompute}
    outputs = [*logprobs(head, tokens, backend, device, dtype, **options)]
    for name in ("logp", "entropy", "lse", *EXTRA[1:]):
        results = [getattr(x, name) for x in outputs]
        assert_as_good_as_torch(name, *results, dtype)
    heads = [cast(head, *kind) for kind in ((dtype, device), (dtype, device), (torch.float64,))]
    made = []
    for h, name in zip(heads, (backend, "reference", "reference"), strict=True):
        moved = {k: v.to(h.hidden.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        out = logprob(h, tokens.to(h.hidden.device), backend=name, **moved)
        made.append(gradients((out.logp + 0.3 * out.entropy - 0.1 * out.lse).sum(), h))
    for name in made[0]:
        assert_as_good_as_torch(name, *(x[name] for x in made), dtype)


@pytest.mark.parametrize(("backend", "device", "divergence", "kind"), each(DIVERGENCES, KINDS))
def test_a_temperature_a_token_matches_reference_for_kl(kind, divergence, backend, device):
    reduction, routed, softcap = kind
    N, D, V = SMALL
    index = torch.randint(-1, 2, (N,))
    sizes = [int((index == j).sum()) if routed else N for j in range(2)]
    heads = [make(N, D, V, softcap=softcap), make(sizes[0], 8, V, softcap=9.0), make(sizes[1], D, V)]
    temperature, weight = torch.rand(N) + 0.4, torch.rand(N)
    temperature[::5], weight[::5] = torch.nan, 0
    options = {"temperature": temperature, "token_weight": weight, "divergence": divergence, "beta": 0.3}
    options |= {"teacher_index": index} if routed else {"teacher_weight": torch.rand(2, N)}
    made = []
    for name, kind, where in runs(backend, device):
        s, *ts = (cast(h, kind, where) for h in heads)
        moved = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        value = kl(s, ts, backend=name, reduction=reduction, workspace_bytes=3_300, **moved)
        made.append({"value": value, **gradients(value.sum(), s)})
    for name in made[0]:
        assert_as_good_as_torch(name, *(x[name] for x in made), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_temperature_for_each_token_is_the_one_for_all(dtype):
    student, teacher, tokens = make(7, 8, 50, dtype), make(7, 8, 50, dtype), torch.randint(0, 50, (7,))
    each = torch.full((7,), 1.5)
    torch.testing.assert_close(kl(student, teacher, temperature=each), kl(student, teacher, temperature=1.5))
    for x, y in zip(*(logprob(student, tokens, temperature=T) for T in (each, 1.5)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("error", "message", "temperature"),
    [
        (ValueError, r"temperature must be a number or have shape \(5,\); got \(4,\)", torch.ones(4)),
        (ValueError, "temperature must be positive; got 0.0", torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])),
        (ValueError, "temperature must be positive; got nan", torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0])),
        (TypeError, "temperature must be floating; got torch.int64", torch.ones(5, dtype=torch.int64)),
        (TypeError, "temperature must be a constant; got a tensor that req", torch.ones(5, requires_grad=True)),
    ],
)
@pytest.mark.parametrize("op", ["kl", "logprob"])
def test_a_bad_temperature_is_named(op, error, message, temperature):
    head = make(5, 8, 50)
    run, other = {"kl": (kl, head), "logprob": (logprob, TOKENS)}[op]
    with pytest.raises(error, match=f"{op}: " + message):
        run(head, other, temperature=temperature)
