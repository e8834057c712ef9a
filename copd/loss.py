"""What a micro-batch adds to the loss: the policy loss of its rewards, and what its teachers ask of it."""

from __future__ import annotations

import torch
from torch import Tensor

from copd.batch import Batch
from copd.config import Config
from copd.distill import delta
from copd.peers import Peers
from copd.rlvr import policy_loss
from copd_kernels import Head, logprob

Parts = dict[str, Tensor]


def loss_of(
    batch: Batch, micro: int, rows: list[int], head: Head, tokens: Tensor, beta: float, cfg: Config
) -> tuple[Tensor, Parts]:
    """The loss of micro-batch `micro`, the `rows` of a batch, and its parts as they are logged.

    `head` and `tokens` (N,) are those of the completion tokens; `beta` weighs what the teachers say.
    """
    rollout, lesson = batch.rollout, batch.lesson
    mask = rollout.mask[rows]
    sampled = lesson is not None and lesson.signal == "sampled"
    weight = batch.weight[rows][mask]
    of_token = torch.tensor(rows, device=mask.device)[:, None].expand(mask.shape)[mask]
    parts: Parts = {}
    loss = weight.new_zeros(())
    if batch.advantage is not None or sampled:
        seen = logprob(head, tokens, temperature=cfg.rollout.temperature)
        old = batch.logp_old.setdefault(micro, seen.logp.detach())
        sampled_weight = weight * truncated(old - rollout.logp[rows][mask], cfg.rlvr.importance_cap)
    if batch.advantage is not None:
        advantage = batch.advantage[of_token]
        parts["entropy"] = (weight * seen.entropy.detach()).sum()
        parts["sampling_logp_difference"] = (weight * (old - rollout.logp[rows][mask]).abs()).sum()
        loss, clipped = policy_loss(seen.logp, old, advantage, sampled_weight, cfg.rlvr)
        parts |= clipped | {"loss/rlvr": loss.detach()}
    if lesson is not None:
        if sampled:
            advantage = delta(lesson.logp(micro, of_token), old, cfg.opd)
            # the sampled estimate of KL(student || teacher)
            parts[lesson.key] = -(weight * advantage).sum()
            opd, _ = policy_loss(seen.logp, old, advantage, sampled_weight, cfg.rlvr, clip=cfg.opd.clip_ratio)
        else:
            opd = lesson.loss(head, micro, of_token, weight, cfg.rollout.temperature, cfg.opd)
            parts[lesson.key] = opd.detach()
        parts["loss/opd"] = beta * opd.detach()
        loss = beta * opd if batch.advantage is None else loss + beta * opd
    parts["loss"] = loss.detach()
    return loss, parts


def truncated(difference: Tensor, cap: float | None) -> Tensor:
    """min(π / π_sampler, cap) (N,) from log π − log π_sampler; 1 without a cap.

    What makes a loss over the sampler's tokens one over the policy's own, where the two compute in other ways
    (truncated importance sampling, Yao et al. 2025).
    """
    return torch.ones_like(difference) if cap is None else difference.exp().clamp(max=cap)


def mismatch(batches: list[Batch], cfg: Config, peers: Peers) -> dict[str, float]:
    """π / π_sampler of the batches' tokens before the first update: mean, largest, and the share above the cap."""
    ratios = []
    for batch in batches:
        rollout = batch.rollout
        for micro, rows in enumerate(rollout.micro_batches(cfg.micro_batch_tokens)):
            if micro in batch.logp_old:  # a divergence over the whole vocabulary needs no log-probs
                ratios.append((batch.logp_old[micro] - rollout.logp[rows][rollout.mask[rows]]).exp())
    ratio = torch.cat(peers.all(torch.cat(ratios) if ratios else torch.empty(0)))
    if not len(ratio):
        return {}
    cap = cfg.rlvr.importance_cap
    above = 0.0 if cap is None else (ratio > cap).float().mean().item()
    names = ("mean", "max", "truncated")
    values = (ratio.mean().item(), ratio.max().item(), above)
    return {f"importance_sampling_ratio/{name}": value for name, value in zip(names, values, strict=True)}
