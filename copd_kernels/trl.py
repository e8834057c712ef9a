"""copd_kernels in TRL's trainers (trl >= 1.15): one line for log-probs, and trainers with any number of teachers.

    fuse(trainer)                                                GRPO, RLOO, AsyncGRPO, SFT, DPO, KTO
    DistillationTrainer(model, [first, second], args, ...)       T teachers, T + 3 GEMM passes
    DistillationTrainer(model, {"code": a, "math": b}, args, ..., route="domain")        each row has its own: 4 passes
    GRPOTrainer(..., teachers=[first, second], kl_coef=0.1)      rewards, and live teachers on the same rollouts
    class Trainer(GKD, GKDTrainer): pass                         GKD without either model's logits; GOLD likewise

TRL gives a model `forward(..., labels=..., fused_lm_head=True)`, which returns log-probs instead of logits. `fuse`
gives the same model another one, on that object alone. Softcap and scale are the model's own; only the tokens that
count are projected. Divergences are TRL's: beta 0 is the forward KL, 1 the reverse, the generalised JSD between.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import FusedCausalLMOutput

from .checks import check, is_dtensor
from .head import Head
from .kl import kl
from .liger import divergence_of
from .lm_head import lm_head_of
from .logprob import logprob
from .model import reading, through_head
from .probe import check_model, evaluating, unwrap

# what a forward of a vision language model takes beside its tokens
MEDIA = ("pixel_", "image_", "spatial_")
# TRL's per-token outputs, and `logprob`'s
OUTPUTS = {"log_probs": "logp", "entropy": "entropy"}
OUTPUTS |= {name: name for name in ("is_top1", "mean_logits", "log_sum_sq_probs")}


def at(head: Head, mask: Tensor, positions: slice = slice(None, -1)) -> Head:
    """The head at the tokens that count: what is masked costs no GEMM."""
    return replace(head, hidden=head.hidden[:, positions][mask.to(head.hidden.device)])


def fuse(trainer: Any) -> Any:
    """Every log-prob of a trainer whose model TRL gave a fused lm_head through `logprob`; returns the trainer.

    These are GRPO, RLOO, AsyncGRPO, SFT, DPO and KTO, their reference models included. Temperature and what is wanted
    beside log-probs (entropy, top-1 hits, mean logits, log Σp²) are what the trainer asked TRL for.

    Raises:
        ValueError: a trainer that scores by logits.
    """
    model = getattr(trainer, "model", None)
    check("fuse", "trainer", isinstance(model, nn.Module), "have a model", type(trainer).__name__)
    _fuse(trainer, model)
    if isinstance(getattr(trainer, "ref_model", None), nn.Module):
        _fuse(trainer, trainer.ref_model)
    return trainer


def _fuse(trainer: Any, model: Any, also: Callable[[Head, Tensor], None] | None = None) -> None:
    """`model(..., fused_lm_head=True)` by `logprob`; `also(head, mask)` reads the same head."""
    model = unwrap(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    given, own = model.forward, type(model).forward
    # what TRL's forward was made with
    asked = inspect.getclosurevars(given).nonlocals if inspect.ismethod(given) else {}
    fused = asked.keys() >= {"outputs", "temperature"} and set(asked["outputs"]) <= OUTPUTS.keys()
    fix = "use through_head; or this release of trl scores in another way than 1.15 to 1.16"
    check("fuse", "trainer", fused, "have added trl's fused lm_head to its model", type(trainer).__name__, fix)
    # under TRL's names, so that this forward can be fused again
    outputs, temperature = asked["outputs"], asked["temperature"]
    cast_lm_head_to_fp32 = asked.get("cast_lm_head_to_fp32", False)
    stats: Any = not {"log_probs", "entropy"}.issuperset(outputs)
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
            device = head.hidden.device
            # which made the weight fp32; autocast would make it narrow again
            with torch.autocast(device.type, enabled=False) if cast_lm_head_to_fp32 else nullcontext():
                found = logprob(head, targets[mask].to(device), temperature=temperature, stats=stats)
            each = {name: getattr(found, OUTPUTS[name]) for name in ("log_probs", *outputs)}
            return {name: x.new_zeros(mask.shape).masked_scatter(mask.to(device), x) for name, x in each.items()}

        with reading(self, read) as take:
            output = own(self, *args, **kwargs | {"use_cache": False})
        result, aux = take(), output.get("aux_loss")
        total = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -result["log_probs"].sum() / total
        if aux is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux, **result)

    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def head_of(teacher: nn.Module, mask: Tensor, positions: slice, batch: dict[str, Any]) -> Head:
    """A teacher's head at the tokens that count, in evaluation mode."""
    weight = lm_head_of("teachers", unwrap(teacher)).weight
    # gathered by FSDP2 or ZeRO-3 for as long as the forward runs
    sharded = is_dtensor(weight) or cast(Tensor, weight).numel() == 0

    def read(head: Head) -> Head:
        head = at(head, mask, positions).detach()
        if sharded:
            bias = None if head.bias is None else head.bias.clone()
            head = replace(head, lm_head=head.lm_head.clone(), bias=bias)
        return head

    with evaluating(teacher), through_head(teacher, read):
        found: Head = teacher(**batch, use_cache=False).logits
    return found


