"""Adapters: K experts as small deltas on one frozen base.

    W_k = W + s B_k A_k,    s = alpha / rank                                           (LoRA, arXiv 2106.09685)

`peft` makes and holds the layers. One base carries a named adapter for each branch; whose turn it is is decided in
`Adapter.active` alone, and outside of it none is switched on: what runs by mistake is the base.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, load_peft_weights
from peft.functional import delete_adapter, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from copd import files
from copd.config import Config
from copd.settings import AdapterConfig, ModelConfig
from copd.weights import base_name, vision_of

T = TypeVar("T")
LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""of every name in that file, as `peft` writes it"""


def lora_config(model: PreTrainedModel, cfg: ModelConfig) -> LoraConfig:
    """`cfg.adapter` for a base that has no adapter yet, its targets spelled out.

    Raises `ValueError` for a target that matches nothing or is no layer, and for tied embeddings: a delta of one of
    the pair would be a delta of both in a merged model, and in no other.
    """
    adapter, head = cfg.adapter or AdapterConfig(), model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    tied = head is not None and head.weight is inputs.weight
    frozen = {module for part in vision_of(model) for module in part.modules()} if cfg.freeze_vision else set()
    modules = {name: module for name, module in model.named_modules() if module not in frozen}

    def matching(setting: str, names: list[str]) -> list[str]:
        found = []
        for target in names:
            hits = [name for name in modules if name == target or name.endswith(f".{target}")]
            if not hits:
                where = "the language model" if frozen else "the model"
                raise ValueError(f"adapter: {setting} must each match a module of {where}; got {target!r}")
            found += hits
        return found

    if adapter.target_modules == "all-linear":
        targets = [name for name, module in modules.items() if isinstance(module, LINEAR) and module is not head]
    else:
        targets = matching("target_modules", adapter.target_modules)
    for name in targets:
        if not isinstance(modules[name], ADAPTABLE):
            kind = type(modules[name]).__name__
            raise ValueError(
                f"adapter: target_modules must be linear, embedding or convolution layers; got {name}, a {kind}"
            )
    saved = matching("modules_to_save", adapter.modules_to_save)
    if tied:
        for name in targets + saved:
            if modules[name] in (head, inputs):
                raise ValueError(f"adapter: tied embeddings must stay as they are; got {name}; untie the model first")
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=adapter.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        base_model_name_or_path=model.name_or_path or None,
    )


