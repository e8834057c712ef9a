"""Merging adapters of one base: their deltas Δ_k = s_k B_k A_k are the task vectors of `copd.merge`.

Into a model      W + combine(Δ_1 ... Δ_K), by any method
Into an adapter   Σ_k w_k Δ_k = [w_1 s_1 B_1 ... w_K s_K B_K] [A_1; ...; A_K], exact, of all ranks together; or cut
                  to rank r: the r largest singular values of the sum, or of what `ties` makes of the Δ
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from copd.adapter import Adapter, bare, base_of, delta, factors, matrix
from copd.merge import branch_weights, combine
from copd.model import load_saved
from copd.settings import MergeConfig
from copd.weights import Weights

logger = logging.getLogger("copd")


def merge(branches: Mapping[str, Weights], cfg: MergeConfig) -> PreTrainedModel | Adapter:
    """The adapters' merge, as `cfg.into` says."""
    adapters = {name: cast(Adapter, weights) for name, weights in branches.items()}
    return into_model(adapters, cfg) if cfg.into == "model" else into_adapter(adapters, cfg)


def merge_folders(folders: list[str], base: str | None, cfg: MergeConfig, out: Path) -> None:
    """Saves the merge of adapters of one base, which they name where `base` does not."""
    model, processor = load_saved(base or base_of(folders[0]))
    adapters = {folder: Adapter.load(model, folder, str(place)) for place, folder in enumerate(folders)}
    merged = merge(adapters, cfg)
    merged.save(out) if isinstance(merged, Adapter) else merged.save_pretrained(out)
    processor.save_pretrained(out)


@torch.no_grad()
def into_model(adapters: dict[str, Adapter], cfg: MergeConfig) -> PreTrainedModel:
    """A whole model: the base, and the deltas merged in fp32; a weight that no adapter changes stays bit for bit."""
    weights, model = branch_weights(adapters, cfg), bare(next(iter(adapters.values())).model)
    state = model.state_dict()
    made = [adapter.deltas() for adapter in adapters.values()]
    for key in dict.fromkeys(key for deltas in made for key in deltas):
        start = state[key].float()
        vectors = torch.stack([deltas[key]() if key in deltas else torch.zeros_like(start) for deltas in made])
        state[key].copy_(start + combine(vectors, weights, cfg))
    return model


@torch.no_grad()
def into_adapter(adapters: dict[str, Adapter], cfg: MergeConfig, name: str = "merged") -> Adapter:
    """One adapter more on the same base; logs the relative error ‖Δ − B A‖ / ‖Δ‖ of a cut.

    Raises `ValueError` where the adapters change different layers.
    """
    first, *others = adapters.values()
    targets = first.deltas().keys()
    for adapter in others:
        if odd := sorted(targets ^ adapter.deltas().keys()):
            rule = f"merge: adapters must change the same layers to become one; {first.name!r} and"
            raise ValueError(f"{rule} {adapter.name!r} differ in {odd[0]}")
    weights, layers = branch_weights(adapters, cfg), first.layers()
    factored = {path: _factored(layer, adapters, weights, cfg) for path, layer in layers.items()}
    config = copy.deepcopy(first.config)
    config.r = config.lora_alpha = cfg.rank or max(B.shape[1] for B, _ in factored.values())
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    merged = Adapter(first.model, name, config, trained=False)
    lost = total = 0.0
    for path, (B, A) in factored.items():
        layer, size = merged.layers()[path], min(config.r, B.shape[1])
        lost += (B[:, size:] @ A[size:]).square().sum().item()
        total += (B @ A).square().sum().item()
        for own, cut in zip(factors(layer, merged.key), (B[:, :size], A[:size]), strict=True):
            own.zero_()
            own[: cut.shape[0], : cut.shape[1]].copy_(cut)
    error = (lost / total) ** 0.5 if total else 0.0
    if cfg.rank is not None:
        logger.info(f"merge: adapter of rank {config.r}, relative error {error:.2e}")
    merged.error = error
    for path, module in first.saved_modules().items():
        start = dict(module.original_module.named_parameters())
        for part, own in module.modules_to_save[merged.key].named_parameters():
            vectors = torch.stack([adapter.deltas()[f"{path}.{part}"]() for adapter in adapters.values()])
            own.copy_(start[part].float() + combine(vectors, weights, cfg))
    return merged


def _factored(
    layer: LoraLayer, adapters: dict[str, Adapter], weights: Tensor, cfg: MergeConfig
) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in) fp32 of the merged delta, scale included; its largest parts first where it is cut."""
    keys = [adapter.key for adapter in adapters.values()]
    if cfg.method == "ties":
        vectors = torch.stack([delta(layer, key) for key in keys])
        merged = matrix(layer, combine(vectors, weights, cfg))
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
        return U * S.sqrt(), S.sqrt()[:, None] * Vh
    scale = cfg.scale if cfg.method == "task_arithmetic" else 1.0
    pairs = [factors(layer, key) for key in keys]
    shares = [scale * weight * layer.scaling[key] for weight, key in zip(weights.tolist(), keys, strict=True)]
    B = torch.cat([share * B.float() for share, (B, _) in zip(shares, pairs, strict=True)], 1)
    A = torch.cat([A.float() for _, A in pairs])
    if cfg.rank is None:
        return B, A
    # the SVD of B A from those of its thin factors
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U * S.sqrt(), S.sqrt()[:, None] * (Vh @ Qa.T)
