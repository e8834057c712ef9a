"""How closely teachers agree with a student: top-k overlap and both KLs, in one sweep without gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE
from .checks import check, check_integer, check_temperature, check_workspace
from .flatten import Flat, flatten, logits_dtype, number, projections
from .head import Head, as_heads, check_same_vocabulary
from .results import Agreement
from .rows import load, resolve
from .schedule import Workspace, lacking


@torch.library.custom_op(f"{NAMESPACE}::agreement", mutates_args=())
def agreement_op(
    hidden: list[Tensor],
    lm_head: list[Tensor],
    bias: list[Tensor],
    numbers: Tensor,
    vocab_sizes: list[int],
    shard: str,
    k: int,
    temperature: Tensor,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(overlap, forward_kl, reverse_kl), (T, N) each; the first head is the student."""
    dtype = logits_dtype(hidden)
    heads = projections(Flat(hidden, lm_head, bias, numbers, vocab_sizes, shard), temperature, dtype)
    N, teachers = hidden[0].shape[0], list(range(1, len(heads)))
    rows = load(backend, shard)
    outputs = [hidden[0].new_empty(len(teachers), N, dtype=dtype) for _ in range(3)]
    space = Workspace(N, len(heads), heads[0].columns, outputs[0], workspace_bytes)
    raw = lacking(heads, outputs[0])
    for chunk in space.chunks:
        z = space.logits(chunk)
        for head, out in zip(heads, z, strict=True):
            head.project(head.read(chunk), out)
        for output, result in zip(outputs, rows.agreement(z, 0, teachers, k, raw.of_chunk()), strict=True):
            output[:, chunk] = result
    overlap, forward_kl, reverse_kl = outputs
    # what is no distribution agrees with nothing
    overlap = torch.where(forward_kl.isnan(), forward_kl, overlap)
    return overlap, forward_kl, reverse_kl


@agreement_op.register_fake
def _(hidden: list[Tensor], *_: Any) -> tuple[Tensor, ...]:
    shape, dtype = (len(hidden) - 1, hidden[0].shape[0]), logits_dtype(hidden)
    return tuple(hidden[0].new_empty(shape, dtype=dtype) for _ in range(3))


@torch.no_grad()
def agreement(
    student: Head,
    teachers: Head | list[Head],
    *,
    k: int = 10,
    temperature: float = 1.0,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> Agreement:
    """overlap = |top-k(p) ∩ top-k(q)| / k, forward_kl = KL(q || p), reverse_kl = KL(p || q), p student and q teacher.

    The symmetric KL of arXiv 2604.27083 is forward_kl + reverse_kl, not halved. Among equal logits the lower id ranks
    higher.

    Args:
        student: hidden (..., D).
        teachers: one head or T heads over the same vocabulary, hidden (..., D_j).
        k: in 1..V.
        temperature: positive; divides all logits.
        backend: "torch", "triton", "native" or "reference"; where omitted COPD_BACKEND, else the fastest available.
        workspace_bytes: most memory for a chunk's logits; a default for the device where omitted.

    Returns:
        (overlap, forward_kl, reverse_kl), (T, ...) each, fp32 (fp64 if any head is), without gradient.

    Raises:
        ValueError, TypeError: an argument breaks its rule. RuntimeError: the backend is not available here.
    """
    teachers = as_heads("agreement", "teachers", teachers)
    check("agreement", "teachers", len(teachers) > 0, "not be empty", teachers)
    named = {f"teachers[{j}]": teacher for j, teacher in enumerate(teachers)}
    check_same_vocabulary("agreement", "student", student, named)
    shape = student.hidden.shape[:-1]
    for name, teacher in named.items():
        got = tuple(teacher.hidden.shape[:-1])
        check("agreement", f"{name}.hidden", got == shape, f"have shape (*{tuple(shape)}, D)", got)
    check_integer("agreement", "k", k)
    check("agreement", "k", 1 <= k <= student.V, f"be in 1..{student.V}", k)
    check_temperature("agreement", temperature)
    check_workspace("agreement", workspace_bytes)

    name = resolve("agreement", backend, student.hidden.device, student.shard.split, 1 + len(teachers), len(teachers))
    if name == "reference":
        return reference.agreement(student, teachers, k=k, temperature=temperature)
    flat = flatten([student, *teachers])
    outputs = agreement_op(*flat, k, number(temperature), name, workspace_bytes or 0)
    return Agreement(*(x.view(len(teachers), *shape) for x in outputs))
