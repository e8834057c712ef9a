"""What may teach in `kl`: heads, and lists of the likeliest tokens; how they are weighted or routed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check,
    check_integer,
    check_integers,
    check_number,
    check_option,
    check_tensor,
    check_type,
    check_values,
    values_are_checked,
)
from .head import Head, check_head, check_same_vocabulary

TAILS = ("bucket", "renormalise", "ignore")
COMBINE = ("mean", "mixture", "product")
# how far above its limit a log-prob or the sum of probabilities may be by rounding, in units of its dtype
ROUNDING = 64


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher known by the log-probs of k tokens at each position, as a server or `topk` gives them.

    S are a row's tokens, q theirs by `logp`, 1 - sum_S q the teacher's mass of the rest; p is the student's softmax
    over the whole vocabulary. `tail` says what a divergence compares:

        bucket       (p_v for v in S, 1 - sum_S p)  with  (q_v for v in S, 1 - sum_S q): at most the full divergence
        renormalise  p_v / sum_S p  with  q_v / sum_S q: what is conditional on S
        ignore       the words of S alone, in the sums of the full divergence: forward sum_S q_v log(q_v / p_v)

    The rest is no less than what `logp`'s dtype resolves (2.4e-7 in fp32), unless the student has no mass there. As in
    verl and TRL (SDPO, SDFT, server distillation).

    Args:
        ids: (..., k), int64, each in 0..V-1, none twice in a row.
        logp: (..., k), floating: log-probs, each at most 0, their probabilities' sum at most 1. -inf marks an entry
            that is absent (rows of unequal length): its id is not read.
        tail: one of the three above.
        temperature: at which the teacher's logits were made log-probs; `kl` must be called with it.

    Raises:
        ValueError: shape, device or option. TypeError: dtype. Values are checked by `kl`, which knows what is masked.
    """

    ids: Tensor
    logp: Tensor
    tail: str = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        ids, logp = self.ids, self.logp
        check_tensor("TopK", "ids", ids)
        check_tensor("TopK", "logp", logp)
        check_type("TopK", "ids", ids.dtype == torch.int64, "be int64", ids.dtype)
        check_type("TopK", "logp", logp.is_floating_point(), "be floating", logp.dtype)
        check("TopK", "ids", ids.dim() >= 1 and ids.shape[-1] >= 1, "have shape (..., k)", tuple(ids.shape))
        check("TopK", "logp", logp.shape == ids.shape, f"have ids' shape {tuple(ids.shape)}", tuple(logp.shape))
        check("TopK", "logp", logp.device == ids.device, f"be on ids' device {ids.device}", logp.device)
        check_option("TopK", "tail", self.tail, TAILS)
        check_number("TopK", "temperature", self.temperature)


Teacher = Head | TopK


def as_teachers(op: str, got: Any) -> list[Teacher]:
    """One teacher or several, as a list of them."""
    if isinstance(got, (Head, TopK)):
        return [got]
    check_type(
        op, "teachers", isinstance(got, (list, tuple)), "be a Head, a TopK or a list of them", type(got).__name__
    )
    for j, teacher in enumerate(got):
        if not isinstance(teacher, TopK):
            check_head(op, f"teachers[{j}]", teacher)
    check(op, "teachers", len(got) > 0, "not be empty", got)
    return list(got)


def positions(teacher: Teacher) -> tuple[int, ...]:
    """Shape of the tokens it speaks of."""
    return tuple((teacher.ids if isinstance(teacher, TopK) else teacher.hidden).shape[:-1])


def check_teachers(
    op: str,
    student: Head,
    teachers: list[Teacher],
    teacher_index: Tensor | None,
    temperature: float | Tensor,
    token_weight: Tensor,
) -> None:
    heads = {f"teachers[{j}]": t for j, t in enumerate(teachers) if isinstance(t, Head)}
    check_same_vocabulary(op, "student", student, heads)
    shape, device, T = student.hidden.shape[:-1], student.hidden.device, len(teachers)
    if teacher_index is not None:
        check_integers(op, "teacher_index", teacher_index, shape, device)
        in_range = f"be in -1..{T - 1}"
        check_values(op, "teacher_index", teacher_index, lambda i: (i >= -1) & (i < T), in_range)
    for j, teacher in enumerate(teachers):
        listed = isinstance(teacher, TopK)
        name, last, got = f"teachers[{j}].{'ids' if listed else 'hidden'}", "k" if listed else "D", positions(teacher)
        if teacher_index is None:
            check(op, name, got == shape, f"have shape (*{tuple(shape)}, {last})", got)
        else:
            check(op, name, len(got) == 1, f"have shape (tokens routed to it, {last})", got)
        if isinstance(teacher, TopK):
            check_same_temperature(op, f"teachers[{j}]", teacher, temperature)
            check(op, name, teacher.ids.device == device, f"be on {device}", teacher.ids.device)
            if values_are_checked(teacher.ids):
                counts = token_weight if teacher_index is None else token_weight[teacher_index == j]
                rule = f"hold the {len(counts)} tokens routed to it"
                check(op, name, got == counts.shape, rule, f"{got[0]} rows")
                check_list(op, f"teachers[{j}]", teacher, student.V, counts != 0)


