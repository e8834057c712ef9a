"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogProb(NamedTuple):
    """Per token, fp32 (fp64 for fp64 inputs), in nats; all differentiable."""

    logp: Tensor
    """(...): log-probability of the token"""
    entropy: Tensor
    """(...): of the next-token distribution"""
    lse: Tensor
    """(...): logsumexp of the logits over temperature"""


class LogProbStats(NamedTuple):
    """A `LogProb`, and what the same sweep knows beside it, without gradient: 0 or False where a token is ignored."""

    logp: Tensor
    """as in `LogProb`, like the two that follow"""
    entropy: Tensor
    lse: Tensor
    is_top1: Tensor
    """(...), bool: whether no token has a larger logit, nor an equal one at a lower id"""
    mean_logits: Tensor
    """(...): mean over the vocabulary of the logits over temperature"""
    log_sum_sq_probs: Tensor
    """(...): log sum_v p_v^2, minus the Rényi entropy of order 2"""


class KL(NamedTuple):
    """What `kl` returns with `stats=True`, fp32 (fp64 if any head is), in nats."""

    loss: Tensor
    """() or (...): what `kl` returns without it; alone differentiable"""
    entropy: Tensor
    """(...): of the student's next-token distribution; 0 where the token's weight is 0 or it has no teacher"""
    teacher_kl: Tensor
    """(T,): each teacher's mean divergence over the tokens it teaches, weighted by `token_weight`; 0 if it has none"""


class MutualKL(NamedTuple):
    loss: Tensor
    """(): weighted sum of `edge_kl`, differentiable in every student"""
    edge_kl: Tensor
    """(E,): mean divergence of each edge in nats, detached"""


class Agreement(NamedTuple):
    """Per teacher and token, fp32 (fp64 for fp64 inputs), without gradient."""

    overlap: Tensor
    """(T, ...): share of the k likeliest tokens that student and teacher have in common"""
    forward_kl: Tensor
    """(T, ...): KL(teacher || student) in nats"""
    reverse_kl: Tensor
    """(T, ...): KL(student || teacher) in nats"""
