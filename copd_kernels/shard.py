"""A vocabulary split over ranks: what travels between them, and how it is said.

    Head(hidden, lm_head)      lm_head a DTensor Shard(0), hidden a DTensor Replicate(), on one mesh of one dimension

Every rank projects the same tokens onto its own rows of lm_head. Student and teachers are split alike, so the logits
that `Side` compares lie on one rank, and a row's statistics are five numbers a rank and side: gathered once a chunk and
merged in the order of ranks, the same bits on all of them. dhidden is summed once an op, before it is rounded to
hidden's dtype; dlm_head and dbias stay where they are. Ranks must call an op together, with equal tokens and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check, check_type, is_dtensor
from .rows.stats import Side, merge

UNSHARDED = "read lm_head where FSDP has it whole: in the forward, by through_head, or in the model's window"


@dataclass(frozen=True)
class Shard:
    """This rank's tokens of the vocabulary: those from id `first` on.

    All ranks make `columns` logits a row, so that their chunks are equally high; those that are no tokens are -inf.
    """

    group: str = ""
    """name of the process group; empty where the vocabulary is whole, as the other fields then are"""
    first: int = 0
    columns: int = 0

    @property
    def split(self) -> bool:
        return self.group != ""

    @classmethod
    def of(cls, lm_head: Tensor) -> Shard:
        if not is_dtensor(lm_head):
            return WHOLE
        split: Any = lm_head
        mesh, rows = split.device_mesh, lm_head.shape[0]
        columns = -(-rows // mesh.size())
        return cls(mesh.get_group().group_name, min(mesh.get_local_rank() * columns, rows), columns)

    @classmethod
    def read(cls, text: str) -> Shard:
        """From `text`, as operators take it."""
        first, columns, group = text.split(":", 2) if text else (0, 0, "")
        return cls(group, int(first), int(columns))

    @property
    def text(self) -> str:
        return f"{self.first}:{self.columns}:{self.group}" if self.split else ""

    @property
    def process_group(self) -> dist.ProcessGroup:
        # an operator can be given the name alone; functional collectives find their group so too
        find: Any = dist.distributed_c10d._resolve_process_group
        group: dist.ProcessGroup = find(self.group)
        return group

    def tokens(self, V: int) -> int:
        """How many of V tokens are mine."""
        return max(0, min(V - self.first, self.columns)) if self.split else V

    def gather(self, x: Tensor) -> Tensor:
        """(P, ...): every rank's x, in their order."""
        group = self.process_group
        parts = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=group)
        return parts

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, in their order."""
        return self.gather(x).sum(0)

    def add_up(self, x: Tensor) -> Tensor:
        """x, which becomes the sum over ranks; identical on all of them, as every collective leaves it."""
        if self.split and x.numel():
            dist.all_reduce(x, group=self.process_group)
        return x

    def exchange(self, *fields: Tensor) -> list[Tensor]:
        """Each (..., R) becomes (..., R, P), ranks last, by one collective; int64 ones are columns and become ids."""
        R, number = fields[0].shape[-1], fields[0].dtype
        bits = torch.int32 if number == torch.float32 else torch.int64
        packed = [(x + self.first).to(bits).view(number) if x.dtype == torch.int64 else x for x in fields]
        packed = [x.reshape(-1, R) for x in packed]
        parts = self.gather(torch.cat(packed)).movedim(0, -1).split([len(x) for x in packed])
        parts = [part.reshape(*x.shape, -1) for part, x in zip(parts, fields, strict=True)]
        integers = [x.dtype == torch.int64 for x in fields]
        return [part.view(bits).long() if i else part for part, i in zip(parts, integers, strict=True)]

    def merged(self, *sides: Side) -> list[Side]:
        """Statistics of my columns become those of whole rows."""
        parts = self.exchange(*(x for side in sides for x in side))
        return [merge(Side(*parts[i : i + 5])).distribution() for i in range(0, len(parts), 5)]

    def in_columns(self, side: Side) -> Side:
        """Its top tokens counted from my first column."""
        return side._replace(top=side.top - self.first)

    def whole(self, side: Side, logits: Tensor, tokens: Tensor | None) -> Side:
        """Statistics of my columns become those of whole rows, beside no other; `cross` the logit of the token."""
        side = side._replace(cross=torch.full_like(side.max, -torch.inf))
        if tokens is not None:
            column, V = tokens - self.first, logits.shape[1]
            logit = logits.gather(1, column.clamp(0, V - 1).unsqueeze(1)).squeeze(1)
            side = side._replace(cross=torch.where((column >= 0) & (column < V), logit, side.cross))
        largest, top, tail, logit, moment = self.exchange(*side)
        whole = merge(Side(largest, top, tail, torch.zeros_like(largest), moment)).distribution()
        return whole._replace(cross=logit.amax(-1))

    def largest(self, values: Tensor, columns: Tensor, k: int) -> Tensor:
        """(H, R, k) ids of the k largest logits, from (H, k or fewer, R) of each rank, the lower id first among equals.

        Columns that are no tokens come after all tokens, so that a token without mass is before them.
        """
        values, ids = (x.permute(0, 2, 3, 1).flatten(2) for x in self.exchange(values, columns))
        return ids.gather(2, values.sort(dim=2, descending=True, stable=True).indices[..., :k])


WHOLE = Shard()


def check_split(hidden: Tensor, lm_head: Tensor, bias: Tensor | None) -> None:
    """A head that is split over ranks by its tokens, or one of plain tensors."""
    if not is_dtensor(lm_head):
        for name, x in (("hidden", hidden), ("bias", bias)):
            check_type("Head", name, not is_dtensor(x), "be a plain tensor, as lm_head is", "a DTensor")
        return
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Split

    split: Any = lm_head
    if split.placements != (Split(0),):
        rule = "be split by its rows over one dimension of a mesh, [Shard(0)]"
        check("Head", "lm_head", False, rule, list(split.placements), UNSHARDED)
    tensors: Any = (("hidden", hidden, Replicate()), ("bias", bias, Split(0)))
    for name, x, placement in tensors:
        rule = f"be a DTensor {[placement]} over lm_head's mesh"
        if x is not None and not is_dtensor(x):
            # sharded by FSDP, lm_head looks just so, and every rank has tokens of its own
            check_type("Head", name, False, rule, "a plain tensor", UNSHARDED)
        if x is not None and (x.placements != (placement,) or x.device_mesh != split.device_mesh):
            check("Head", name, False, rule, f"{list(x.placements)} over {x.device_mesh}")
    shard, mine = Shard.of(lm_head), split.to_local().shape[0]
    want = shard.tokens(lm_head.shape[0])
    check("Head", "lm_head", mine == want, f"have {want} of its {lm_head.shape[0]} rows on this rank", mine)