def check_same_temperature(op: str, name: str, teacher: TopK, temperature: float | Tensor) -> None:
    one = not isinstance(temperature, Tensor) or temperature.numel() == 1
    if not one or not bool(temperature == teacher.temperature):
        # worded only now: in a trace numbers that vary are no text
        rule, got = f"be that of {name}, {teacher.temperature}", temperature if one else "one a token"
        check(op, "temperature", False, rule, got, "its log-probs cannot be made those of another")


def check_list(op: str, name: str, teacher: TopK, V: int, counts: Tensor) -> None:
    """Values at the tokens that count; NaN log-probs pass, and come out."""
    ids, logp = teacher.ids[counts], teacher.logp[counts]
    present = logp != -torch.inf
    check_values(op, f"{name}.ids", ids[present], lambda i: (i >= 0) & (i < V), f"be in 0..{V - 1}")
    # an absent entry is unlike any other
    apart = torch.where(present, ids, -1 - torch.arange(ids.shape[-1], device=ids.device)).sort(-1).values
    check_values(
        op,
        f"{name}.ids",
        apart[..., 1:],
        lambda i: i != apart[..., :-1],
        "name no token twice in a row",
    )
    room = ROUNDING * torch.finfo(logp.dtype).eps
    check_values(op, f"{name}.logp", logp, lambda x: ~(x > room), "be at most 0")
    total = logp.double().exp().sum(-1)
    check_values(op, f"{name}.logp", total, lambda x: ~(x > 1 + room), "be log-probs of at most 1 in all")


def check_weights(
    op: str, weight: Tensor | None, T: int, shape: torch.Size, dtype: torch.dtype, device: torch.device, combine: str
) -> Tensor:
    """The checked teacher weights in `dtype`; 1 / T each where there are none."""
    if weight is None:
        return torch.full((T,), 1 / T, dtype=dtype, device=device)
    check_tensor(op, "teacher_weight", weight)
    got = tuple(weight.shape)
    check(op, "teacher_weight", got in ((T,), (T, *shape)), f"have shape ({T},) or {(T, *shape)}", got)
    check_type(op, "teacher_weight", weight.is_floating_point(), "be floating", weight.dtype)
    check(op, "teacher_weight", weight.device == device, f"be on {device}", weight.device)
    if combine != "mean":
        check_values(op, "teacher_weight", weight, lambda w: w >= 0, f"be >= 0 for a {combine}")
    return weight.detach().to(dtype)


def check_support(
    op: str, support: str | None, k: int | None, tail: str, student: Head, teachers: list[Teacher]
) -> None:
    V = student.V
    listed = any(isinstance(teacher, TopK) for teacher in teachers)
    if student.shard.split:
        fix = "a few words of such a vocabulary are not compared"
        check(op, "student", support is None and not listed, "be whole, not split over ranks", student.shard, fix)
    check_option(op, "tail", tail, TAILS)
    if support is None:
        check(op, "k", k is None, "be None without a support", k)
        return
    check_option(op, "support", support, ("student", "teacher"))
    check_integer(op, "k", k)
    check(op, "k", k is not None and 1 <= k <= V, f"be in 1..{V}", k)
    fix = "a list says nothing of the student's words"
    check(op, "support", support == "teacher" or not listed, "be None or 'teacher' with a TopK", repr(support), fix)


def check_combine(op: str, combine: str, teachers: list[Teacher]) -> None:
    check_option(op, "combine", combine, COMBINE)
    listed = any(isinstance(teacher, TopK) for teacher in teachers)
    check(op, "combine", combine == "mean" or not listed, "be 'mean' with a TopK teacher", repr(combine))
