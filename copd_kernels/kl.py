"""Divergence of one student from several teachers, from hidden states.

One sweep over chunks of tokens: T + 1 projections, the rows, two projections back. With a scalar reduction the
gradient is made in that same sweep (T + 3 GEMM passes in all) and backward only multiplies it; per-token results are
swept again in backward, when their upstream gradient is known. Routed tokens are gathered by teacher, so each is
projected by one teacher only (4 passes whatever T is). (N, V) logits never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE
from .checks import (
    check,
    check_divergence,
    check_temperatures,
    check_token_weight,
    check_workspace,
)
from .combine import combine_rows
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
from .head import Head, check_head
from .results import KL
from .rows import load, resolve
from .schedule import Gradients, Projection, Workspace, lacking
from .sparse import Listed, Support, diverge, passes
from .teachers import Teacher, TopK, as_teachers, check_combine, check_support, check_teachers, check_weights
from .temperature import of_tokens, softcap_of, temperatures, where_they_count


@torch.library.custom_op(f"{NAMESPACE}::kl", mutates_args=())
def kl_op(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    teacher_hidden: list[Tensor],
    teacher_lm_head: list[Tensor],
    teacher_bias: list[Tensor],
    teacher_lists: list[Tensor],
    teacher_weight: Tensor,
    teacher_index: Tensor | None,
    token_weight: Tensor,
    numbers: Tensor,
    beta: Tensor,
    temperature: Tensor,
    vocab_sizes: list[int],
    shard: str,
    tails: str,
    support: str,
    combine: str,
    divergence: str,
    backend: str,
    workspace_bytes: int,
    per_token: bool,
    stats: bool,
    want: list[bool],
    alone: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token w·d (N,) or its sum (), then the sum's gradients over `unit`, then `unit`; last, with `stats`, the
    student's entropy (N,) and each teacher's mean divergence (T,), else (0,) each.

    `teacher_weight` is (T, N) or (T, 1), and (1, 1) where `teacher_index` routes. `numbers` and `vocab_sizes` are those
    of `Flat` for student and teachers, `temperature` is () or (N,). `tails` has an entry a teacher, empty for a head;
    the others' ids and log-probs are `teacher_lists`, in turn. `support` is that of `Support.text`. `alone` says that
    the caller drops the gradients, which backward may then finish where they are.
    """
    dtype = logits_dtype([hidden, *teacher_hidden])
    tensors = [hidden, *teacher_hidden], [lm_head, *teacher_lm_head], [bias, *teacher_bias]
    student, *projected = projections(Flat(*tensors, numbers, vocab_sizes, shard), temperature, dtype)
    teachers = in_order(projected, teacher_lists, tails.split(","))
    words = Support.read(support)
    # one teacher is made of all: routed tokens have only one
    as_one = combine != "mean" and teacher_index is None
    order = None
    if teacher_index is not None:
        # tokens in the order of their teachers; one without a teacher has nothing to learn
        order = torch.argsort(teacher_index, stable=True)
        token_weight = torch.where(teacher_index < 0, 0, token_weight)[order]
        temperature = temperature[order] if temperature.dim() else temperature
        student = replace(student, hidden=hidden[order])
    token_weight = token_weight.to(dtype)
    each = (teacher_weight * token_weight).to(dtype)  # (T, N); routed (1, N)
    weight = each.sum(0, keepdim=True) if as_one else each
    temperature = where_they_count(temperature, (weight != 0).any(0))
    # of the gradient: the rows know of no temperature
    gain = weight / temperature if temperature.dim() else weight
    gradients = Gradients(student, lm_head.shape[0], want, gain) if any(want) else None
    narrow = gradients.dlogits_dtype if gradients else None
    rows = load(backend, shard)
    cap = softcap_of(student, temperature)
    factor = None if gradients is None else gain * gradients.factor
    N, how = hidden.shape[0], (divergence, beta.item())
    value = torch.zeros_like(weight)  # D_jn, or that of the one made of all
    apart = torch.zeros_like(each) if stats and as_one else value  # D_jn
    entropy = weight.new_zeros(N if stats else 0)
    parts = segments(N, teachers, teacher_index)

    def plain(segment: Segment) -> bool:
        return words is None and segment.heads == 1 + len(segment.teachers)

    def room(segment: Segment) -> int:
        """A row's gradient may be a sum over teachers that are asked apart."""
        return 2 if gradients and not plain(segment) and passes(segment.teachers, words) > 1 else 0

    most = max((segment.size for segment in parts), default=0)
    heads = max((segment.heads + room(segment) for segment in parts), default=1)
    space = Workspace(most, heads, student.columns, value, workspace_bytes, narrow)

    for segment in parts:
        lacks = lacking([student, *(x for x in segment.teachers if isinstance(x, Projection))], value)
        for part in space.chunks_of(segment.size):
            chunk = slice(segment.start + part.start, segment.start + part.stop)
            z, mine, raw = space.logits(part), student.read(chunk), lacks.of_chunk(of_tokens(temperature, chunk))
            student.project(mine, z[0])
            asked: list[int | Listed] = []  # a head by its place in z
            for teacher in segment.teachers:
                # a routed teacher holds its own tokens only, so there the chunk is counted among those
                if isinstance(teacher, Listed):
                    asked.append(teacher.read(part))
                else:
                    place = 1 + sum(isinstance(other, int) for other in asked)
                    teacher.project(teacher.read(part), z[place])
                    asked.append(place)
            if as_one or not plain(segment):
                raw.complete(z, rows.complete)
            if stats:
                # before the gradient takes the student's logits' place
                own = rows.logprob(z[:1], raw=raw)
                entropy[chunk] = own.norm - own.mean
            if as_one:
                if stats:
                    diverge(z, asked, words, *how, rows, apart[:, chunk])
                combine_rows(z[1 : segment.heads], teacher_weight.expand(-1, N)[:, chunk].to(dtype), combine, rows)
                asked = [1]
            if gradients is None or factor is None:
                diverge(z, asked, words, *how, rows, value[:, chunk], raw=raw)
            else:
                dlogits = space.dlogits(part)
                its = factor[:, chunk]
                diverge(z, asked, words, *how, rows, value[:, chunk], its, cap(chunk), dlogits, raw)
                gradients.add(dlogits, mine, chunk)

    d = torch.where(weight == 0, 0, weight * value).sum(0)
    entropy = torch.where((weight != 0).any(0), entropy, 0) if stats else entropy
    told = d.new_zeros(len(teachers) if stats else 0)
    if stats:
        u = torch.where(each == 0, 0, token_weight)
        taught = torch.stack([torch.where(u == 0, 0, u * apart), u])  # (2, T, N); routed (2, 1, N)
        for segment in parts:
            total, mass = taught[..., segment.start : segment.start + segment.size].sum(-1)
            told[segment.names] = total / torch.where(mass > 0, mass, 1)
    dhidden, dlm_head, dbias = gradients.tensors(shard) if gradients else (d.new_empty(0) for _ in range(3))
    if order is not None:
        d, entropy, dhidden = (put_back(x, order) for x in (d, entropy, dhidden))
    unit = d.new_ones(()) if gradients is None else gradients.unit
    return d if per_token else d.sum(), dhidden, dlm_head, dbias, unit, entropy, told


