"""Merging: one model from the base and its branches, by arithmetic on their weights.

mean, weighted     θ* = Σ_k w_k θ_k,  Σ w = 1
task_arithmetic    θ* = θ_0 + λ Σ_k w_k τ_k,  τ_k = θ_k − θ_0                        (arXiv 2212.04089)
ties               θ* = θ_0 + λ · elect(trim(w_k τ_k)): each τ keeps its largest share `density`; at each weight
                   the sign with the larger total mass wins, and the values of that sign are averaged
                                                                                    (arXiv 2306.01708)
"""

from __future__ import annotations

import torch
from torch import Tensor

from copd.config import MergeConfig

State = dict[str, Tensor]


def merge(base: State, branches: dict[str, State], cfg: MergeConfig) -> State:
    """Merged weights, computed in fp32 and returned in the base's dtypes.

    Raises `ValueError` where a branch's parameters differ from the base's in name or shape, as they do when its
    tokenizer or vocabulary does.
    """
    for name, state in branches.items():
        if odd := sorted(state.keys() ^ base.keys()):
            raise ValueError(f"merge: branch {name!r} must have the base's parameters; got a difference in {odd[0]!r}")
        for key, value in state.items():
            if value.shape != base[key].shape:
                shapes = [tuple(tensor.shape) for tensor in (base[key], value)]
                raise ValueError(f"merge: {key} of {name!r} must have shape {shapes[0]}; got {shapes[1]}")
    weights = torch.tensor([cfg.weights.get(name, 1.0) for name in branches])
    if cfg.method == "weighted":
        if not weights.sum() > 0:
            raise ValueError(f"merge: weights must have a positive sum; got {weights.tolist()}")
        weights = weights / weights.sum()
    return {
        key: _merge(start, [state[key] for state in branches.values()], weights, cfg)
        if start.is_floating_point()
        else start
        for key, start in base.items()
    }


def _merge(base: Tensor, branches: list[Tensor], weights: Tensor, cfg: MergeConfig) -> Tensor:
    start = base.float()
    stack = torch.stack([branch.to(base.device).float() for branch in branches])  # (K, ...)
    weights = weights.to(base.device).view(-1, *[1] * base.dim())
    vectors = weights * (stack - start)
    if cfg.method == "mean":
        merged = stack.mean(0)
    elif cfg.method == "weighted":
        merged = (weights * stack).sum(0)
    elif cfg.method == "task_arithmetic":
        merged = start + cfg.scale * vectors.sum(0)
    else:
        merged = start + cfg.scale * _ties(vectors, cfg.density)
    return merged.to(base.dtype)


def _ties(vectors: Tensor, density: float) -> Tensor:
    flat = vectors.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().topk(keep, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= threshold, flat, 0.0)
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    elected = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return elected.view(vectors.shape[1:])
