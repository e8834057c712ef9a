"""copd_kernels in TRL's trainers (trl >= 1.15): one line for log-probs, and trainers with any number of teachers.

    fuse(trainer)                                                GRPO, RLOO: every log-prob and entropy
    DistillationTrainer(model, [first, second], args, ...)       T teachers, T + 3 GEMM passes
    GRPOTrainer(..., teachers=[first, second], kl_coef=0.1)      rewards, and live teachers on the same rollouts
    class Trainer(GKD, GKDTrainer): pass                         GKD without either model's logits

TRL gives a model `forward(..., labels=..., fused_lm_head=True)`, which returns log-probs instead of logits. `fuse`
gives the same model another one, on that object alone. Softcap and scale are the model's own; only the tokens that
count are projected. Divergences are TRL's: beta 0 is the forward KL, 1 the reverse, the generalised JSD between.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from .checks import check
from .head import Head
from .kl import kl
from .liger import divergence_of
from .logprob import logprob
from .model import reading, through_head
from .probe import check_model, unwrap

# what a forward of a vision language model takes beside its tokens
MEDIA = ("pixel_", "image_", "spatial_")
SERVED = ("log_probs", "entropy")


def at(head: Head, mask: Tensor, positions: slice = slice(None, -1)) -> Head:
    """The head at the tokens that count: what is masked costs no GEMM."""
    return replace(head, hidden=head.hidden[:, positions][mask.to(head.hidden.device)])


def fuse(trainer: Any) -> Any:
    """Every log-prob of a GRPO or RLOO trainer, and of its reference model, through `logprob`; returns the trainer.

    Raises:
        ValueError: a trainer that scores by logits, or that asks for more than log-probs and entropies.
    """
    kind = type(trainer).__name__
    served = isinstance(trainer, trl.GRPOTrainer | trl.RLOOTrainer)
    check("fuse", "trainer", served, "be a GRPO or RLOO trainer", kind, "use through_head")
    _fuse(trainer.model, trainer.temperature)
    if trainer.ref_model is not None:
        _fuse(trainer.ref_model, trainer.temperature)
    return trainer


def _fuse(model: Any, temperature: float, also: Callable[[Head, Tensor], None] | None = None) -> None:
    """`model(..., fused_lm_head=True)` by `logprob`; `also(head, mask)` reads the same head."""
    model = unwrap(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    given, own = model.forward, type(model).forward
    fused = "fused_lm_head" in getattr(getattr(given, "__func__", given), "__code__", fuse.__code__).co_varnames
    fix = "this release of trl scores in another way than 1.15 to 1.16"
    check("fuse", "trainer", fused, "have added a fused lm_head to its model", type(model).__name__, fix)
    check_model("fuse", model, None)

    # the model's signature: `generate` validates its arguments by it
    @functools.wraps(own)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            extra = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return given(*args, **kwargs, **{name: value for name, value in extra.items() if value is not None})
        targets = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]  # one is given
        mask, positions = targets != -100, slice(None, -1) if shift_labels is None else slice(None)

        def read(head: Head) -> dict[str, Tensor]:
            head = at(head, mask, positions)
            if also is not None:
                also(head, mask)
            found = logprob(head, targets[mask].to(head.hidden.device), temperature=temperature)
            wide = found.logp.new_zeros(mask.shape)
            return {name: wide.masked_scatter(mask, x) for name, x in zip(SERVED, found[:2], strict=True)}

        with reading(self, read) as take:
            output = own(self, *args, use_cache=False, **kwargs)
        result, aux = take(), output.get("aux_loss")
        total = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -result["log_probs"].sum() / total
        if aux is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux, **result)

    model.forward = types.MethodType(forward, model)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Without dropout, and afterwards in the mode it was in."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


@torch.no_grad()
def heads(teachers: Sequence[nn.Module], mask: Tensor, positions: slice, batch: dict[str, Any]) -> list[Head]:
    """Each teacher's head at the tokens that count."""
    found = []
    for teacher in teachers:
        with evaluation(teacher), through_head(teacher, lambda head: at(head, mask, positions)):
            found.append(teacher(**batch, use_cache=False).logits.detach())
    return found


