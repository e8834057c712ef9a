"""What every op means: plain PyTorch on full logits, safe in float64.

This file is the definition of correct. On float64 inputs it is the oracle of every test, right on peaked rows too; on
inputs of a model's own dtype it is what an eager trainer would compute, and the yardstick of what error is acceptable.
It holds (N, V) arrays, which is what the rest of this package exists to avoid. `backend="reference"` runs it.

Arguments are those of the public ops, already checked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import is_per_token
from .head import Head
from .results import KL, Agreement, LogProbStats, MutualKL
from .teachers import Teacher, TopK


def log_softmax(head: Head, temperature: float | Tensor = 1.0) -> Tensor:
    """(..., V) log-probabilities, fp32 or fp64, from logits in the head's own dtype."""
    return normalise(logits(head) / temperature)[0]


def normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax (..., V) and logsumexp (...) of logits; in float64 with the top token's term taken out of the sum.

    torch.log_softmax subtracts a rounded logsumexp: at a gap of 40 the top token has log p 0 and not -4e-18, and a
    peaked row's entropy and divergences consist of nothing else.
    """
    if z.dtype != torch.float64:
        lse = torch.logsumexp(z, -1)
        # as below, NaN where it is infinite
        return torch.log_softmax(z, -1), lse + 0 * lse
    top = z.max(-1, keepdim=True).indices
    largest = z.gather(-1, top)
    x = z - largest
    # x at the top is 0, or NaN where the largest logit is infinite: such a row has no distribution
    tail = x.exp().scatter(-1, top, 0).sum(-1, keepdim=True) + x.gather(-1, top)
    norm = torch.log1p(tail)
    return x - norm, (largest + norm).squeeze(-1)


def logits(head: Head) -> Tensor:
    """(..., V): the GEMM in the head's dtype, all that follows in fp32 or fp64."""
    bias = None if head.bias is None else head.bias[: head.V]
    z = torch.nn.functional.linear(head.hidden, head.lm_head[: head.V], bias)
    z = head.scale * z.to(accumulator(head.hidden.dtype))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any input is fp64, else fp32: the dtype of all that is summed and of every per-token result."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def logprob(head: Head, tokens: Tensor, *, temperature: float | Tensor = 1.0, ignore_index: int = -100) -> LogProbStats:
    """logp_n = z_n[tokens_n] - lse_n, entropy_n = -sum_v p_v log p_v, lse_n = log sum_v exp(z_v), z = logits / T."""
    keep = tokens != ignore_index
    z = logits(rows(head, keep)) / column(temperature, keep)
    log_p, lse = normalise(z)
    token = tokens[keep].unsqueeze(-1)
    logp = log_p.gather(-1, token).squeeze(-1)
    largest = log_p == log_p.amax(-1, keepdim=True)  # none in a row that is no distribution
    is_top1 = largest.gather(-1, token) & (largest.to(torch.uint8).argmax(-1, keepdim=True) == token)
    more = is_top1.squeeze(-1), z.mean(-1) + 0 * lse, torch.logsumexp(2 * log_p, -1)
    results = logp, entropy(log_p), lse, *(x.detach() for x in more)
    return LogProbStats(*(scatter(x, keep) for x in results))


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * zero_where(log_p == -torch.inf, log_p)).sum(-1)


def column(temperature: float | Tensor, keep: Tensor) -> float | Tensor:
    """One number, or the kept tokens' own, (..., 1)."""
    return temperature[keep].unsqueeze(-1) if is_per_token(temperature, keep.shape) else temperature


def diverge(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """(...): how far student p is from teacher q, from (..., V) log-probs. 0 log 0 is 0."""
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * zero_where(p == 0, log_p - log_q)).sum(-1)
    forward = (q * zero_where(q == 0, log_q - log_p)).sum(-1)
    if divergence == "reverse":
        return reverse
    if divergence == "forward":
        return forward
    if divergence == "symmetric":
        return reverse + forward
    to_student, to_teacher = mixture_ratios(log_p, log_q, beta)
    teacher = (q * zero_where(q == 0, to_teacher)).sum(-1)
    student = (p * zero_where(p == 0, to_student)).sum(-1)
    return beta * teacher + (1 - beta) * student