def media_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if name.startswith(MEDIA) or name.endswith("token_type_ids")}


def sequence(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, slice]:
    """The model's inputs of a batch of rollouts, the mask (B, C) of the tokens that count, and where they are read."""
    completion = inputs["completion_ids"]
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    }
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
    # position i predicts token i + 1
    return batch | media_of(inputs), mask, slice(-completion.shape[1] - 1, -1)


class DistillationTrainer(trl.DistillationTrainer):
    """TRL's, with several teachers: loss = Σ_j w_j D(student, teacher_j), w = `teacher_weights` or 1/T.

    With `route`, the name of a column of the dataset, each row has the one teacher that its column names: a key of
    `teacher_model`, or an index into it. Each teacher then runs on its own rows. Each teacher's mean divergence is
    logged as `teacher_kl/<key or index>`.
    """

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        *rest: Any,
        teacher_weights: Sequence[float] | None = None,
        route: str | None = None,
        **kwargs: Any,
    ) -> None:
        named = isinstance(teacher_model, Mapping)
        several = list(teacher_model.values()) if named else teacher_model
        first, *others = several if isinstance(several, list | tuple) else [several]
        T, given = 1 + len(others), teacher_weights
        rule = f"have a weight for each of {T} teachers"
        check("DistillationTrainer", "teacher_weights", given is None or len(given) == T, rule, given)
        alone = given is None or route is None
        check("DistillationTrainer", "teacher_weights", alone, "be omitted with route", given)
        self.route, self.names = route, list(teacher_model) if named else list(range(T))
        super().__init__(model, first, args, *rest, **kwargs)
        more = [self.accelerator.prepare_model(other, evaluation_mode=True) for other in others]
        self.teachers, self.teacher_weights = [self.teacher_model, *more], given

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[no-untyped-call]  # of TRL
        columns: Any = self._signature_columns
        if self.route is not None and self.route not in columns:
            columns.append(self.route)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.route is not None:
            taken = [row.get(self.route) for row in inputs]
            for name in taken:
                check("DistillationTrainer", self.route, name in self.names, f"be one of {self.names}", repr(name))
            index = [self.names.index(name) for name in taken]
            made["teacher_index"] = torch.tensor(index, device=made["completion_ids"].device)
        return made

    def _heads(self, batch: dict[str, Any], mask: Tensor, where: slice, index: Tensor | None) -> list[Head]:
        if index is None:
            return [head_of(teacher, mask, where, batch) for teacher in self.teachers]
        if media_of(batch):  # whose rows are not the batch's
            return [head_of(t, mask & (index == j)[:, None], where, batch) for j, t in enumerate(self.teachers)]
        found = []
        for j, teacher in enumerate(self.teachers):
            # without a row of its own it reads one in vain: all ranks must enter a sharded teacher together
            rows = (index == j) if bool((index == j).any()) else torch.arange(len(index), device=index.device) == 0
            mine = mask[rows] & (index == j)[rows, None]
            found.append(head_of(teacher, mine, where, {name: x[rows] for name, x in batch.items()}))
        return found

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, mask, where = sequence(inputs)
        index = inputs.get("teacher_index")
        teachers = self._heads(batch, mask, where, index)
        tokens = None if index is None else index[:, None].expand(mask.shape)[mask]

        def read(head: Head) -> tuple[Tensor, Tensor, Tensor]:
            head = at(head, mask, where)
            device = head.hidden.device
            weight = None if self.teacher_weights is None else torch.tensor(self.teacher_weights, device=device)
            options: dict[str, Any] = divergence_of(self.beta) | {"temperature": self.temperature}
            options |= {"teacher_weight": weight, "teacher_index": None if tokens is None else tokens.to(device)}
            found = kl(head, teachers, reduction="sum", stats=True, **options)
            return found.loss, found.entropy.sum(), found.teacher_kl

        # TRL has this called inside the wrapper's forward
        with through_head(unwrapped_student, read):
            loss, entropy, taught = unwrapped_student(**batch, use_cache=False).logits
        count = mask.sum()
        T = len(self.teachers)
        counts = count.expand(T) if tokens is None else torch.bincount(tokens, minlength=T)
        self.taught = taught * counts.to(taught), counts.to(taught)
        return loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, count

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, *args, **kwargs)
        # after the forward, as TRL does: a gather inside could wait for another rank's
        total, count = (self.accelerator.gather(x[None]).sum(0) for x in self.taught)
        metrics = self._metrics["train" if model.training else "eval"]
        for name, value, tokens in zip(self.names, total.tolist(), count.tolist(), strict=True):
            if tokens:
                metrics[f"teacher_kl/{name}"].append(value / tokens)
        return result


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
        _fuse(self, self.model, self._learn)
        if self.ref_model is not None:
            _fuse(self, self.ref_model)

    def _learn(self, student: Head, mask: Tensor) -> None:
        if self.lesson and torch.is_grad_enabled():
            options: dict[str, Any] = {"divergence": self.divergence, "temperature": self.temperature}
            self.taught.append(kl(student, self.lesson, **options))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not self.teachers:
            return super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]  # of TRL
        batch, _, where = sequence(inputs)
        # TRL scores every completion token, those of tools too, and weighs them afterwards
        mask = inputs["completion_mask"] != 0
        self.lesson, self.taught = [head_of(teacher, mask, where, batch) for teacher in self.teachers], []
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
    """Before `GKDTrainer` or `GOLDTrainer` of `trl.experimental` in the bases: no logits of either model.

    The temperature is GOLD's; TRL's GKD generates with one and compares at 1. GOLD's loss across tokenizers
    (`use_uld_loss` with a tokenizer of the teacher's) stays TRL's.
    """

    teacher_model: Any
    beta: float

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        gold = hasattr(trainer, "use_uld_loss")
        if gold and trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
            own: Any = super()
            return own.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        media = trainer._get_model_forward_kwargs(inputs) if gold else {}
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **media}
        mask = inputs["labels"][:, 1:] != -100
        teacher = head_of(self.teacher_model, mask, slice(None, -1), batch)
        options = divergence_of(self.beta) | {"temperature": trainer.temperature if gold else 1.0}
        with through_head(model, lambda head: kl(at(head, mask), teacher, reduction="sum", **options)):
            outputs = model(**batch, use_cache=False)
        loss = outputs.logits / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss
