"""RLVR by GRPO: rewards to group advantages, advantages and log-probs to the clipped loss.

Â_i  = (r_i − mean(r_1..r_G)) / (std(r_1..r_G) + eps)
ρ_it = exp(logp_it − logp_old_it)
loss = −Σ_it w_it min(ρ_it Â_it, clip(ρ_it, 1 − ε_low, 1 + ε_high) Â_it)
"""

from __future__ import annotations

import torch
from torch import Tensor

from copd.settings import RLVRConfig


def advantages(reward: Tensor, cfg: RLVRConfig) -> Tensor:
    """Group advantages (P, G) fp32 of `reward` (P, G); zero for a group of equal rewards, and where a reward is NaN.

    NaN is a completion without reward: the others of its group are compared without it.
    """
    centred, spread = reward - reward.nanmean(1, keepdim=True), deviation(reward)[:, None]
    advantage = centred / (spread + cfg.advantage_eps) if cfg.normalize_advantage else centred
    return advantage.where(~reward.isnan() & (spread > 0), 0.0)


def deviation(reward: Tensor) -> Tensor:
    """Standard deviation (P,) fp32 of each group of (P, G), NaN left out; exactly 0 where the rest is one number."""
    known = ~reward.isnan()
    of_the_known = (reward - reward.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
    # the population's deviation, so that one sample a prompt gives 0 and not NaN
    spread = reward.std(1, correction=0).where(known.all(1), of_the_known)
    # the mean of eight times 0.7 is not 0.7
    return spread.where(reward.where(known, -torch.inf).amax(1) > reward.where(known, torch.inf).amin(1), 0.0)


def token_weights(mask: Tensor, cfg: RLVRConfig, rows: int | None = None, tokens: int | None = None) -> Tensor:
    """Weight (B, C) fp32 of each token in the loss: 1 / (B |y_i|), or 1 / Σ|y_i|; 0 outside `mask` (B, C).

    `rows` and `tokens` are those of the whole batch, of which these rows are a part; None where they are all.
    """
    weight = mask.float()
    if cfg.loss_aggregation == "token":
        return weight / (weight.sum() if tokens is None else weight.new_tensor(tokens)).clamp(min=1)
    return weight / (weight.sum(1, keepdim=True).clamp(min=1) * (rows or len(mask)))


def policy_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, weight: Tensor, cfg: RLVRConfig, clip: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss above over N tokens, and the weighted share of tokens that each clip stops. All (N,) fp32."""
    ratio = (logp - logp_old).exp()
    if not clip:
        return -(weight * ratio * advantage).sum(), {}
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -(weight * torch.minimum(ratio * advantage, bounded * advantage)).sum()
    low = (ratio < 1 - cfg.clip_low) & (advantage < 0)
    high = (ratio > 1 + cfg.clip_high) & (advantage > 0)
    return loss, {
        "clip_ratio/low_mean": (weight * low).sum().detach(),
        "clip_ratio/high_mean": (weight * high).sum().detach(),
    }