def mixture_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log p / m and log q / m (..., V) of m = beta q + (1 - beta) p."""
    if log_p.dtype != torch.float64:
        m = beta * log_q.exp() + (1 - beta) * log_p.exp()
        log_m = torch.log(torch.where(m == 0, 1, m))
        return log_p - log_m, log_q - log_m
    # from r = log p / q, because m rounds to 1 where both are peaked. What the divergence gains through m is
    # (beta q + (1 - beta) p) dm / m = dm, whose sum is 0: r is detached, so that nothing has to cancel
    r = (log_p - log_q).detach()
    logs = math.log1p(-beta), math.log(beta)
    return ratio(r, beta, *logs), ratio(-r, 1 - beta, *reversed(logs))


def ratio(r: Tensor, share: float, log_rest: float, log_share: float) -> Tensor:
    """-log(1 - share + share exp(-r)): exact near 0, and its limit at ±inf."""
    near = r.abs() < 0.5
    close = torch.log1p(share * torch.expm1(-torch.where(near, r, 0)))
    far = torch.logaddexp(log_share - r, r.new_tensor(log_rest))
    return -torch.where(near, close, far)


def with_rest(logp: Tensor, dtype: torch.dtype, log_p_rest: Tensor, V: int) -> Tensor:
    """(..., k + 1) log-probs of listed words and of all others, for `logp` that had `dtype`; see `TopK`.

    What the words leave is known to that dtype's resolution, and is 0 if it is less and the student has nothing there
    (`log_p_rest` is -inf), or if no word is left.
    """
    k = logp.shape[-1]
    rest = -torch.expm1(torch.logsumexp(logp, -1))
    least = 2 * torch.finfo(dtype).eps
    nothing = (rest <= least) & (log_p_rest == -torch.inf)
    if k == V:
        nothing = torch.ones_like(nothing)
    log_rest = torch.where(nothing, -torch.inf, rest.clamp(min=least).log())
    return torch.cat([logp, log_rest.unsqueeze(-1)], -1)


def on_words(log_p: Tensor, ids: Tensor, absent: Tensor) -> Tensor:
    """(..., k + 1): log-probs of the words `ids`, -inf where absent, and of all others."""
    ids = ids.clamp(0, log_p.shape[-1] - 1)
    named = torch.zeros_like(log_p).scatter_add(-1, ids, (~absent).to(log_p.dtype)) > 0
    inside = torch.where(absent, -torch.inf, log_p.gather(-1, ids))
    rest = torch.where(named.all(-1), -torch.inf, torch.logsumexp(torch.where(named, -torch.inf, log_p), -1))
    return torch.cat([inside, rest.unsqueeze(-1)], -1)


def diverge_on(log_p: Tensor, log_q: Tensor, tail: str, divergence: str, beta: float) -> Tensor:
    """(...): from log-probs (..., k + 1) of a few words and of all others."""
    if tail == "bucket":
        return diverge(log_p, log_q, divergence, beta)
    log_p, log_q = log_p[..., :-1], log_q[..., :-1]
    if tail == "renormalise":
        log_p, log_q = normalise(log_p)[0], normalise(log_q)[0]
    return diverge(log_p, log_q, divergence, beta)


def against(
    log_p: Tensor,
    log_q: Tensor | TopK,
    divergence: str,
    beta: float,
    support: str | None,
    k: int | None,
    tail: str,
) -> Tensor:
    """(R,): of the student's log-probs (R, V) from a teacher's, or from its list."""
    if isinstance(log_q, TopK):
        absent = log_q.logp == -torch.inf
        short = on_words(log_p, log_q.ids, absent)
        said = with_rest(log_q.logp.to(log_p.dtype), log_q.logp.dtype, short[..., -1].detach(), log_p.shape[-1])
        return diverge_on(short, normalise(said)[0], log_q.tail, divergence, beta)
    if support is None:
        return diverge(log_p, log_q, divergence, beta)
    assert k is not None
    ids = (log_p if support == "student" else log_q).topk(k).indices
    every = torch.zeros_like(ids, dtype=torch.bool)
    return diverge_on(on_words(log_p, ids, every), on_words(log_q, ids, every), tail, divergence, beta)


def combined(log_q: list[Tensor], share: Tensor, combine: str) -> Tensor:
    """(R, V) log-probs of one teacher made of T, which have shares (T, R); one without any says nothing."""
    silent = (share == 0).unsqueeze(-1)
    stacked = torch.stack(log_q)
    if combine == "mixture":
        return torch.logsumexp(torch.where(silent, -torch.inf, stacked + share.log().unsqueeze(-1)), 0)
    return normalise(zero_where(silent, share.unsqueeze(-1) * stacked).sum(0))[0]


def kl(
    student: Head,
    teachers: list[Teacher],
    *,
    divergence: str,
    beta: float,
    support: str | None,
    k: int | None,
    tail: str,
    combine: str,
    temperature: float | Tensor,
    teacher_weight: Tensor | None,
    teacher_index: Tensor | None,
    token_weight: Tensor,
    reduction: str,
) -> KL:
    """sum_n w_n sum_j w_jn D(student_n, teacher_jn), over sum_n w_n for the mean; w·d per token for "none"."""
    how = divergence, beta, support, k, tail
    d = token_weight.new_zeros(token_weight.shape)
    means, has_teacher = [], torch.zeros_like(token_weight, dtype=torch.bool)
    for j, teacher in enumerate(teachers):
        if teacher_index is None:
            assert teacher_weight is not None  # one of the two is given
            owned, weight = teacher_weight[j] != 0, teacher_weight[j]
            theirs = owned & (token_weight != 0)
        else:
            owned, weight = teacher_index == j, token_weight.new_ones(())
            theirs = (token_weight != 0)[owned]
        keep = owned & (token_weight != 0)
        has_teacher = has_teacher | keep
        term = against(
            log_softmax(rows(student, keep), column(temperature, keep)),
            said(teacher, theirs, column(temperature, keep)),
            *how,
        )
        means.append(mean(term, token_weight[keep]))
        if combine == "mean" or teacher_index is not None:
            d = d + scatter(weight.expand_as(token_weight)[keep] * term, keep)
    if combine != "mean" and teacher_weight is not None:
        keep, total = has_teacher, teacher_weight.sum(0)
        share = (teacher_weight / torch.where(total > 0, total, 1))[:, keep]
        T = column(temperature, keep)
        log_q = [log_softmax(rows(teacher.detach(), keep), T) for teacher in teachers if isinstance(teacher, Head)]
        term = against(log_softmax(rows(student, keep), T), combined(log_q, share, combine), *how)
        d = scatter(total[keep] * term, keep)
    d = zero_where(token_weight == 0, token_weight * d)
    total = token_weight.sum()
    loss = {"none": d, "sum": d.sum(), "mean": d.sum() / torch.where(total > 0, total, 1)}[reduction]
    own = entropy(log_softmax(rows(student.detach(), has_teacher), column(temperature, has_teacher)))
    return KL(loss, scatter(own, has_teacher).to(d.dtype), torch.stack(means).detach())


def said(teacher: Teacher, keep: Tensor, temperature: float | Tensor) -> Tensor | TopK:
    """What a teacher says of the kept tokens: log-probs (R, V), or its list."""
    if isinstance(teacher, TopK):
        return TopK(teacher.ids[keep], teacher.logp.detach()[keep], teacher.tail, teacher.temperature)
    return log_softmax(rows(teacher.detach(), keep), temperature)


def mean(values: Tensor, weight: Tensor) -> Tensor:
    total = weight.sum()
    return (weight * values).sum() / torch.where(total > 0, total, 1)


def mutual_kl(
    heads: list[Head],
    *,
    edges: list[tuple[int, int]],
    edge_weight: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    token_weight: Tensor,
) -> MutualKL:
    """loss = sum_e edge_weight_e * mean_n D(heads[student_e], heads[teacher_e])."""
    one = edge_weight.new_ones(1, *token_weight.shape)
    edge_kl = [
        kl(
            heads[s],
            [heads[t]],
            divergence=divergence,
            beta=beta,
            support=None,
            k=None,
            tail="bucket",
            combine="mean",
            temperature=temperature,
            teacher_weight=one,
            teacher_index=None,
            token_weight=token_weight,
            reduction="mean",
        ).loss
        for s, t in edges
    ]
    # an edge of weight zero contributes nothing, not even a NaN
    weighted = [weight * term for weight, term in zip(edge_weight, edge_kl, strict=True) if weight != 0]
    return MutualKL(sum(weighted, edge_weight.new_zeros(())), torch.stack(edge_kl).detach())


@torch.no_grad()
def agreement(student: Head, teachers: list[Head], *, k: int, temperature: float) -> Agreement:
    """overlap = |top-k(student) ∩ top-k(teacher)| / k, ties to the lower id; both KLs."""
    log_p = log_softmax(student, temperature)
    results = []
    for teacher in teachers:
        log_q = log_softmax(teacher, temperature)
        common = (top_k(log_p, k) & top_k(log_q, k)).sum(-1).to(log_p.dtype) / k
        forward, reverse = (diverge(log_p, log_q, divergence, 0.5) for divergence in ("forward", "reverse"))
        results.append((torch.where(forward.isnan(), forward, common), forward, reverse))
    return Agreement(*(torch.stack(x) for x in zip(*results, strict=True)))


def top_k(scores: Tensor, k: int) -> Tensor:
    """(..., V) bool: the k largest, the lower id first among equals."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def rows(head: Head, keep: Tensor) -> Head:
    """The head at the kept tokens only: a token left out cannot contribute, not even a NaN."""
    return Head(head.hidden[keep], head.lm_head, head.bias, head.scale, head.softcap, head.vocab_size)


def scatter(values: Tensor, keep: Tensor) -> Tensor:
    return values.new_zeros(keep.shape).masked_scatter(keep, values)


def zero_where(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask, torch.zeros((), dtype=x.dtype, device=x.device), x)
