"""Several heads that teach each other on the same tokens, in one sweep.

Every head is projected once, whichever edges it takes part in: K projections, and two back for each head that learns,
3K GEMM passes for K heads, where a call of `kl` for each of E edges would spend 4E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE
from .checks import (
    check,
    check_divergence,
    check_temperature,
    check_tensor,
    check_token_weight,
    check_type,
    check_workspace,
)
from .flatten import (
    Flat,
    fake_gradients,
    finish,
    flatten,
    logits_dtype,
    number,
    projections,
    save,
    saved,
    wanted,
)
from .head import Head, as_heads, check_same_vocabulary
from .results import MutualKL
from .rows import load, resolve
from .schedule import Gradients, Workspace, lacking


@torch.library.custom_op(f"{NAMESPACE}::mutual_kl", mutates_args=())
def mutual_op(
    hidden: list[Tensor],
    lm_head: list[Tensor],
    bias: list[Tensor],
    edge_weight: Tensor,
    token_weight: Tensor,
    numbers: Tensor,
    beta: Tensor,
    temperature: Tensor,
    vocab_sizes: list[int],
    shard: str,
    edges: list[int],
    divergence: str,
    backend: str,
    workspace_bytes: int,
    want: list[bool],
    alone: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """sum_e edge_weight_e sum_n u_n D_en, sum_n u_n D_en (E,), then three gradients and their unit for each head.

    `edges` lists student, teacher, student, teacher, ...; `want` has three flags a head. `alone` as in `kl_op`.
    """
    dtype = logits_dtype(hidden)
    heads = projections(Flat(hidden, lm_head, bias, numbers, vocab_sizes, shard), temperature, dtype)
    pairs = list(zip(edges[::2], edges[1::2], strict=True))
    weight = (edge_weight.unsqueeze(1) * token_weight).to(dtype)  # (E, N)
    token_weight = token_weight.to(dtype)
    N, rows = hidden[0].shape[0], load(backend, shard)
    gradients: dict[int, Gradients] = {}
    factors: dict[int, Tensor] = {}  # of the gradient, and the divergences: (T, N) of each student
    values: dict[int, Tensor] = {}
    lessons: dict[int, list[int]] = {}  # each student's edges
    for e, (student, _) in enumerate(pairs):
        lessons.setdefault(student, []).append(e)
    for student, its_edges in lessons.items():
        flags = want[3 * student : 3 * student + 3]
        scope = torch.stack([weight[e] for e in its_edges])
        values[student] = torch.empty_like(scope)
        if any(flags):
            gradient = gradients[student] = Gradients(heads[student], lm_head[student].shape[0], flags, scope)
            factors[student] = scope * gradient.factor
    # every head's logits are still needed after its own gradient: dlogits have their own memory
    space = Workspace(N, len(heads), heads[0].columns, weight, workspace_bytes, dtype if gradients else None)

    lacks = lacking(heads, weight)
    for chunk in space.chunks:
        z, raw = space.logits(chunk), lacks.of_chunk()
        inputs = [head.read(chunk) for head in heads]
        for head, mine, out in zip(heads, inputs, z, strict=True):
            head.project(mine, out)
        for student, its_edges in lessons.items():
            call = (z, student, [pairs[e][1] for e in its_edges], divergence, beta.item())
            value = values[student][:, chunk]
            if student in gradients:
                gradient = gradients[student]
                dlogits = space.dlogits(chunk, gradient.dlogits_dtype)
                rows.kl(*call, factors[student][:, chunk], heads[student].cap, dlogits, value, raw)
                gradient.add(dlogits, inputs[student], chunk)
            else:
                rows.kl(*call, out=value, raw=raw)

    made: list[Tensor] = []
    for k in range(len(heads)):
        if k in gradients:
            made += [*gradients[k].tensors(shard), gradients[k].unit]
        else:
            made += [*(weight.new_empty(0) for _ in range(3)), weight.new_ones(())]
    edge_sum = weight.new_zeros(len(pairs))
    for student, its_edges in lessons.items():
        counted = torch.where(token_weight == 0, 0, token_weight * values[student]).sum(1)
        for e, total in zip(its_edges, counted, strict=True):
            edge_sum[e] = total
    loss = torch.where(edge_weight == 0, 0, edge_weight.to(dtype) * edge_sum).sum()
    return loss, edge_sum, made


@mutual_op.register_fake
def _(
    hidden: list[Tensor], lm_head: list[Tensor], bias: list[Tensor | None], edge_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype, want = logits_dtype(hidden), rest[-2]
    empty = hidden[0].new_empty
    made: list[Tensor] = []
    for k in range(len(hidden)):
        made += fake_gradients(hidden[k], lm_head[k], want[3 * k : 3 * k + 3], dtype)
        made.append(empty((), dtype=dtype))
    return empty((), dtype=dtype), empty(edge_weight.shape, dtype=dtype), made


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, edge_sum, made = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(edge_sum, *made)
    ctx.dtypes, ctx.alone = [x.dtype for x in inputs[0]], inputs[-1]
    save(ctx, *made)


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    K = len(ctx.dtypes)
    result: list[list[Tensor | None]] = [[None] * K for _ in range(3)]
    if upstream is not None:
        made = saved(ctx)
        for k, dtype in enumerate(ctx.dtypes):
            *gradients, unit = made[4 * k : 4 * k + 4]
            for kind, gradient in enumerate(gradients):
                if ctx.needs_input_grad[kind][k]:
                    result[kind][k] = finish(gradient, unit * upstream, dtype, ctx.alone)
    return *result, *[None] * 13


mutual_op.register_autograd(_backward, setup_context=_save)


def mutual_kl(
    heads: list[Head],
    *,
    edges: list[tuple[int, int]] | None = None,
    edge_weight: Tensor | None = None,
    divergence: str = "reverse",
    beta: float = 0.5,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> MutualKL:
    """loss = sum_e a_e edge_kl_e, edge_kl_e = sum_n u_n D(heads[s_e]_n, heads[t_e]_n) / sum_n u_n: mutual distillation.

    D is the divergence of `kl`, which see. Each edge's gradient reaches its student s_e only.
    Source: arXiv 2604.27083, algorithm 1, phase II at vocabulary level.

    Args:
        heads: K heads over one vocabulary that read the same tokens, hidden (..., D_k).
        edges: E pairs (student, teacher) of indices into `heads`, no pair twice; all ordered pairs where omitted.
        edge_weight: (E,), floating: a; ones where omitted.
        divergence, beta, temperature, backend, workspace_bytes: as in `kl`.
        token_weight: (...), floating or bool, >= 0: u; ones where omitted.

    Returns:
        loss: (), fp32 (fp64 if any head is), differentiable in every student's hidden, lm_head and bias.
        edge_kl: (E,), detached, in nats.

    Raises:
        ValueError, TypeError: an argument breaks its rule. RuntimeError: the backend is not available here.
    """
    heads = as_heads("mutual_kl", "heads", heads)
    K = len(heads)
    check("mutual_kl", "heads", K >= 2, "have at least two entries", K)
    check_divergence("mutual_kl", divergence, beta)
    check_temperature("mutual_kl", temperature)
    check_workspace("mutual_kl", workspace_bytes)
    if edges is None:
        edges = [(s, t) for s in range(K) for t in range(K) if s != t]
    pairs = isinstance(edges, list | tuple) and all(isinstance(edge, list | tuple) for edge in edges)
    whole = pairs and all(isinstance(i, int) for edge in edges for i in edge)
    check_type("mutual_kl", "edges", whole, "be a list of pairs of indices", repr(edges))
    check("mutual_kl", "edges", len(edges) > 0, "not be empty", edges)
    for edge in edges:
        ok = len(edge) == 2 and all(0 <= i < K for i in edge) and edge[0] != edge[1]
        check("mutual_kl", "edges", ok, f"be pairs of two different indices in 0..{K - 1}", edge)
    edges = [(s, t) for s, t in edges]
    check("mutual_kl", "edges", len(set(edges)) == len(edges), "name no pair twice", edges)
    first = heads[0]
    others = {f"heads[{k}]": head for k, head in enumerate(heads)}
    check_same_vocabulary("mutual_kl", "heads[0]", first, others)
    shape, device = first.hidden.shape[:-1], first.hidden.device
    for name, head in others.items():
        got = tuple(head.hidden.shape[:-1])
        check("mutual_kl", f"{name}.hidden", got == shape, f"have shape (*{tuple(shape)}, D)", got)
    dtype = logits_dtype([head.hidden for head in heads])
    token_weight = check_token_weight("mutual_kl", token_weight, shape, device, dtype)
    if edge_weight is None:
        edge_weight = token_weight.new_ones(len(edges))
    check_tensor("mutual_kl", "edge_weight", edge_weight)
    got = tuple(edge_weight.shape)
    check("mutual_kl", "edge_weight", got == (len(edges),), f"have shape (E={len(edges)},)", got)
    check_type("mutual_kl", "edge_weight", edge_weight.is_floating_point(), "be floating", edge_weight.dtype)
    rule = f"be on {device}"
    check("mutual_kl", "edge_weight", edge_weight.device == device, rule, edge_weight.device)
    edge_weight = edge_weight.detach().to(dtype)

    students = [s for s, _ in edges]
    name = resolve("mutual_kl", backend, device, first.shard.split, K, max(students.count(s) for s in students))
    if name == "reference":
        return reference.mutual_kl(
            heads,
            edges=edges,
            edge_weight=edge_weight,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            token_weight=token_weight,
        )
    heads = [head if k in students else head.detach() for k, head in enumerate(heads)]
    flat = flatten(heads)
    total, edge_sum, _ = mutual_op(
        *flat[:3],
        edge_weight,
        token_weight.reshape(-1),
        flat.numbers,
        number(beta),
        number(temperature),
        flat.vocab_size,
        flat.shard,
        [i for edge in edges for i in edge],
        divergence,
        name,
        workspace_bytes or 0,
        [flag for head in heads for flag in wanted(head)],
        True,
    )
    mass = token_weight.sum()
    mass = torch.where(mass > 0, mass, 1)
    return MutualKL(total / mass, edge_sum / mass)
