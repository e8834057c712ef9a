"""On-policy distillation: what a teacher says about the student's own tokens, and the loss it makes.

`sampled`: advantage β δ_t with δ_t = log π_teacher(y_t) − log π_student(y_t), in the policy loss of `copd.rlvr`.
`reverse`, `forward`, `jsd`: β Σ_t w_t D(teacher, student) over the whole vocabulary, by `copd_kernels.kl`; or over the
teacher's likeliest words and one for all others (`opd.teacher_top_k`).

Forward KL is the only one of them that moves a student which is confidently wrong: its gradient in the logits is p − q,
where that of the others vanishes with the student's own probability of what the teacher would say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from copd.config import Config
from copd.peers import Peers
from copd.rollout import Rollout
from copd.settings import OPDConfig
from copd_kernels import Head, TopK, kl, topk


@dataclass
class TeacherScore:
    """A teacher's view of the tokens of one rollout, micro-batch by micro-batch, with the weights it had then."""

    name: str
    rows: slice | None = None
    """the rows of the rollout that it scores, and N counts; None for all"""
    logp: list[Tensor] = field(default_factory=list)
    """(N,) fp32 log-probs of the sampled tokens; none until the teacher has answered"""
    head_then: Head | None = None
    """its head as it was, without tokens: the live one moves before all students have read it"""
    states: Sequence[Tensor | TopK] = field(default_factory=list)
    """hidden states (N, D) that `head_then` reads, or its likeliest words (N, k); for the signals that need them.
    Those of a teacher on another rank arrive as they are read, in order, and only the last one read is here"""
    likeliest: list[Tensor] = field(default_factory=list)
    """(M, k) int32, its top words at the first M of the N tokens, in no order; for what is logged"""

    def apart(self) -> Told:
        """What of it is told at once, and what micro-batch by micro-batch."""
        return replace(self, states=[]), self.states

    def head(self, micro: int, device: torch.device) -> Head | TopK:
        state, head = self.states[micro], self.head_then
        if isinstance(state, TopK):
            return replace(state, ids=state.ids.to(device), logp=state.logp.to(device))
        assert head is not None
        bias = None if head.bias is None else head.bias.to(device)
        return replace(head, hidden=state.to(device), lm_head=head.lm_head.to(device), bias=bias)


Told = tuple[TeacherScore, Sequence[Tensor | TopK]]


def still(head: Head, device: torch.device) -> Head:
    """The head without tokens, its weights on `device`: copies of those that train."""

    def kept(weight: Tensor) -> Tensor:
        return weight.detach().to(device, copy=weight.requires_grad)

    bias = None if head.bias is None else kept(head.bias)
    nothing = head.hidden.new_empty(0, head.hidden.shape[-1], device=device)
    return replace(head, hidden=nothing, lm_head=kept(head.lm_head), bias=bias)


def likeliest_words(head: Head, k: int, temperature: float, device: torch.device) -> TopK:
    """What a teacher tells of itself where it does not tell everything; of a vocabulary of fewer than k words, all."""
    ids, logp = topk(head, min(k, head.V), temperature=temperature)
    return TopK(ids.to(device), logp.to(device), temperature=temperature)


def delta(teacher_logp: Tensor, logp_old: Tensor, cfg: OPDConfig) -> Tensor:
    """δ (N,), clamped where the config says so."""
    difference = teacher_logp - logp_old
    return difference if cfg.delta_clamp is None else difference.clamp(-cfg.delta_clamp, cfg.delta_clamp)


def fixed_weights(teachers: int, cfg: OPDConfig) -> list[float]:
    """Of the teachers of a rollout, its owner first, summing to one."""
    others = teachers - 1
    own = 1 / teachers if cfg.owner_weight is None or not others else cfg.owner_weight
    return [own, *[(1 - own) / others for _ in range(others)]]


@dataclass
class Lesson:
    """What a rollout's teachers say about it: all of them about every token, or each about the rows it owns."""

    teachers: list[TeacherScore]
    signal: str
    weight: list[float] | None = None
    """of each teacher, summing to one; None where each has rows of its own"""
    advantage: Tensor | None = None
    """(B,) of each row's reward, where it says who is better"""

    @property
    def key(self) -> str:
        """Under which its KL is logged."""
        return f"kl/{'+'.join(teacher.name for teacher in self.teachers)}"

    def weigh(self, rollout: Rollout, weight: Tensor, cfg: Config, peers: Peers | None = None) -> None:
        """Weighs the teachers by who is better at the task, where `advantage` is given; `weight` (B, C) is the tokens'.

        Better is whose way raises the reward: in proportion to gain_j = Σ_t w_t Â_i δ_t^j where positive, the slope of
        the expected reward from the student's policy toward teacher j's. The owner alone where nobody's does.
        """
        if self.advantage is None:
            return
        pull, gain = weight * self.advantage[:, None], torch.zeros(len(self.teachers))
        for micro, rows in enumerate(rollout.micro_batches(cfg.micro_batch_tokens)):
            mask = rollout.mask[rows]
            for j, teacher in enumerate(self.teachers):
                difference = teacher.logp[micro].to(pull.device) - rollout.logp[rows][mask]
                gain[j] += (pull[rows][mask] * difference).sum().cpu()
        gain = sum((peers or Peers()).all(gain), torch.zeros_like(gain)).clamp(min=0)
        found = gain / gain.sum() if gain.sum() > 0 else torch.eye(len(gain))[0]
        self.weight = found.tolist()

    def weights_by_name(self, domain: str) -> dict[str, float]:
        """To be logged, where several teachers judge the same rows."""
        if self.weight is None or len(self.weight) == 1:
            return {}
        names = (f"teacher_weight/{domain}/{teacher.name}" for teacher in self.teachers)
        return dict(zip(names, self.weight, strict=True))

    def __str__(self) -> str:
        return ", ".join(repr(teacher.name) for teacher in self.teachers)

    def owner(self, token_rows: Tensor) -> Tensor:
        """(N,) int64: the teacher of each token, whose row in the rollout is given."""
        ends = torch.tensor([teacher.rows.stop for teacher in self.teachers if teacher.rows], device=token_rows.device)
        return torch.bucketize(token_rows, ends, right=True)

    def logp(self, micro: int, token_rows: Tensor) -> Tensor:
        """(N,) the teachers' log-probs of the sampled tokens, averaged by weight."""
        said = [teacher.logp[micro].to(token_rows.device) for teacher in self.teachers]
        if self.weight is None:
            return torch.cat(said)  # rows are in the teachers' order
        return torch.stack([w * logp for w, logp in zip(self.weight, said, strict=True)]).sum(0)

    def loss(
        self, student: Head, micro: int, token_rows: Tensor, weight: Tensor, temperature: float, cfg: OPDConfig
    ) -> Tensor:
        """Σ_t w_t D_t over N tokens in one sweep of the teachers, without β."""
        device = weight.device
        routed = self.weight is None
        return kl(
            student,
            [teacher.head(micro, device) for teacher in self.teachers],
            divergence=self.signal,
            beta=cfg.jsd_beta,
            temperature=temperature,
            teacher_index=self.owner(token_rows) if routed else None,
            teacher_weight=None if self.weight is None else torch.tensor(self.weight, device=device),
            token_weight=weight,
            reduction="sum",
        )
