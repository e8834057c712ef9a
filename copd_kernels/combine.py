"""Several teachers as one: their mixture, or the normalised geometric mean of them.

    mixture   q_v = sum_j a_j q_jv                    a_j = w_j / sum_i w_i
    product   q_v proportional to prod_j q_jv^a_j

Both are a row of logits, made of the teachers' own in a pass over them; from there on there is one teacher.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def combine_rows(z: Tensor, weight: Tensor, combine: str, rows: ModuleType) -> None:
    """Logits of the one teacher in place of the first of z (T, R, V), for weights (T, R); the others are lost."""
    total = weight.sum(0)
    silent = weight == 0
    share = torch.where(silent, 0, weight / torch.where(total == 0, 1, total))
    product = combine == "product"
    if product:
        factor, neutral = share, 0.0
    else:
        lse = torch.stack([rows.logprob(z[j : j + 1]).lse for j in range(len(z))])
        # from the largest, not from 0: logits stay as large as they were, and are rounded no more
        base = torch.where(silent, -torch.inf, lse).amax(0)
        factor, neutral = share.log() - (lse - base), -torch.inf
    for j, logits in enumerate(z):
        (logits.mul_ if product else logits.add_)(factor[j].unsqueeze(1))
        # who has no weight says nothing, whatever its logits are
        if z.is_cuda or silent[j].any():
            logits.masked_fill_(silent[j].unsqueeze(1), neutral)
        if j > 0:
            (torch.add if product else torch.logaddexp)(z[0], logits, out=z[0])
    # nobody has any weight: any distribution will do
    if z.is_cuda or silent.all(0).any():
        z[0].masked_fill_(silent.all(0).unsqueeze(1), 0)
