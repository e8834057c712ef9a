"""Divergences on a few words of each row: of teachers that name k words, or of heads on the words one of them likes.

With S the words, the student's row becomes k + 1 logits that hold all there is to know of it,

    u = (z_v for v in S, log sum_{v not in S} exp z_v)            softmax(u) = (p_v for v in S, the mass of the rest)

the teacher's likewise, and their divergence is that of two short rows, in fp64. Its gradient g goes back as g_v to each
word of S and as g_rest exp(z_v - u_rest) to the others: a row pass each way, by the backend's `logprob`, whose row has
S taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .rows import torch as plain
from .rows.raw import COMPLETE, Raw
from .rows.stats import Side


@dataclass(frozen=True)
class Listed:
    """A teacher that names k words of each of its tokens."""

    ids: Tensor  # (N, k)
    logp: Tensor  # (N, k)
    tail: str

    @property
    def N(self) -> int:
        return self.ids.shape[0]

    @property
    def absent(self) -> Tensor:
        """(N, k): entries that name no word."""
        return self.logp == -torch.inf

    def likeliest(self, x: Tensor) -> Tensor:
        """(N, 1): that of x (N, k) which belongs to the likeliest word."""
        return x.gather(1, self.logp.argmax(1, keepdim=True))

    def read(self, chunk: slice) -> Listed:
        return Listed(self.ids[chunk], self.logp[chunk], self.tail)

    def read_out(self, log_p_rest: Tensor, V: int) -> Tensor:
        """(N, k + 1) log-probs in fp64, of the rest too; an id out of range makes its row NaN."""
        log_q = reference.with_rest(self.logp.double(), self.logp.dtype, log_p_rest, V)
        unknown = ((self.ids < 0) | (self.ids >= V)) & ~self.absent
        log_q[:, :-1].masked_fill_(unknown, torch.nan)
        return log_q


class Support(NamedTuple):
    """The k likeliest words of a head."""

    of: str
    k: int
    tail: str

    @classmethod
    def read(cls, text: str) -> Support | None:
        """From `text`, as operators take it."""
        if not text:
            return None
        of, k, tail = text.split()
        return cls(of, int(k), tail)

    @property
    def text(self) -> str:
        return f"{self.of} {self.k} {self.tail}"


class Part(NamedTuple):
    """Words of each token, and teachers who speak of them: heads, or one list."""

    teachers: list[int]  # their numbers
    ids: Tensor  # (R, k)
    tail: str
    places: list[int]  # of heads in z
    listed: Listed | None = None


def parts_of(z: Tensor, teachers: list[int | Listed], support: Support | None) -> list[Part]:
    """Each list is a part; heads are one where they are asked about the student's words, else one each."""
    parts = []
    heads = {j: teacher for j, teacher in enumerate(teachers) if isinstance(teacher, int)}
    if support is not None and heads:
        asked = {0: [*heads]} if support.of == "student" else {place: [j] for j, place in heads.items()}
        for source, names in asked.items():
            ids = z[source].topk(support.k, dim=1).indices
            parts.append(Part(names, ids, support.tail, [heads[j] for j in names]))
    for j, teacher in enumerate(teachers):
        if isinstance(teacher, Listed):
            # an entry that is absent becomes the likeliest one's double, so that what is written to its word is right
            ids = torch.where(teacher.absent, teacher.likeliest(teacher.ids), teacher.ids)
            parts.append(Part([j], ids.clamp(0, z.shape[2] - 1), teacher.tail, [], teacher))
    return parts


def passes(teachers: Sequence[object], support: Support | None) -> int:
    """How many gradients a row's is the sum of."""
    lists = sum(isinstance(teacher, Listed) for teacher in teachers)
    heads = len(teachers) - lists
    return lists + (heads if support is not None and support.of == "teacher" else min(heads, 1))


def diverge(
    z: Tensor,
    teachers: list[int | Listed],
    support: Support | None,
    divergence: str,
    beta: float,
    rows: Any,
    out: Tensor,
    weight: Tensor | None = None,
    cap: float | Tensor | None = None,
    dlogits: Tensor | None = None,
    raw: Raw = COMPLETE,
) -> None:
    """`rows.kl` of the first head of z, for teachers that are heads or lists: out (T, R), and the gradient's dlogits.

    Logits are complete, but where all teachers are heads and asked about every word. With more than one of `passes` the
    last two heads of z are room for their sum.
    """
    heads = [j for j, teacher in enumerate(teachers) if isinstance(teacher, int)]
    places = [teacher for teacher in teachers if isinstance(teacher, int)]
    if support is None and len(places) == len(teachers):
        rows.kl(z, 0, places, divergence, beta, weight, cap, dlogits, out, raw)
        return
    several = passes(teachers, support) > 1
    total, room = (z[-2], z[-1]) if several and dlogits is not None else (dlogits, dlogits)
    started = support is None and len(places) > 0
    if started:
        w = None if weight is None else weight[heads]
        out[heads] = rows.kl(z, 0, places, divergence, beta, w, cap, total)
    for part in parts_of(z, teachers, support):
        w = None if weight is None else weight[part.teachers]
        its = room if started else total
        out[part.teachers] = on_part(part, z, divergence, beta, rows, w, cap, its, keep=several).to(z.dtype)
        if started and total is not None and room is not None:
            total.add_(room)
        started = True
    if several and total is not None and dlogits is not None:
        dlogits.copy_(total)