class Adapter:
    """One adapter of a base, with the values of `copd.weights.Weights`: what a branch owns.

    Args:
        model: the base; the first adapter freezes it and changes its layers in place.
        name: of the branch, without a dot.
        config: from `lora_config`, or of an adapter that is there already.
        seed: of the A matrices. B is zero: an adapter is the base, bit for bit, until it is trained.
        trained: False for a teacher that stays as it is.
        prefix: of the name that peft knows it by, which must be no part of a parameter's, as `visual` is.

    Raises `ValueError` for a name that has a dot or is taken.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        config: LoraConfig,
        seed: int = 0,
        trained: bool = True,
        prefix: str = "copd-",
    ) -> None:
        self.model, self.name, self.key, self.trained = model, name, prefix + name, trained
        self.error = 0.0
        """of a merge that was cut to a lower rank, relative"""
        if "." in name or self.key in getattr(model, "peft_config", {}):
            raise ValueError(f"adapter: name must have no dot and be new to its base; got {name!r}")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            torch.manual_seed(seed)
            inject_adapter_in_model(copy.deepcopy(config), model, self.key)
        switch(model, [])
        self.config = cast(LoraConfig, model.peft_config[self.key])

    def layers(self) -> dict[str, LoraLayer]:
        """The layers it changes by a low-rank delta."""
        modules = self.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer) and self.key in module.r}

    def saved_modules(self) -> dict[str, ModulesToSaveWrapper]:
        """The modules it holds a copy of its own of (`modules_to_save`)."""
        wrapped = ((n, m) for n, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper))
        return {name: module for name, module in wrapped if self.key in module.modules_to_save}

    def state(self) -> dict[str, Tensor]:
        part = f".{self.key}"
        named = self.model.named_parameters()
        return {name.replace(part, ""): p for name, p in named if f"{part}." in f"{name}."}

    def parameters(self) -> list[Parameter]:
        # by name: `requires_grad` is on inside of `active` only
        return [cast(Parameter, p) for p in self.state().values()] if self.trained else []

    def run(self, work: Callable[[], tuple[Tensor, T]], media: bool = False) -> tuple[Tensor, T]:
        return work()

    @contextmanager
    def active(self, learns: bool = False) -> Iterator[None]:
        layer = next(module for module in self.model.modules() if isinstance(module, LoraLayer))
        before = list(layer.active_adapters)
        try:
            switch(self.model, [self.key])
            yield
        finally:
            switch(self.model, before)

    def train(self, checkpointing: bool) -> None:
        self.model.train(checkpointing)
        for layer in self.layers().values():
            layer.lora_dropout[self.key].train()

    def copy(self) -> Adapter:
        twin = Adapter(self.model, self.name, self.config, trained=False, prefix="copy-")
        twin.load_state(self.state())
        return twin

    def remove(self) -> None:
        delete_adapter(self.model, self.key, "lora_")
        del self.model.peft_config[self.key]

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.state().items():
            parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """A folder that `peft` loads, in the format that vLLM reads; its metadata tell its base from others."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # but for the flag peft would ask a server whether the vocabulary is the base's
        state = get_peft_model_state_dict(self.model, adapter_name=self.key, save_embedding_layers=False)
        tensors = {PREFIX + name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt", "base": fingerprint(self.model)})
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        config.save_pretrained(str(folder))

    @classmethod
    def load(cls, model: PreTrainedModel, folder: str | Path, name: str, trained: bool = False) -> Adapter:
        """The adapter in `folder`. Raises `ValueError` for another base's, and for one that is not plain LoRA."""
        config = PeftConfig.from_pretrained(str(folder))
        plain = isinstance(config, LoraConfig) and not (config.use_dora or config.lora_bias or config.bias != "none")
        if not plain:
            raise ValueError(f"adapter: {folder} must hold plain LoRA weights; got {config.peft_type} with {config}")
        config.inference_mode = False
        _check_base(model, Path(folder), config)
        try:
            adapter = cls(model, name, config, trained=trained)
            state = {k.removeprefix(PREFIX): v for k, v in load_peft_weights(str(folder), device="cpu").items()}
            found = cast(Any, set_peft_model_state_dict(model, state, adapter.key))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"adapter: weights in {folder} must fit their base; got {error}") from error
        absent = [key for key in found.missing_keys if f".{adapter.key}." in f"{key}."]
        if odd := [*found.unexpected_keys, *absent]:
            raise ValueError(f"adapter: weights in {folder} must fit their base; got a difference in {odd[0]}")
        return adapter

    def deltas(self) -> dict[str, Callable[[], Tensor]]:
        """What it adds to each weight of the base, by the weight's name: made when called, in fp32 and its shape."""
        made: dict[str, Callable[[], Tensor]] = {}
        for name, layer in self.layers().items():
            made[f"{name}.weight"] = partial(delta, layer, self.key)
        for name, module in self.saved_modules().items():
            start = dict(module.original_module.named_parameters())
            for part, own in module.modules_to_save[self.key].named_parameters():
                made[f"{name}.{part}"] = partial(_difference, own, start[part])
        return made


def _difference(own: Tensor, base: Tensor) -> Tensor:
    return own.detach().float() - base.detach().float()


