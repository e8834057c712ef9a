"""What a branch owns of its model: all of it here, or one adapter of a base it shares (`copd.adapter`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from copd.settings import ModelConfig, OptimConfig

T = TypeVar("T")


class Weights(Protocol):
    model: PreTrainedModel
    """what is run; with these weights only inside `active`"""

    def parameters(self) -> list[Parameter]:
        """Those that train."""

    def active(self, learns: bool = False) -> AbstractContextManager[None]:
        """The model has these weights for the length of the block, whatever it had before and has again after."""

    def run(self, work: Callable[[], tuple[Tensor, T]], media: bool = False) -> tuple[Tensor, T]:
        """`work()`, a forward pass: its loss, from which gradients are to flow into the weights, and parts of it.

        `media`: some rank of the branch has images or videos in this pass.
        """

    def train(self, checkpointing: bool) -> None:
        """Ready to learn: dropout of an adapter is on; the model is in training mode only to recompute activations."""

    def copy(self) -> Weights:
        """The same values, to stay as they are until `remove`."""

    def remove(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """All that differs from the base, each once: the tensors themselves, shards where ranks split them."""

    def save(self, folder: Path) -> None:
        """Writes what `copd.model.load_saved` reads, in the dtype it computes in; all ranks that share it do."""


class Whole:
    """A model of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def parameters(self) -> list[Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def active(self, learns: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, work: Callable[[], tuple[Tensor, T]], media: bool = False) -> tuple[Tensor, T]:
        return work()

    def train(self, checkpointing: bool) -> None:
        self.model.train(checkpointing)

    def copy(self) -> Whole:
        return Whole(copy.deepcopy(self.model).requires_grad_(False))

    def remove(self) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        tied = dict(self.model.named_parameters(remove_duplicate=False))
        return named | {name: value for name, value in self.model.state_dict().items() if name not in tied}

    def save(self, folder: Path) -> None:
        # in a process group transformers has the first rank alone write, as if all had the same model
        vars(self.model)["should_save_on_this_rank"] = lambda first: True
        try:
            self.model.save_pretrained(folder)
        finally:
            del self.model.should_save_on_this_rank


def shard(value: Tensor) -> Tensor:
    """This rank's part of a tensor that ranks split, or the tensor."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def adamw(parameters: list[Any], cfg: OptimConfig) -> torch.optim.AdamW:
    """Over no parameters for a base or a merged model, which is but evaluated."""
    first_beta, second_beta = cfg.betas
    return torch.optim.AdamW(
        [{"params": parameters}],
        lr=cfg.lr,
        betas=(first_beta, second_beta),
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
    )


def set_up(model: PreTrainedModel, cfg: ModelConfig) -> None:
    """Freezes, recomputes and compiles what the settings say, in place; no name of a parameter changes.

    Raises what `compile_blocks` does.
    """
    for part in vision_of(model) if cfg.freeze_vision else []:
        part.requires_grad_(False)
    if cfg.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_blocks(model, cfg.compile)


def compile_blocks(model: PreTrainedModel, backend: str | None) -> None:
    """Compiles a model's blocks in place, if there is a backend; a copy of the model has lost that.

    Raises `ValueError` for a backend that `torch.compile` does not know, and for a model whose blocks have no name.
    """
    if backend is None:
        return
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"model: compile must be a backend of torch.compile, as {known}; got {backend!r}")
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"model: compile must find blocks in the decoder; got none in {type(model).__name__}")
    # of each adapter there are three: its first block, the others, no gradients
    dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)
    for block in blocks:  # equal ones share their code; of shapes and lengths there are too many to compile each
        block.compile(dynamic=True, backend=backend)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks, which embeddings, vision, the last norm and `lm_head` stand around."""
    names = set(model._no_split_modules or ())
    return [module for module in model.get_decoder().modules() if type(module).__name__ in names]


def vision_of(model: PreTrainedModel) -> list[nn.Module]:
    """What makes embeddings of pixels: all parts of a vision model but the language model."""
    if not hasattr(model.config, "vision_config"):
        return []
    decoder = model.get_decoder()
    return [part for part in model.model.children() if part is not decoder]


def base_name(name: str) -> str | None:
    """A parameter's name in a base that no adapter was put on; None for one of an adapter's own."""
    if ".lora_" in name or ".modules_to_save." in name:
        return None
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
