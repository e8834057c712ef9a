"""A head: hidden states and the matrix that reads them.

Every op of this package takes heads, never logits. A head's logits, of which no op holds more than a workspace, are

    logits = scale * (hidden @ lm_head[:vocab_size].T + bias[:vocab_size])        (..., vocab_size)
    logits = softcap * tanh(logits / softcap)                                     if softcap is set
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check, check_integer, check_number, check_tensor, check_type
from .lm_head import fields
from .probe import check_model, unwrap
from .shard import Shard, check_split

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states and the output projection that turns them into logits.

    Args:
        hidden: (..., D), fp16, bf16, fp32 or fp64: last hidden states, after the final norm.
        lm_head: (V, D), dtype and device of `hidden`: one row a token.
        bias: (V,), dtype and device of `hidden`.
        scale: multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: bounds the logits to ±softcap by tanh (Gemma's `final_logit_softcapping`).
        vocab_size: number of leading rows of `lm_head` and `bias` that are tokens; the rest is padding.

    A vocabulary may be split over ranks, evenly or not: `lm_head` (and `bias`) a DTensor `[Shard(0)]` and `hidden` a
    DTensor `[Replicate()]` over the same mesh of one dimension. Ops then want equal arguments on every rank, plain
    tensors, and return equal plain tensors; gradients of the three are DTensors like them.

    Raises:
        ValueError: shape, device or range. TypeError: dtype.
    """

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        hidden, lm_head, bias = self.hidden, self.lm_head, self.bias
        for name in ("hidden", "lm_head", "bias"):
            if name != "bias" or bias is not None:
                check_tensor("Head", name, getattr(self, name), split=True)
        check_split(hidden, lm_head, bias)
        check_number("Head", "scale", self.scale)
        if self.softcap is not None:
            check_number("Head", "softcap", self.softcap)
        if self.vocab_size is not None:
            check_integer("Head", "vocab_size", self.vocab_size)
        check_type("Head", "hidden", hidden.dtype in DTYPES, "have a floating dtype", hidden.dtype)
        check("Head", "hidden", hidden.dim() >= 1, "have shape (..., D)", tuple(hidden.shape))
        D = hidden.shape[-1]
        shape = tuple(lm_head.shape)
        check("Head", "lm_head", len(shape) == 2 and shape[1] == D, f"have shape (V, D={D})", shape)
        check("Head", "lm_head", shape[0] >= 1, "have at least one row", shape)
        rule = f"have hidden's dtype {hidden.dtype}"
        # autocast casts both, as it does for `F.linear`
        mixed = autocasts(hidden) and torch.float64 not in (hidden.dtype, lm_head.dtype) and lm_head.dtype in DTYPES
        check_type("Head", "lm_head", lm_head.dtype == hidden.dtype or mixed, rule, lm_head.dtype)
        place = f"be on hidden's device {hidden.device}"
        check("Head", "lm_head", lm_head.device == hidden.device, place, lm_head.device)
        if bias is not None:
            V = shape[0]
            check("Head", "bias", tuple(bias.shape) == (V,), f"have shape (V={V},)", tuple(bias.shape))
            check_type("Head", "bias", bias.dtype in (hidden.dtype, lm_head.dtype), rule, bias.dtype)
            check("Head", "bias", bias.device == hidden.device, place, bias.device)
        check("Head", "scale", self.scale != 0, "not be zero", self.scale)
        check("Head", "softcap", self.softcap is None or self.softcap > 0, "be positive", self.softcap)
        size = self.vocab_size
        check("Head", "vocab_size", size is None or 1 <= size <= shape[0], f"be in 1..{shape[0]}", size)

    @property
    def V(self) -> int:
        """Number of tokens the head can name: `vocab_size`, or all rows of `lm_head`."""
        return self.lm_head.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def shard(self) -> Shard:
        """Which of its tokens are this rank's."""
        return Shard.of(self.lm_head)

    @classmethod
    def of(cls, model: Any, hidden: Tensor, vocab_size: int | None = None, check: bool = True) -> Head:
        """The head of a transformers model, for hidden states that its `lm_head` would read.

        Weight and bias are those of `model.get_output_embeddings()`, with what PEFT puts around it: LoRA and DoRA, the
        active ones of several adapters, `modules_to_save`, trainable tokens; none inside `disable_adapter`. Scale and
        softcap are those of the config (of the text model, if there are several), by the names that models give them.
        They are not believed: once a model, the head's logits at two tokens are compared with the model's own.

        Args:
            model: a causal or vision language model of transformers, or PEFT's around one.
            hidden: (..., D), what `lm_head` reads: for most models the backbone's `last_hidden_state`.
            vocab_size: as in `Head`; pass the tokenizer's length where the embedding is padded.
            check: make that comparison, which costs a forward of two tokens without gradients.

        Raises:
            ValueError: an `lm_head` that is quantised, sharded, or not linear in hidden; a model whose logits are
                another function of what `lm_head` reads, or whose `lm_head` reads another thing than its backbone's
                `last_hidden_state`.
        """
        if check:
            check_model("Head.of", unwrap(model), vocab_size, backbone=True)
        return cls(*fields("Head.of", unwrap(model), hidden, vocab_size))

    def detach(self) -> Head:
        """The same head, outside the graph: how every teacher is read."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.lm_head.detach(), bias, self.scale, self.softcap, self.vocab_size)


def as_heads(op: str, argument: str, got: Any) -> list[Head]:
    """One head or several, as a list of them."""
    if isinstance(got, Head):
        return [got]
    check_type(op, argument, isinstance(got, (list, tuple)), "be a Head or a list of them", type(got).__name__)
    for k, head in enumerate(got):
        check_head(op, f"{argument}[{k}]", head)
    return list(got)


def check_head(op: str, argument: str, got: object) -> None:
    check_type(op, argument, isinstance(got, Head), "be a Head", type(got).__name__)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` lives; there is none for meta tensors."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def check_same_vocabulary(op: str, name: str, first: Head, others: dict[str, Head]) -> None:
    check_head(op, name, first)
    fix = "pass vocab_size to cut padding rows off"
    for other_name, other in others.items():
        rule = f"have {name}'s vocabulary of {first.V} tokens"
        check(op, other_name, other.V == first.V, rule, other.V, fix)
        rule = f"be on {name}'s device {first.hidden.device}"
        check(op, other_name, other.hidden.device == first.hidden.device, rule, other.hidden.device)
        same = other.shard == first.shard
        check(op, other_name, same, f"be split over ranks as {name} is, {first.shard}", other.shard)
