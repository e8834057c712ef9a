"""Merging: one model from the base and its branches, by arithmetic on their weights.

mean, weighted     θ* = Σ_k w_k θ_k,  Σ w = 1
task_arithmetic    θ* = θ_0 + λ Σ_k w_k τ_k,  τ_k = θ_k − θ_0                        (arXiv 2212.04089)
ties               θ* = θ_0 + λ · elect(trim(w_k τ_k)): each τ keeps its largest share `density`; at each weight
                   the sign with the larger total mass wins, and the values of that sign are averaged
                                                                                    (arXiv 2306.01708)

The τ of an adapter is its delta; `copd.merge_adapters` merges those.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from copd.settings import MergeConfig

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
    weights = branch_weights(branches, cfg)
    return {
        key: merge_tensor(start, [state[key] for state in branches.values()], weights, cfg)
        if start.is_floating_point()
        else start
        for key, start in base.items()
    }


def branch_weights(branches: Iterable[str], cfg: MergeConfig) -> Tensor:
    """(K,) fp32: w_k, of sum 1 for the two means."""
    weights = torch.tensor([cfg.weights.get(name, 1.0) for name in branches])
    if cfg.method == "mean":
        return torch.full_like(weights, 1 / len(weights))
    if cfg.method == "weighted":
        if not weights.sum() > 0:
            raise ValueError(f"merge: weights must have a positive sum; got {weights.tolist()}")
        return weights / weights.sum()
    return weights


def merge_tensor(base: Tensor, branches: list[Tensor], weights: Tensor, cfg: MergeConfig) -> Tensor:
    """One of the parameters, or for all methods but `ties`, whose threshold is of it all, any part of one."""
    start = base.float()
    stack = torch.stack([branch.to(base.device).float() for branch in branches])  # (K, ...)
    if cfg.method in ("mean", "weighted"):
        return combine(stack, weights, cfg).to(base.dtype)
    return (start + combine(stack - start, weights, cfg)).to(base.dtype)


@torch.no_grad()
def merge_into(target: Tensor, base: Tensor, branches: list[Tensor], weights: Tensor, cfg: MergeConfig) -> None:
    """Puts the merge of one parameter into `target`; where ranks split that, `branches` are their shards."""
    if not isinstance(target, DTensor):
        target.copy_(merge_tensor(base, branches, weights, cfg))
        return
    device, mesh, placements = target.device, target.device_mesh, target.placements

    def part(whole: Tensor) -> Tensor:
        return distribute_tensor(whole.to(device), mesh, placements, src_data_rank=None).to_local()

    if cfg.method == "ties":
        split = [
            DTensor.from_local(
                shard.to(device), mesh, placements, run_check=False, shape=target.shape, stride=target.stride()
            )
            for shard in branches
        ]
        merged = part(merge_tensor(base.to(device), [shards.full_tensor() for shards in split], weights, cfg))
    else:
        merged = merge_tensor(part(base), branches, weights, cfg)
    target.to_local().copy_(merged)


def combine(vectors: Tensor, weights: Tensor, cfg: MergeConfig) -> Tensor:
    """What `cfg.method` makes of K task vectors (K, ...) fp32. The two means are the same of the weights themselves."""
    if cfg.method == "mean":
        return _sum(vectors) / len(vectors)
    weighted = weights.to(vectors.device).view(-1, *[1] * (vectors.dim() - 1)) * vectors
    if cfg.method == "weighted":
        return _sum(weighted)
    return cfg.scale * (_sum(weighted) if cfg.method == "task_arithmetic" else _ties(weighted, cfg.density))


def _sum(vectors: Tensor) -> Tensor:
    """In the order of the branches, so that a part of a tensor is summed as the whole is."""
    first, *others = vectors
    return sum(others, first)


def _ties(vectors: Tensor, density: float) -> Tensor:
    flat = vectors.flatten(1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = flat.abs().topk(keep, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= threshold, flat, 0.0)
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    elected = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return elected.view(vectors.shape[1:])
