"""Names of liger-kernel (0.8) over these ops: in a trainer that constructs one of them, the import is the only change.

    from copd_kernels.liger import LigerFusedLinearJSDLoss       # liger_kernel.chunked_loss
    from copd_kernels.liger import LigerFusedLinearJSD           # liger_kernel.transformers

Values and gradients are Liger's, without its (V, D) gradient of a frozen `lm_head`, its compilation at the first call
and its GPU. What is ignored is not projected. `beta` is the generalised JSD's: 0 the forward KL, 1 the reverse, the JSD
between. There is no softcap and no scale in these signatures: models that have them need `kl`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check
from .head import Head
from .kl import kl
from .logprob import logprob


def divergence_of(beta: float) -> dict[str, Any]:
    """The generalised JSD's `beta`, as Liger and TRL count it, as arguments of `kl`."""
    ends: dict[float, dict[str, Any]] = {0.0: {"divergence": "forward"}, 1.0: {"divergence": "reverse"}}
    return ends.get(float(beta), {"divergence": "jsd", "beta": float(beta)})


class LigerFusedLinearJSD(nn.Module):
    """JSD(student, teacher) at a temperature, mean over the tokens whose label is not `ignore_index`; 0 if none is.

    Args:
        jsd_beta, ignore_index, temperature: as above.
        accum_dtype: accepted as Liger's; the gradient of `lm_head` is always accumulated in fp32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """() from (N, D), (V, D), (N, D'), (V, D') and labels (N,) or none."""
        student, teacher = Head(student_input, student_weight), Head(teacher_input, teacher_weight)
        if shift_labels is not None:
            student, teacher = kept(shift_labels != self.ignore_index, student, teacher)
        check_rows(type(self).__name__, student, teacher)
        loss: Tensor = kl(student, teacher, temperature=self.temperature, **divergence_of(self.jsd_beta))
        return loss


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss · CE(student, labels) + weight_soft_loss · JSD(student, teacher), means over kept labels.

    The cross-entropy is at temperature 1 and, as in Liger, on by default; of weight 0 it costs nothing.

    Args:
        weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature: as above.
        compiled, chunk_size: accepted as Liger's; nothing is compiled, and chunks are what a workspace holds.
        return_soft_hard_loss: return (loss, soft, hard); Liger's gradient is the loss's alone, so the parts have none.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature = ignore_index, temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """() from (..., D), (V, D), (..., D'), (V, D'), labels (...) and biases (V,)."""
        keep = true_labels != self.ignore_index
        student = Head(student_input, student_weight, student_bias)
        student, teacher = kept(keep, student, Head(teacher_input, teacher_weight, teacher_bias))
        check_rows(type(self).__name__, student, teacher)
        soft: Tensor = kl(student, teacher, temperature=self.temperature, **divergence_of(self.beta))
        if not (self.weight_hard_loss or self.return_soft_hard_loss):
            return self.weight_soft_loss * soft
        # not .mean(): without a token it is 0, as in Liger
        hard = -logprob(student, true_labels[keep]).logp.sum() / keep.sum().clamp(min=1)
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def kept(keep: Tensor, *heads: Head) -> tuple[Head, ...]:
    """The heads at the tokens that count: what is masked costs no GEMM."""
    return tuple(replace(head, hidden=head.hidden[keep]) for head in heads)


def check_rows(op: str, student: Head, teacher: Head) -> None:
    # Liger gives the words that only the teacher has a student's logit of 0, which is another distribution
    rule, fix = f"have student_weight's {student.V} rows", "slice padding rows off"
    check(op, "teacher_weight", teacher.V == student.V, rule, teacher.V, fix)
