"""On-policy distillation: what a teacher says about the student's own tokens, and the loss it makes.

`sampled`: advantage β δ_t with δ_t = log π_teacher(y_t) − log π_student(y_t), in the policy loss of `copd.rlvr`.
`reverse`, `forward`, `jsd`: β Σ_t w_t D(teacher, student) over the whole vocabulary, by `copd_kernels.kl`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from copd.config import OPDConfig
from copd_kernels import Head, kl


@dataclass
class TeacherScore:
    """A teacher's view of the tokens of one rollout, micro-batch by micro-batch, with the weights it had then."""

    name: str
    heads: list[Head]
    """hidden states (N, D), and the `lm_head` as it was: the live one moves before all students have read it; of the
    first micro-batches only, where no more are needed"""
    logp: list[Tensor]
    """(N,) fp32 log-probs of the sampled tokens"""

    def head(self, micro: int, device: torch.device) -> Head:
        head = self.heads[micro]
        return replace(head, hidden=head.hidden.to(device), lm_head=head.lm_head.to(device))


def delta(teacher_logp: Tensor, logp_old: Tensor, cfg: OPDConfig) -> Tensor:
    """δ (N,), clamped where the config says so."""
    difference = teacher_logp - logp_old
    return difference if cfg.delta_clamp is None else difference.clamp(-cfg.delta_clamp, cfg.delta_clamp)


def divergence_loss(student: Head, teacher: Head, weight: Tensor, temperature: float, cfg: OPDConfig) -> Tensor:
    """Σ_t w_t D_t over N tokens, without β."""
    return kl(
        student,
        teacher,
        divergence=cfg.signal,
        beta=cfg.jsd_beta,
        temperature=temperature,
        token_weight=weight,
        reduction="sum",
    )
