"""The likeliest words of each token: what a teacher says where no more of it is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check, check_integer, check_workspace
from .flatten import flatten, logits_dtype, number, projections
from .head import Head
from .rows import torch as rows
from .schedule import Workspace


@torch.no_grad()
def top_k(head: Head, k: int, *, workspace_bytes: int | None = None) -> Tensor:
    """The k words of largest logit, of which `agreement` counts how many two heads have in common.

    Args:
        head: hidden (..., D); its vocabulary whole, not split over ranks.
        k: in 1..V.
        workspace_bytes: most memory for a chunk's logits; a default for the device where omitted.

    Returns:
        (..., k) int64 ids, in no order. Among equal logits at the boundary the lowest ids; any where one is NaN.

    Raises:
        ValueError, TypeError: an argument breaks its rule.
    """
    check_integer("top_k", "k", k)
    check("top_k", "k", 1 <= k <= head.V, f"be in 1..{head.V}", k)
    check_workspace("top_k", workspace_bytes)
    flat = flatten([head])
    check("top_k", "lm_head", not flat.shard, "be whole, not split over ranks", flat.shard)
    hidden, dtype = flat.hidden[0], logits_dtype(flat.hidden)
    (projection,) = projections(flat, number(1.0), dtype)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    like = hidden.new_empty(0, dtype=dtype)
    space = Workspace(len(hidden), 1, head.V, like, workspace_bytes or 0)
    for chunk in space.chunks:
        (z,) = space.logits(chunk)
        projection.project(projection.read(chunk, None), z, rows)
        ids[chunk] = rows.top_k(z, k).to(torch.uint8).topk(k).indices
    return ids.view(*head.hidden.shape[:-1], k)