@dataclass(frozen=True)
class Segment:
    """Tokens in a row that have the same teachers, which `names` numbers: all tokens, or those of one teacher."""

    start: int
    size: int
    teachers: list[Projection | Listed]
    names: slice

    @property
    def heads(self) -> int:
        """Those that are projected, the student with them."""
        return 1 + sum(isinstance(teacher, Projection) for teacher in self.teachers)


def put_back(x: Tensor, order: Tensor) -> Tensor:
    """x of tokens in `order` (N,), in their own; what is empty stays so."""
    return torch.empty_like(x).index_copy_(0, order, x) if x.numel() else x


def in_order(heads: list[Projection], lists: list[Tensor], tails: list[str]) -> list[Projection | Listed]:
    pairs, rest = zip(lists[::2], lists[1::2], strict=True), iter(heads)
    return [Listed(*next(pairs), tail) if tail else next(rest) for tail in tails]


def segments(N: int, teachers: list[Projection | Listed], teacher_index: Tensor | None) -> list[Segment]:
    """One segment with every teacher, or one a teacher with the tokens routed to it, after those of none."""
    if teacher_index is None:
        return [Segment(0, N, teachers, slice(None))]
    names = torch.arange(-1, len(teachers), device=teacher_index.device)
    # the one host sync: how many tokens each teacher has
    start, *counts = (teacher_index == names[:, None]).sum(1).tolist()
    result = []
    for j, (teacher, count) in enumerate(zip(teachers, counts, strict=True)):
        name = f"teachers[{j}].{'ids' if isinstance(teacher, Listed) else 'hidden'}"
        check("kl", name, count == teacher.N, f"hold the {count} tokens routed to it", f"{teacher.N} rows")
        result.append(Segment(start, count, [teacher], slice(j, j + 1)))
        start += count
    return result