def on_part(
    part: Part,
    z: Tensor,
    divergence: str,
    beta: float,
    rows: Any,
    weight: Tensor | None,
    cap: float | Tensor | None,
    dlogits: Tensor | None,
    keep: bool,
) -> Tensor:
    """(J, R) of the part's J teachers; with `keep` the student's logits are afterwards what they were."""
    inside, rest, u = take_out(z[:1], part.ids, rows)
    said = []
    for place in part.places:
        theirs, _, log_q = take_out(z[place : place + 1], part.ids, rows)
        z[place].scatter_(1, part.ids, theirs)
        said.append(log_q)
    if part.listed is not None:
        u[:, :-1].masked_fill_(part.listed.absent, -torch.inf)
        said.append(part.listed.read_out(u[:, -1], z.shape[2]))
    value, g = short_rows(u, said, part.tail, divergence, beta, weight)
    if g is not None and dlogits is not None:
        inner, outer = g[:, :-1], g[:, -1].to(z.dtype)
        if cap is not None:
            inner = inner * (1 - (inside / (column(cap) if isinstance(cap, Tensor) else cap)).double().square())
        if part.listed is not None:
            inner = torch.where(part.listed.absent, part.listed.likeliest(inner), inner)
        none = torch.zeros_like(outer)
        rows.logprob_grad(z[:1], rest, part.ids[:, 0], none, none, outer, cap, dlogits)
        dlogits.scatter_(1, part.ids, inner.to(dlogits.dtype))
    if keep:
        z[0].scatter_(1, part.ids, inside)
    return value


def take_out(z: Tensor, ids: Tensor, rows: Any) -> tuple[Tensor, Side, Tensor]:
    """Logits (R, k) at `ids`, which become -inf in z (1, R, V); the others' statistics; u (R, k + 1) in fp64."""
    inside = z[0].gather(1, ids)
    z[0].scatter_(1, ids, -torch.inf)
    rest = rows.logprob(z)
    lse, empty = rest.lse, rest.max == -torch.inf
    if z.is_cuda or empty.any():
        # nothing is left, or it is NaN
        lse = torch.where(empty, z[0].amax(1), lse)
    return inside, rest, torch.cat([inside, column(lse)], 1).double()


def short_rows(
    u: Tensor, said: list[Tensor], tail: str, divergence: str, beta: float, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(J, R) divergences of softmax(u) (R, k + 1) from J teachers', and the weighted sum's gradient by u."""
    w = None if weight is None else weight.double()
    g = None if w is None else torch.zeros_like(u)
    if tail == "ignore":
        log_p, *others = (reference.normalise(x)[0] for x in (u, *said))
        value = torch.stack([reference.diverge_on(log_p, log_q, tail, divergence, beta) for log_q in others])
        if g is not None and w is not None:
            for log_q, its in zip(others, w, strict=True):
                by_word = slope(log_p[:, :-1], log_q[:, :-1], divergence, beta)
                by_logit = -log_p.exp() * by_word.sum(1, keepdim=True)
                by_logit[:, :-1] += by_word
                g += torch.where(column(its) == 0, 0, column(its) * by_logit)
        return value, g
    words = slice(None) if tail == "bucket" else slice(-1)
    z = torch.stack([u, *said])[..., words].contiguous()
    out = None if g is None else torch.empty_like(z[0])
    value = plain.kl(z, 0, [*range(1, len(z))], divergence, beta, w, None, out)
    if g is not None and out is not None:
        g[:, words] = out
    return value, g


def slope(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """p_v times the derivative by p_v of sum_v f(p_v, q_v), whatever p sums to."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "jsd":
        to_student, _ = reference.mixture_ratios(log_p, log_q, beta)
        return torch.where(p == 0, 0, (1 - beta) * p * to_student)
    reverse = torch.where(p == 0, 0, p * (log_p - log_q + 1))
    return {"reverse": reverse, "forward": -q, "symmetric": reverse - q}[divergence]


def column(row_values: Tensor) -> Tensor:
    return row_values.unsqueeze(1)