def switch(model: PreTrainedModel, keys: list[str]) -> None:
    """Turns these adapters on, and no other; gradients too are on for their weights alone."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(keys)
        elif isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([key for key in keys if key in module.modules_to_save])


def factors(layer: LoraLayer, key: str) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of an adapter, without its scale; views of its weights."""
    if key in layer.lora_embedding_A:
        return layer.lora_embedding_B[key].detach(), layer.lora_embedding_A[key].detach()
    B, A = (cast(Tensor, part[key].weight).detach() for part in (layer.lora_B, layer.lora_A))
    return B.flatten(1), A.flatten(1)


def matrix(layer: LoraLayer, weight: Tensor) -> Tensor:
    """(out, in) from the shape of the layer's weight: the inverse of `shaped`."""
    transposed = isinstance(layer.get_base_layer(), nn.Embedding | Conv1D)
    return weight.T if transposed else weight.flatten(1)


def delta(layer: LoraLayer, key: str) -> Tensor:
    """s B A in fp32, in the shape of the layer's weight."""
    B, A = factors(layer, key)
    return shaped(layer, layer.scaling[key] * (B.float() @ A.float()))


def shaped(layer: LoraLayer, matrix: Tensor) -> Tensor:
    """(out, in) as the layer's weight has it: embeddings and Conv1D are stored transposed, convolutions unfolded."""
    base = layer.get_base_layer()
    transposed = isinstance(base, nn.Embedding | Conv1D)
    return (matrix.T if transposed else matrix).reshape(cast(Tensor, base.weight).shape)


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the base without its adapters."""
    return unwrap(copy.deepcopy(model))


def unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the adapters off, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.original_module)
    vars(model).pop("peft_config", None)
    return model


@torch.no_grad()
def apply(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The base with the adapter in `folder` added to its weights, in place."""
    for name, make in Adapter.load(model, folder, "applied").deltas().items():
        path, _, part = name.rpartition(".")
        owner = model.get_submodule(path)
        inner = owner.get_base_layer() if isinstance(owner, LoraLayer) else cast(nn.Module, owner.original_module)
        weight = inner.get_parameter(part)
        weight.copy_(weight.float() + make())
    return unwrap(model).requires_grad_(True)


def prepare(model: PreTrainedModel, cfg: Config, device: torch.device) -> LoraConfig:
    """Places the base for its adapters, and names it: as its folder, or the one that `save_base` makes."""
    model.to(device, getattr(torch, cfg.model.dtype))  # type: ignore[arg-type]  # transformers wraps `to`
    model.requires_grad_(False)
    config, name = lora_config(model, cfg.model), model.name_or_path or str(cfg.run_dir / "base")
    local = Path(name).exists() or not model.name_or_path
    config.base_model_name_or_path = str(Path(name).resolve()) if local else name
    return config


def save_base(model: PreTrainedModel, config: LoraConfig, processor: Any) -> None:
    """Saves a base that came from nowhere, so that its adapters can be loaded."""
    if not model.name_or_path:
        folder = Path(config.base_model_name_or_path or "")
        with files.whole(folder) as scratch:
            bare(model).save_pretrained(scratch)
            processor.save_pretrained(scratch)


def fingerprint(model: PreTrainedModel) -> str:
    """Names a base by some of its weights, in bf16 or fp32 alike; adapters on it do not count."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if (own := base_name(name)) is None:
            continue
        digest.update(own.encode())
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        digest.update(some.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def base_of(folder: str | Path) -> str:
    """Name or folder of the base of the adapter in `folder`."""
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ValueError(f"adapter: {folder} must name its base; got none")
    return base


def _check_base(model: PreTrainedModel, folder: Path, config: LoraConfig) -> None:
    metadata: dict[str, str] = {}
    if (folder / WEIGHTS_FILE).exists():
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            metadata = file.metadata() or {}
    own, name = config.base_model_name_or_path, model.name_or_path
    # an adapter that was not written here has but the name of its base
    fits = metadata["base"] == fingerprint(model) if "base" in metadata else not (own and name) or own == name
    if not fits:
        raise ValueError(f"adapter: base of {folder} must be the one it was trained on, {own}; got {name or 'another'}")
