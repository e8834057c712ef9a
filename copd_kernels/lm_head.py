"""What a transformers model makes of hidden states: its `lm_head`, adapters included, then scale and softcap.

An adapter of a linear layer is a linear layer too. LoRA's is read as

    logits = [hidden, s A hidden] @ [lm_head, B].T                  (D + r columns, dropout before A as PEFT has it)

whose low-rank part keeps its precision in 16 bits. Whatever else is affine (DoRA, trainable tokens, IA³, a learned
scale a token) is read from what the layer makes of the D unit vectors, as wide a product as D tokens; what is not is
refused. `copd_kernels.model` compares what is read here with the model's own logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checks import check, is_dtensor

# LoRA variants whose product with a token depends on that token alone, and not on chance
LINEAR_VARIANTS = ("DoraLinearVariant", "BdLoraLinearVariant", "MiCALinearVariant", "KasaLinearVariant")
Projection = tuple[Tensor, Tensor, Tensor | None]
"""hidden, weight and bias with `module(hidden) = hidden @ weight.T + bias`, to be differentiated like it"""


class Fields(NamedTuple):
    """Those of a `Head`, in its order."""

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    vocab_size: int | None


def lm_head_of(op: str, model: Any) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    lm_head = None if get is None else get()
    check(op, "model", isinstance(lm_head, nn.Module), "have output embeddings", type(model).__name__)
    return cast(nn.Module, lm_head)


def fields(
    op: str, model: Any, hidden: Tensor, vocab_size: int | None, call: Callable[[Tensor], Tensor] | None = None
) -> Fields:
    """The head of `model` for what its `lm_head` reads; `call` is the layer's own forward where it is replaced."""
    module = lm_head_of(op, model)
    hidden, weight, bias = projection(op, module, hidden, call or module.forward)
    config = text_config(model)
    if vocab_size is None and (unpadded := getattr(config, "unpadded_vocab_size", None)) is not None:
        vocab_size = min(unpadded, weight.shape[0])
    return Fields(hidden, weight, bias, *transform(config), vocab_size)


def text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def transform(config: Any) -> tuple[float, float | None]:
    """Scale and softcap, by the names that models give them."""

    def number(name: str) -> float | None:
        return getattr(config, name, None) or None

    scale = number("output_multiplier") or number("lm_head_multiplier") or 1.0
    if config.model_type != "mpt":  # whose `logit_scale` nobody reads
        scale *= number("logit_scale") or 1.0
    if config.model_type == "hyperclovax":
        scale *= number("logits_scaling") or 1.0
    elif config.model_type != "minicpm3":  # which divides what `lm_head` reads
        scale /= number("logits_scaling") or 1.0
    return scale, number("final_logit_softcapping") or number("logits_soft_cap")


def projection(op: str, module: Any, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Projection:
    if hasattr(module, "modules_to_save"):  # peft's: a copy for each adapter, beside the original
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        off = module.disable_adapters or not active
        module = module.original_module if off else module.modules_to_save[active[0]]
        call = module.forward
    lora = sys.modules.get("peft.tuners.lora.layer")
    variants = getattr(module, "lora_variant", {})
    if lora is not None and type(module) is lora.Linear and not module.merged:
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
        base = module.get_base_layer()
        if is_linear(base) and not any(name in variants for name in active):
            return with_lora(module, active, *linear(op, base, hidden))
    for variant in variants.values():
        name = getattr(variant, "__name__", type(variant).__name__)
        fix = "take lm_head out of the adapter's target_modules"
        check(op, "lm_head", name in LINEAR_VARIANTS, "be linear", name, fix)
    return linear(op, module, hidden) if is_linear(module) else from_unit_vectors(op, module, hidden, call)


def is_linear(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is nn.Linear.forward


def linear(op: str, module: Any, hidden: Tensor) -> Projection:
    check_whole(op, module.weight)
    # a model may keep its last layer in another dtype or on another device than the layers before
    return hidden.to(module.weight.device, module.weight.dtype), module.weight, module.bias


def check_whole(op: str, weight: Tensor) -> None:
    if is_traceable_wrapper_subclass(weight):
        sharded = is_dtensor(weight)
        rule, fix = ("be whole", "use through_head") if sharded else ("not be quantised", "keep it out of quantisation")
        check(op, "lm_head", False, rule, type(weight).__name__, fix)
    check(op, "lm_head", weight.is_floating_point(), "not be quantised", weight.dtype, "keep it out of quantisation")


def with_lora(module: Any, active: list[str], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Projection:
    columns, rows = [hidden], [weight]
    for name in active:
        A, B, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        low = A(module.lora_dropout[name](hidden.to(A.weight.dtype)))
        columns.append((low * scaling).to(hidden.dtype))
        rows.append(B.weight.to(weight.dtype))
        if B.bias is not None:
            shift = (B.bias * scaling).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    return (hidden, weight, bias) if not active else (torch.cat(columns, -1), torch.cat(rows, -1), bias)


def from_unit_vectors(op: str, module: nn.Module, hidden: Tensor, call: Callable[[Tensor], Tensor]) -> Projection:
    """Weight and bias of an affine layer, differentiable: what it makes of unit vectors and of zero."""
    for part in module.modules():
        random = isinstance(part, nn.Dropout) and part.training and part.p > 0
        check(op, "lm_head", not random, "have no dropout in such an adapter", part, "set lora_dropout=0")
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        check_whole(op, parameter)
    weight = next(iter(parameters.values()))
    base = getattr(module, "get_base_layer", lambda: module)()
    dtype = getattr(getattr(base, "weight", weight), "dtype", weight.dtype)
    hidden = hidden.to(weight.device, dtype)
    units = torch.eye(hidden.shape[-1], dtype=dtype, device=weight.device)
    columns = call(units).to(dtype)
    if not any(name.endswith("bias") for name in parameters):
        return hidden, columns.T, None
    bias = call(torch.zeros_like(units[:1]))[0].to(dtype)
    return hidden, (columns - bias).T, bias