@kl_op.register_fake
def _(  # type: ignore[no-untyped-def]  # the types are those of kl_op
    hidden, lm_head, bias, teacher_hidden, teacher_lm_head, teacher_bias, teacher_lists, teacher_weight,
    teacher_index, token_weight, numbers, beta, temperature, vocab_sizes, shard, tails, support, combine,
    divergence, backend, workspace_bytes, per_token, stats, want, alone,
):  # fmt: skip
    dtype = logits_dtype([hidden, *teacher_hidden])
    result = hidden.new_empty(hidden.shape[:1] if per_token else (), dtype=dtype)
    unit = hidden.new_empty((), dtype=dtype)
    sizes = (hidden.shape[0], len(tails.split(","))) if stats else (0, 0)
    return result, *fake_gradients(hidden, lm_head, want, dtype), unit, *(unit.new_empty(n) for n in sizes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, lists, weights, rest = inputs[:3], inputs[3:7], inputs[7:13], inputs[13:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype, ctx.sizes = inputs[0].dtype, [len(tensors) for tensors in lists]
    *ctx.rest, ctx.per_token, _, _, ctx.alone = rest
    if ctx.per_token:
        save(ctx, *student, *weights, *(x for tensors in lists for x in tensors))
    else:
        save(ctx, *output[1:5])


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Any, ...]:
    nothing = ([None] * size for size in ctx.sizes)
    student: list[Tensor | None] = [None] * 3
    needs = ctx.needs_input_grad[:3]
    if upstream is not None:
        kept = saved(ctx)
        if ctx.per_token:
            *weights, token_weight, numbers, beta, temperature = kept[3:9]
            rest = iter(kept[9:])
            lists = [[*islice(rest, size)] for size in ctx.sizes]
            weights.append(torch.where(token_weight == 0, 0, token_weight * upstream))
            constants = (numbers, beta, temperature, *ctx.rest)
            _, *gradients, unit, _, _ = kl_op(*kept[:3], *lists, *weights, *constants, False, False, list(needs), True)
        else:
            *gradients, unit = kept
            unit = unit * upstream
        student = [
            finish(g, unit, ctx.dtype, ctx.alone) if need else None for g, need in zip(gradients, needs, strict=True)
        ]
    return *student, *nothing, *[None] * 18


kl_op.register_autograd(_backward, setup_context=_save)


@overload
def kl(
    student: Head, teachers: Teacher | Sequence[Teacher], *, divergence: str = ..., beta: float = ...,
    support: str | None = ..., k: int | None = ..., tail: str = ..., combine: str = ...,
    temperature: float | Tensor = ..., teacher_weight: Tensor | None = ..., teacher_index: Tensor | None = ...,
    token_weight: Tensor | None = ..., reduction: str = ..., stats: Literal[False] = ..., backend: str | None = ...,
    workspace_bytes: int | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def kl(
    student: Head, teachers: Teacher | Sequence[Teacher], *, divergence: str = ..., beta: float = ...,
    support: str | None = ..., k: int | None = ..., tail: str = ..., combine: str = ...,
    temperature: float | Tensor = ..., teacher_weight: Tensor | None = ..., teacher_index: Tensor | None = ...,
    token_weight: Tensor | None = ..., reduction: str = ..., stats: Literal[True], backend: str | None = ...,
    workspace_bytes: int | None = ...,
) -> KL: ...  # fmt: skip


def kl(
    student: Head,
    teachers: Teacher | Sequence[Teacher],
    *,
    divergence: str = "reverse",
    beta: float = 0.5,
    support: str | None = None,
    k: int | None = None,
    tail: str = "bucket",
    combine: str = "mean",
    temperature: float | Tensor = 1.0,
    teacher_weight: Tensor | None = None,
    teacher_index: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    stats: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> Tensor | KL:
    """Weighted divergence of a student from its teachers: d_n = sum_j w_jn D(student_n, teacher_jn), in nats.

    With p the student's and q a teacher's softmax over the vocabulary, both of logits / temperature:

        reverse    KL(p || q) = sum_v p_v log(p_v / q_v)
        forward    KL(q || p) = sum_v q_v log(q_v / p_v)
        symmetric  their sum, not halved
        jsd        beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

    `combine` makes one teacher of several, of weights a_jn = w_jn / W_n with W_n = sum_j w_jn:

        mean       d_n = sum_j w_jn D(p, q_j)
        mixture    d_n = W_n D(p, m),   m = sum_j a_jn q_j
        product    d_n = W_n D(p, m),   m the normalised geometric mean, proportional to prod_j q_j^a_jn

    A `TopK` teacher is compared as its `tail` says, and costs no projection. With `support` heads are compared in the
    same way on the k likeliest words of the student, or of each teacher, `tail` said here.

    The loss is not rescaled by temperature². A token of zero weight contributes exactly nothing, even if its hidden
    states are NaN; a word of zero mass on both sides contributes 0, on the teacher's side alone +inf to `reverse`. A
    row of logits that is no distribution (a NaN, an infinite logit, no mass) makes its token NaN, gradient included.
    Source: arXiv 2604.27083, section 3 (on-policy distillation at vocabulary level).

    Args:
        student: hidden (..., D).
        teachers: one or T of heads over the same vocabulary, hidden (..., D_j), and `TopK`s, (..., k_j); no gradient
            reaches them.
        divergence: one of the four above.
        beta: in (0, 1), of `jsd` only.
        support: None, the whole vocabulary; "student", not with a `TopK`; "teacher".
        k: in 1..V, with a support.
        tail: "bucket", "renormalise" or "ignore", as in `TopK`; of a support only.
        combine: one of the three above; "mean" with a `TopK`. Teachers without mass in common have no product: NaN.
        temperature: positive; divides all logits. A number, that of every `TopK`; or without any (...), floating: a
            temperature a token.
        teacher_weight: (T,) or (T, ...), floating, finite: w, 1 / T each where omitted; >= 0 for one combined teacher.
        teacher_index: (...), int64 in -1..T-1: token n has the one teacher `teacher_index[n]`, none where it is -1;
            teacher j's hidden is then (count of j, D_j), its own tokens in order. Stops the host once on CUDA.
        token_weight: (...), floating or bool, >= 0: a mask or per-token weights u; 1 where omitted.
        reduction: "mean" sum_n u_n d_n / sum_n u_n (0 if that is 0), "sum" sum_n u_n d_n, "none" u_n d_n.
        stats: return a `KL` of loss, the student's entropy (...) and each teacher's mean divergence (T,), without
            gradient, from the same sweep: one pass more over the student's rows, no GEMM pass.
        backend: "torch", "triton", "native" or "reference"; where omitted COPD_BACKEND, else the fastest available.
        workspace_bytes: most memory for a chunk's logits; a default for the device where omitted.

    Returns:
        () or (...), fp32 (fp64 if any head is), differentiable in the student's hidden, lm_head and bias; with `stats`
        the `loss` of a `KL`.

    Raises:
        ValueError, TypeError: an argument breaks its rule. Values (weights >= 0, index in range) are checked on the
        CPU; on CUDA under COPD_DEBUG=1 only. RuntimeError: the backend is not available here.
    """
    teachers = as_teachers("kl", teachers)
    check_divergence("kl", divergence, beta)
    check("kl", "reduction", reduction in ("mean", "sum", "none"), "be mean, sum or none", repr(reduction))
    check_head("kl", "student", student)
    check_support("kl", support, k, tail, student, teachers)
    check_combine("kl", combine, teachers)
    shape, device, T = student.hidden.shape[:-1], student.hidden.device, len(teachers)
    heads = [teacher for teacher in teachers if isinstance(teacher, Head)]
    dtype = logits_dtype([student.hidden, *(head.hidden for head in heads)])
    token_weight = check_token_weight("kl", token_weight, shape, device, dtype)
    check_temperatures("kl", temperature, token_weight != 0)
    if teacher_index is None:
        teacher_weight = check_weights("kl", teacher_weight, T, shape, dtype, device, combine)
    else:
        fix = "put the weight into token_weight"
        check("kl", "teacher_weight", teacher_weight is None, "be None with teacher_index", "a tensor", fix)
    check_teachers("kl", student, teachers, teacher_index, temperature, token_weight)
    check_workspace("kl", workspace_bytes)

    name = resolve("kl", backend, device, student.shard.split, 1 + T, T if teacher_index is None else 1)
    if name == "reference":
        if teacher_weight is not None:
            wide = (T, *[1] * len(shape)) if teacher_weight.dim() == 1 else teacher_weight.shape
            teacher_weight = teacher_weight.reshape(wide).expand(T, *shape)
        results = reference.kl(
            student,
            teachers,
            divergence=divergence,
            beta=beta,
            support=support,
            k=k,
            tail=tail,
            combine=combine,
            temperature=temperature,
            teacher_weight=teacher_weight,
            teacher_index=teacher_index,
            token_weight=token_weight,
            reduction=reduction,
        )
        return results if stats else results.loss
    flat = flatten([student, *(head.detach() for head in heads)])
    lists = [teacher for teacher in teachers if isinstance(teacher, TopK)]
    teacher_weight = token_weight.new_ones(1, 1) if teacher_weight is None else teacher_weight.reshape(T, -1)
    outputs = kl_op(
        *(tensors[0] for tensors in flat[:3]),
        *(tensors[1:] for tensors in flat[:3]),
        [x.detach().reshape(-1, x.shape[-1]) for teacher in lists for x in (teacher.ids, teacher.logp)],
        teacher_weight,
        None if teacher_index is None else teacher_index.reshape(-1),
        token_weight.reshape(-1),
        flat.numbers,
        number(beta),
        temperatures(temperature, shape, dtype),
        flat.vocab_size,
        flat.shard,
        ",".join(teacher.tail if isinstance(teacher, TopK) else "" for teacher in teachers),
        "" if support is None or k is None else Support(support, k, tail).text,
        combine,
        divergence,
        name,
        workspace_bytes or 0,
        reduction == "none",
        stats,
        wanted(student) if reduction != "none" else [False] * 3,
        True,
    )
    result, *_, entropy, teacher_kl = outputs
    if reduction == "none":
        result = result.view(shape)
    elif reduction == "mean":
        total = token_weight.sum()
        result = result / torch.where(total > 0, total, 1)
    return KL(result, entropy.view(shape), teacher_kl) if stats else result
