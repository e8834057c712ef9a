"""A model whose weights, gradients and optimiser state are split over the ranks of its branch, by FSDP2.

The decoder's blocks are units of their own; embeddings, vision, norms and `lm_head` are the model's. Learning, each
unit is whole while it computes, and what reads `lm_head` runs in the model's forward: `run`. Otherwise `active` keeps
the whole model in the dtype it computes in, so that ranks sample and score at their own pace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from copd import export
from copd.peers import Peers
from copd.weights import Whole, blocks_of, shard, vision_of

T = TypeVar("T")


class Sharded(Whole):
    def __init__(self, model: PreTrainedModel, peers: Peers, dtype: torch.dtype) -> None:
        super().__init__(model)
        self.peers, self.dtype = peers, dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.units: list[FSDPModule] = []
        for module in (*blocks_of(model), model):
            unit = fully_shard(module, mesh=peers.mesh, mp_policy=policy)
            unit.set_gradient_divide_factor(1.0)  # a loss is a sum over the batch of all ranks
            unit.set_force_sum_reduction_for_comms(True)
            self.units.append(unit)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.everything = dict(model.named_parameters())
        vars(model)["window"] = lambda work: work()
        register_fsdp_forward_method(model, "window")
        self._window(lambda: None)  # the model, and no block, is where forwards begin

    def parameters(self) -> list[Any]:
        return self.trained

    def run(self, work: Callable[[], tuple[Tensor, T]], media: bool = False) -> tuple[Tensor, T]:
        def loss() -> tuple[Tensor, T]:
            value, parts = work()
            if media:  # what another rank's images need has a gradient here too, of 0, or the sums would not meet
                vision = (p for part in vision_of(self.model) for p in part.parameters() if p.requires_grad)
                value = value + 0 * sum(parameter.flatten()[0] for parameter in vision)
            return value, parts

        return self._window(loss)

    def _window(self, work: Callable[[], T]) -> T:
        result: T = vars(self.model)["window"](work)
        return result

    @contextmanager
    def active(self, learns: bool = False) -> Iterator[None]:
        if learns:
            yield
            return
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            # or the next forward would take these for the weights of its own time
            for unit in self.units:
                unit.reshard()
                unit.set_reshard_after_forward(True, recurse=False)

    def copy(self) -> Whole:
        return Still(self)

    def state(self) -> dict[str, Tensor]:
        tied = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in tied}
        return self.everything | buffers

    def save(self, folder: Path) -> None:
        config = copy.deepcopy(self.model.config)
        config.dtype, config.architectures = self.dtype, [type(self.model).__name__.removeprefix("FSDP")]
        if self.peers.first:
            config.save_pretrained(folder)
            if self.model.can_generate():
                self.model.generation_config.save_pretrained(folder)
        export.write(folder, self.state(), self.dtype, self.peers)


class Still(Whole):
    """What the weights were at one moment: the model has them while they are active."""

    def __init__(self, weights: Sharded) -> None:
        super().__init__(weights.model)
        self.weights = weights
        self.kept = {name: value.detach().clone() for name, value in weights.everything.items()}

    @contextmanager
    def active(self, learns: bool = False) -> Iterator[None]:
        with self._swapped(), self.weights.active():
            yield

    def state(self) -> dict[str, Tensor]:
        return self.kept

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        live = {name: shard(value).clone() for name, value in self.weights.everything.items()}
        self._put(self.kept)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in self.weights.everything.items():
            shard(value).copy_(shard(values[name]))
