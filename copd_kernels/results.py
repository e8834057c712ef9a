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