def sequence(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, slice]:
    """The model's inputs of a batch of rollouts, the mask (B, C) of the tokens that count, and where they are read."""
    completion = inputs["completion_ids"]
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    }
    media = {name: x for name, x in inputs.items() if name.startswith(MEDIA) or name.endswith("token_type_ids")}
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
    # position i predicts token i + 1
    return batch | media, mask, slice(-completion.shape[1] - 1, -1)


class DistillationTrainer(trl.DistillationTrainer):
    """TRL's, with a list for `teacher_model`: loss = Σ_j w_j D(student, teacher_j), w = `teacher_weights` or 1/T."""

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        *rest: Any,
        teacher_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        first, *others = teacher_model if isinstance(teacher_model, list | tuple) else [teacher_model]
        T, given = 1 + len(others), teacher_weights
        rule = f"have a weight for each of {T} teachers"
        check("DistillationTrainer", "teacher_weights", given is None or len(given) == T, rule, given)
        super().__init__(model, first, args, *rest, **kwargs)
        more = [self.accelerator.prepare_model(other, evaluation_mode=True) for other in others]
        self.teachers, self.teacher_weights = [self.teacher_model, *more], given

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, mask, where = sequence(inputs)
        teachers = heads(self.teachers, mask, where, batch)

        def read(head: Head) -> tuple[Tensor, Tensor]:
            head = at(head, mask, where)
            device = head.hidden.device
            weight = None if self.teacher_weights is None else torch.tensor(self.teacher_weights, device=device)
            options = divergence_of(self.beta) | {"reduction": "sum", "teacher_weight": weight}
            loss = kl(head, teachers, temperature=self.temperature, **options)
            with torch.no_grad():  # TRL logs the student's entropy
                tokens = torch.zeros(head.hidden.shape[0], dtype=torch.long, device=device)
                return loss, logprob(head.detach(), tokens, temperature=self.temperature).entropy.sum()

        # TRL has this called inside the wrapper's forward
        with through_head(unwrapped_student, read):
            loss, entropy = unwrapped_student(**batch, use_cache=False).logits
        count = mask.sum()
        return loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, count


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's, whose student also learns from live teachers on its own rollouts, in the same forward.

    loss = GRPO + kl_coef · mean over tokens of Σ_j D(student, teacher_j) / T; its mean is logged as `teacher_kl`.
    """

    def __init__(
        self,
        *args: Any,
        teachers: Sequence[nn.Module] = (),
        kl_coef: float = 0.1,
        divergence: str = "reverse",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teachers, self.kl_coef, self.divergence = list(teachers), kl_coef, divergence
        self.lesson: list[Head] = []
        self.taught: list[Tensor] = []
        _fuse(self.model, self.temperature, self._learn)
        if self.ref_model is not None:
            _fuse(self.ref_model, self.temperature)

    def _learn(self, student: Head, mask: Tensor) -> None:
        if self.lesson and torch.is_grad_enabled():
            options: dict[str, Any] = {"divergence": self.divergence, "temperature": self.temperature}
            self.taught.append(kl(student, self.lesson, **options))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not self.teachers:
            return super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]  # of TRL
        batch, _, where = sequence(inputs)
        # TRL scores every completion token, those of tools too, and weighs them afterwards
        self.lesson, self.taught = heads(self.teachers, inputs["completion_mask"] != 0, where, batch), []
        try:
            loss = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]  # of TRL
        finally:
            self.lesson = []
        (taught,) = self.taught
        mode = "train" if model.training else "eval"
        self._metrics[mode]["teacher_kl"].append(taught.item())
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        return loss + self.kl_coef * taught / steps


class GKD:
    """Before `trl.experimental.gkd.GKDTrainer` in the bases: its divergence without either model's logits."""

    teacher_model: Any
    beta: float

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        mask = inputs["labels"][:, 1:] != -100
        teachers = heads([self.teacher_model], mask, slice(None, -1), batch)
        with through_head(
            model, lambda head: kl(at(head, mask), teachers, reduction="sum", **divergence_of(self.beta))
        ):
            outputs = model(**batch, use_cache=False)
        loss = outputs.logits / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
