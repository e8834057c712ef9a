"""A head's likeliest tokens and their log-probs: what a teacher ships in place of its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE
from .checks import check, check_integer, check_temperatures, check_workspace
from .flatten import Flat, flatten, logits_dtype, projections
from .head import Head, check_head
from .rows import load, resolve
from .schedule import Workspace, lacking
from .temperature import of_tokens, temperatures


@torch.library.custom_op(f"{NAMESPACE}::topk", mutates_args=())
def topk_op(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    numbers: Tensor,
    temperature: Tensor,
    vocab_size: int,
    k: int,
    backend: str,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """ids and logp, (N, k) each."""
    dtype = logits_dtype([hidden])
    head = projections(Flat([hidden], [lm_head], [bias], numbers, [vocab_size], ""), temperature, dtype)[0]
    rows = load(backend)
    logp = hidden.new_empty(hidden.shape[0], k, dtype=dtype)
    ids = torch.empty_like(logp, dtype=torch.int64)
    space = Workspace(hidden.shape[0], 1, head.V, logp, workspace_bytes)
    raw = lacking([head], logp)
    for chunk in space.chunks:
        z = space.logits(chunk)
        head.project(head.read(chunk), z[0])
        side = rows.logprob(z, raw=raw.of_chunk(of_tokens(temperature, chunk)))
        largest = z[0].topk(k, dim=1)
        ids[chunk] = largest.indices
        logp[chunk] = (largest.values - side.max.unsqueeze(1)) - side.norm.unsqueeze(1)
    return ids, logp


@topk_op.register_fake
def _(hidden: Tensor, lm_head: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k = rest[3]
    logp = hidden.new_empty(hidden.shape[0], k, dtype=logits_dtype([hidden]))
    return torch.empty_like(logp, dtype=torch.int64), logp


@torch.no_grad()
def topk(
    head: Head,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest log p_v of each token, p the softmax of logits / temperature over the whole vocabulary.

    `TopK(*topk(teacher, k))` is the teacher as `kl` takes it where its hidden states are not at hand. Of one GEMM pass;
    a row of logits that is no distribution gives NaN.

    Args:
        head: hidden (..., D); its vocabulary whole, not split over ranks.
        k: in 1..V.
        temperature: positive; divides the logits. A number, or (...), floating: a temperature a token.
        backend: "torch", "triton", "native" or "reference"; where omitted COPD_BACKEND, else the fastest available.
        workspace_bytes: most memory for a chunk's logits; a default for the device where omitted.

    Returns:
        (ids, logp), (..., k) each, the likeliest first (equal ones in any order): int64, and fp32 (fp64 for fp64
        inputs) in nats, without gradient.

    Raises:
        ValueError, TypeError: an argument breaks its rule. RuntimeError: the backend is not available here.
    """
    check_head("topk", "head", head)
    shape = head.hidden.shape[:-1]
    check_integer("topk", "k", k)
    check("topk", "head", not head.shard.split, "be whole, not split over ranks", head.shard)
    check("topk", "k", 1 <= k <= head.V, f"be in 1..{head.V}", k)
    counts = torch.ones(shape, dtype=torch.bool, device=head.hidden.device)
    check_temperatures("topk", temperature, counts)
    check_workspace("topk", workspace_bytes)
    name = resolve("topk", backend, head.hidden.device)
    if name == "reference":
        logp, ids = reference.log_softmax(head, reference.column(temperature, counts)).topk(k)
        return ids, logp
    flat = flatten([head])
    T = temperatures(temperature, shape, logits_dtype([head.hidden]))
    tensors = (x[0] for x in flat[:3])
    ids, logp = topk_op(*tensors, flat.numbers, T, head.V, k, name, workspace_bytes or 0)
    return ids.view(*shape, k), logp.view(*shape, k)
