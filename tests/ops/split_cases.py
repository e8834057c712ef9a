"""The kinds of rows that a split vocabulary is tested on, and every op over them: on each rank, and whole."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from kernel_cases import DIVERGENCES
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from copd_kernels import Head, agreement, kl, logprob, mutual_kl

N, D, V = 5, 8, 53
KINDS = (
    "random",
    "nearly equal",
    "peaked",
    "every logit twice",
    "masked words",
    "words masked on one side",
    "padded",
    "few words",
)
# for two chunks, the last one shorter
CHUNKED = {"workspace_bytes": 1000}


def heads(kind: str, dtype: torch.dtype, count: int = 2, **fields) -> list[Head]:
    """Student and teachers, plain; on the last of several ranks `padded` has no token, nor have many of `few words`."""
    random = torch.Generator().manual_seed(KINDS.index(kind))
    rows, fields = {"few words": 5, "every logit twice": 52}.get(kind, V), dict(fields)
    made: list[Head] = []
    for k in range(count):
        hidden, lm_head = (torch.randn(n, D, generator=random, dtype=torch.float64) for n in (N, rows))
        bias = torch.randn(rows, generator=random, dtype=torch.float64)
        if kind == "nearly equal" and made:
            hidden = made[0].hidden + 1e-4 * hidden
            lm_head, bias = made[0].lm_head, made[0].bias
        if kind == "peaked":
            bias[rows // 2] += 20
        if kind == "every logit twice":
            lm_head[26:], bias[26:] = lm_head[:26], bias[:26]
        if kind == "masked words" or (kind == "words masked on one side" and k == 0):
            bias[:30] = bias[45] = -torch.inf
        if kind == "padded":
            lm_head[24:], fields["vocab_size"] = torch.nan, 24
        made.append(Head(hidden, lm_head, bias, **fields))
    return [leaves(head, dtype) for head in made]


def leaves(head: Head, dtype: torch.dtype) -> Head:
    tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in parts(head).items()}
    return replace(head, **tensors)


def parts(head: Head) -> dict[str, Tensor]:
    return {name: x for name in ("hidden", "lm_head", "bias") if (x := getattr(head, name)) is not None}


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def split(head: Head, over: DeviceMesh) -> Head:
    """The same head with its vocabulary over the ranks of a mesh, as new leaves."""
    tensors = {}
    for name, x in parts(head).items():
        if name == "hidden":
            tensors[name] = DTensor.from_local(x.detach(), over, [Replicate()], run_check=False)
        else:
            chunks = x.detach().chunk(over.size())
            mine, rank = x.detach()[:0], over.get_local_rank()
            mine = chunks[rank] if rank < len(chunks) else mine
            place = {"shape": x.shape, "stride": x.stride(), "run_check": False}
            tensors[name] = DTensor.from_local(mine.clone(), over, [Shard(0)], **place)
    return replace(head, **{name: x.requires_grad_() for name, x in tensors.items()})


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def every_op(heads: list[Head], **options) -> dict[str, Tensor]:
    """Values and gradients of every op, by name; of a padded head only those of its tokens."""
    student, teacher = heads[:2]
    upstream = torch.linspace(1, 2, N, dtype=torch.float64)
    tokens = torch.tensor([0, 3, -100, student.V - 1, 4])
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    values = {}
    how = {"beta": 0.3, "temperature": 0.9, "token_weight": weight, **options}
    for divergence, reduction in zip(DIVERGENCES, ("none", "mean", "none", "sum"), strict=True):
        values[f"kl {divergence}"] = kl(student, teacher, divergence=divergence, reduction=reduction, **how)
    values["mutual_kl"] = mutual_kl(heads[:2], divergence="symmetric", **how).loss
    for name, x in zip(("logp", "entropy", "lse"), logprob(student, tokens, **options), strict=True):
        values[name] = x
    results = {}
    for name, value in values.items():
        results[name] = value.detach()
        scaled = (value * upstream[: value.numel()].view(value.shape)).sum()
        learners = heads[:2] if name.startswith("mutual") else [student]
        tensors = {(k, part): x for k, head in enumerate(learners) for part, x in parts(head).items()}
        made = torch.autograd.grad(scaled, list(tensors.values()), retain_graph=True)
        for (k, part), gradient in zip(tensors, made, strict=True):
            cut = slice(None) if part == "hidden" else slice(learners[k].V)
            results[f"{name}, {part} of head {k}"] = whole(gradient)[cut]
    found = agreement(student, heads[1:], k=min(7, student.V), **options)
    return results | dict(zip(("overlap", "forward_kl", "reverse_kl"), found, strict=True))
