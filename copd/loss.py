"""What a micro-batch adds to the loss: the policy loss of its rewards, and what its teachers ask of it."""

from __future__ import annotations

import torch
from torch import Tensor

from copd.batch import Batch
from copd.config import Config
from copd.distill import delta
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
    if batch.advantage is not None:
        advantage = batch.advantage[of_token]
        parts["entropy"] = (weight * seen.entropy.detach()).sum()
        parts["sampling_logp_difference"] = (weight * (old - rollout.logp[rows][mask]).abs()).sum()
        loss, clipped = policy_loss(seen.logp, old, advantage, weight, cfg.rlvr)
        parts |= clipped | {"loss/rlvr": loss.detach()}
    if lesson is not None:
        if sampled:
            advantage = delta(lesson.logp(micro, of_token), old, cfg.opd)
            # the sampled estimate of KL(student || teacher)
            parts[lesson.key] = -(weight * advantage).sum()
            opd, _ = policy_loss(seen.logp, old, advantage, weight, cfg.rlvr, clip=cfg.opd.clip_ratio)
        else:
            opd = lesson.loss(head, micro, of_token, weight, cfg.rollout.temperature, cfg.opd)
            parts[lesson.key] = opd.detach()
        parts["loss/opd"] = beta * opd.detach()
        loss = beta * opd if batch.advantage is None else loss + beta * opd
    parts["loss"] = loss.detach()
    return loss, parts
