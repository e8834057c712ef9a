"""A model whose weights, gradients and optimiser state are split over the ranks of its branch, by FSDP2.

The decoder's blocks are units of their own; embeddings, vision, norms and `lm_head` are the model's. Learning, each
unit is whole while it computes, and what reads `lm_head` runs in the model's forward: `run`. Otherwise `active` keeps
the whole model in the dtype it computes in, so that ranks sample and score at their own pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from copd.weights import Whole, vision_of

T = TypeVar("T")


class Sharded(Whole):
    def __init__(self, model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        super().__init__(model)
        names = set(model._no_split_modules or ())
        blocks = [module for module in model.get_decoder().modules() if type(module).__name__ in names]
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        self.units: list[FSDPModule] = []
        self.writes = mesh.get_local_rank() == 0
        for module in (*blocks, model):
            unit = fully_shard(module, mesh=mesh, mp_policy=policy)
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
        """All of it, on every rank, in host memory."""
        return {name: whole(value) for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            value.copy_(like(state[name], value))

    def gathered(self, moments: dict[str, Any]) -> dict[str, Any]:
        # two thirds of a checkpoint: in host memory of the rank that writes it alone
        state = {
            place: {name: whole(x, self.writes) for name, x in kept.items()} for place, kept in moments["state"].items()
        }
        return moments | {"state": state}

    def split(self, moments: dict[str, Any]) -> dict[str, Any]:
        state = {
            place: {name: x if name == "step" else like(x, self.trained[place]) for name, x in kept.items()}
            for place, kept in moments["state"].items()
        }
        return moments | {"state": state}

    def save(self, folder: Path | None) -> None:
        self._write(folder, state_dict=self.state())


class Still(Whole):
    """What the weights were at one moment: the model has them while they are active."""

    def __init__(self, weights: Sharded) -> None:
        super().__init__(weights.model)
        self.weights = weights
        self.kept = self._shards()

    def _shards(self) -> list[Tensor]:
        return [shard(value).clone() for value in self.weights.everything.values()]

    @torch.no_grad()
    def _put(self, shards: list[Tensor]) -> None:
        for value, kept in zip(self.weights.everything.values(), shards, strict=True):
            shard(value).copy_(kept)

    @contextmanager
    def active(self, learns: bool = False) -> Iterator[None]:
        with self._swapped(), self.weights.active():
            yield

    def state(self) -> dict[str, Tensor]:
        with self._swapped():
            return self.weights.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        with self._swapped():
            self.weights.load_state(state)
            self.kept = self._shards()

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        live = self._shards()
        self._put(self.kept)
        try:
            yield
        finally:
            self._put(live)


def shard(value: Tensor) -> Tensor:
    """This rank's part."""
    return value.to_local().detach() if isinstance(value, DTensor) else value.detach()


def whole(value: Tensor, keep: bool = True) -> Tensor:
    """All of it, in host memory; of what is not kept nothing, where it only helps others to theirs."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu() if keep else value.new_empty(0)


def like(value: Tensor, other: Tensor) -> Tensor:
    """`value` split as `other` is."""
    value = value.to(other.device)
    return distribute_tensor(value, other.device_mesh, other.placements) if isinstance(other, DTensor) else value
