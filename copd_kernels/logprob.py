"""Log-probability of the sampled token, entropy and logsumexp, from hidden states.

Forward is one sweep over chunks of tokens and one GEMM pass; backward sweeps again, with each token's upstream
gradients and statistics at hand: one pass each for dhidden and dlm_head. Where all logits fit one workspace they are
kept for it; otherwise (N, V) logits never exist, and a chunk's are made again by one pass more.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE
from .checks import check, check_integer, check_integers, check_temperatures, check_values, check_workspace
from .flatten import Flat, fake_gradients, flatten, freed, logits_dtype, projections, save, saved, scale, wanted
from .head import Head, check_head
from .pages import in_huge_pages
from .results import LogProb, LogProbStats
from .rows import load, resolve
from .rows.raw import COMPLETE
from .rows.stats import Side
from .rows.stats import logprob as logprob_from
from .rows.torch import spread
from .schedule import Gradients, Projection, Workspace, empty_logits, keeps_logits, lacking
from .shard import Shard
from .temperature import of_tokens, softcap_of, temperatures, where_they_count


@torch.library.custom_op(f"{NAMESPACE}::logprob", mutates_args=())
def logprob_op(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    tokens: Tensor,
    numbers: Tensor,
    temperature: Tensor,
    vocab_size: int,
    shard: str,
    ignore_index: int,
    backend: str,
    workspace_bytes: int,
    recompute: bool,
    stats: bool,
    alone: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), (N,) each, then what is kept for backward: logits (N, V) or (0, V), each row's statistics
    (4, N) and its top token (N,); then is_top1, mean_logits and log_sum_sq_probs, (N,) each with `stats` or (0,).
    `numbers` is the head's scale and softcap, `temperature` () or (N,). `alone` says that the caller drops the logits,
    which backward may then write over."""
    head = single(hidden, lm_head, bias, numbers, vocab_size, shard, temperature)
    rows, keep = load(backend, shard), tokens != ignore_index
    temperature = where_they_count(temperature, keep)
    N, dtype = hidden.shape[0], logits_dtype([hidden])
    kept = in_huge_pages(empty_logits(hidden, head.columns, dtype, workspace_bytes, recompute))
    sides, top = kept.new_empty(4, N), torch.empty_like(tokens)
    side = Side(sides[0], top, *sides[1:])
    sums = kept.new_empty(2, N if stats else 0)
    token = torch.where(keep, tokens, 0)
    space, raw = Workspace(N, 1, head.columns, kept, workspace_bytes, kept=kept), lacking([head], kept)
    for chunk in space.chunks:
        z, its = space.logits(chunk), Side(*(x[chunk] for x in side))
        head.project(head.read(chunk), z[0])
        rows.logprob(z, token[chunk], its, raw.of_chunk(of_tokens(temperature, chunk)))
        if stats:
            sums[:, chunk] = torch.stack(spread(z, its, Shard.read(shard).first, head.V))
    results = [*logprob_from(side)]
    if stats:
        results += [(token == top) & ~side.norm.isnan(), *beside(side, sums, head.V, Shard.read(shard))]
    logp, entropy, lse, *extra = (torch.where(keep, x, x.new_zeros(())) for x in results)
    is_top1, mean_logits, log_sum_sq_probs = extra or [x.new_empty(0) for x in (keep, lse, lse)]
    return logp, entropy, lse, kept, sides, top, is_top1, mean_logits, log_sum_sq_probs


def beside(side: Side, sums: Tensor, V: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """Mean logit and log sum_v p_v^2, (N,) each, from the sums of `spread`; V of the tokens are this rank's."""
    sums = torch.cat([sums, torch.full_like(sums[:1], V)])
    total, square, count = shard.total(sums) if shard.split else sums
    return total / count + 0 * side.norm, torch.log1p(square) - 2 * side.norm


@torch.library.custom_op(f"{NAMESPACE}::logprob_backward", mutates_args=())
def logprob_backward(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    tokens: Tensor,
    numbers: Tensor,
    temperature: Tensor,
    vocab_size: int,
    shard: str,
    ignore_index: int,
    backend: str,
    workspace_bytes: int,
    kept: Tensor,
    sides: Tensor,
    top: Tensor,
    upstream: Tensor,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, lm_head and bias in hidden's dtype; `upstream` (3, N) belongs to logp, entropy and lse."""
    head = single(hidden, lm_head, bias, numbers, vocab_size, shard, temperature)
    rest = temperature, shard, ignore_index, backend, workspace_bytes, kept, sides, top, upstream, want
    return differentiate(head, lm_head.shape[0], False, tokens, *rest)


def differentiate(
    head: Projection,
    padded: int,
    overwrite: bool,
    tokens: Tensor,
    temperature: Tensor,
    shard: str,
    ignore_index: int,
    backend: str,
    workspace_bytes: int,
    kept: Tensor,
    sides: Tensor,
    top: Tensor,
    upstream: Tensor,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Those gradients, of an lm_head of `padded` rows; `overwrite` says that dlogits may take the place of `kept`.

    The statistics are those of the forward's logits: made again they would cost a sweep over the rows.
    """
    rows, keep = load(backend, shard), tokens != ignore_index
    temperature = where_they_count(temperature, keep)
    upstream = torch.where(keep, upstream, 0)
    if temperature.dim():
        # the rows know of none
        upstream = upstream / temperature
    gradients = Gradients(head, padded, want, upstream)
    own = gradients.dlogits_dtype or (kept.dtype if kept.numel() and not overwrite else None)
    space = Workspace(head.N, 1, head.columns, upstream, workspace_bytes, own, kept)
    side, token, g = Side(sides[0], top, *sides[1:]), torch.where(keep, tokens, 0), upstream * gradients.factor
    lacks, cap = lacking([head], upstream), softcap_of(head, temperature)
    for chunk in space.chunks:
        z, dlogits, mine, raw = space.logits(chunk), space.dlogits(chunk), head.read(chunk), COMPLETE
        if not kept.numel():
            head.project(mine, z[0])
            raw = lacks.of_chunk(of_tokens(temperature, chunk))
        its = Side(*(x[chunk] for x in side))
        rows.logprob_grad(z, its, token[chunk], *g[:, chunk].unbind(), cap(chunk), dlogits, raw)
        gradients.add(dlogits, mine, chunk)
    dtype = head.hidden.dtype
    # where they are: nobody else holds these sums, and a copy of dlm_head would be the largest allocation here
    finished = (
        x.mul_(gradients.unit) if x.dtype == dtype else scale(x, gradients.unit, dtype)
        for x in gradients.tensors(shard)
    )
    dhidden, dlm_head, dbias = finished
    return dhidden, dlm_head, dbias


def single(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor,
    numbers: Tensor,
    vocab_size: int,
    shard: str,
    temperature: Tensor,
) -> Projection:
    flat = Flat([hidden], [lm_head], [bias], numbers.view(1, 2), [vocab_size], shard)
    return projections(flat, temperature, logits_dtype([hidden]))[0]


@logprob_op.register_fake
def _(
    hidden: Tensor, lm_head: Tensor, bias: Tensor, tokens: Tensor, numbers: Tensor, temperature: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    V, shard, *_, workspace_bytes, recompute, stats, _ = rest
    dtype = logits_dtype([hidden])
    per_token = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(3)]
    kept = empty_logits(hidden, Shard.read(shard).columns or V, dtype, workspace_bytes, recompute)
    sides, top = kept.new_empty(4, hidden.shape[0]), torch.empty_like(tokens)
    extra = [kept.new_empty(hidden.shape[0] if stats else 0, dtype=x) for x in (torch.bool, dtype, dtype)]
    return *per_token, kept, sides, top, *extra


@logprob_backward.register_fake
def _(hidden: Tensor, lm_head: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dhidden, dlm_head, dbias = fake_gradients(hidden, lm_head, rest[-1], hidden.dtype)
    return dhidden, dlm_head, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # or a (N, V) of zeros would be made for it
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    save(ctx, *inputs[:6], *output[3:6])
    *ctx.rest, _, _, ctx.alone = inputs[6:]


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:3])
    *inputs, kept, sides, top = saved(ctx)
    tokens = inputs[3]
    zero = kept.new_zeros(tokens.shape)
    stacked = torch.stack([zero if u is None else u for u in upstream[:3]])
    rest: list[Any] = [*ctx.rest, kept, sides, top, stacked, needs]
    if freed(kept, ctx.alone):
        hidden, lm_head, bias, _, numbers, temperature = inputs
        vocab_size, shard, *_ = rest
        head = single(hidden, lm_head, bias, numbers, vocab_size, shard, temperature)
        gradients = differentiate(head, lm_head.shape[0], True, tokens, temperature, *rest[1:])
    else:
        gradients = logprob_backward(*inputs, *rest)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * 11


logprob_op.register_autograd(_backward, setup_context=_save)


@overload
def logprob(
    head: Head, tokens: Tensor, *, temperature: float | Tensor = ..., ignore_index: int = ...,
    stats: Literal[False] = ..., backend: str | None = ..., workspace_bytes: int | None = ...,
    recompute: bool | str = ...,
) -> LogProb: ...  # fmt: skip


@overload
def logprob(
    head: Head, tokens: Tensor, *, temperature: float | Tensor = ..., ignore_index: int = ...,
    stats: Literal[True], backend: str | None = ..., workspace_bytes: int | None = ...,
    recompute: bool | str = ...,
) -> LogProbStats: ...  # fmt: skip


def logprob(
    head: Head,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    stats: bool = False,
    backend: str | None = None,
    workspace_bytes: int | None = None,
    recompute: bool | str = "auto",
) -> LogProb | LogProbStats:
    """logp_n = z_n[tokens_n] - lse_n, entropy_n = -sum_v p_v log p_v, lse_n = log sum_v exp z_v, z = logits over T.

    With `stats`, without gradient: is_top1_n, whether tokens_n has the largest logit (the lowest id among equals),
    mean_logits_n = sum_v z_v / V and log_sum_sq_probs_n = log sum_v p_v^2, which trainers log or weigh tokens by (WPO).

    Ignored positions give 0 in all of them and no gradient, even if their hidden states are NaN. A row of logits that
    is no distribution (a NaN, an infinite logit, no mass at all) gives NaN, and is_top1 False.

    Args:
        head: hidden (..., D).
        tokens: (...), int64, each in 0..V-1 or `ignore_index`; checked on the CPU, on CUDA under COPD_DEBUG=1 only.
        temperature: positive; divides the logits. A number, or (...), floating: a temperature a token.
        ignore_index: the token id that marks a position as ignored.
        stats: return a `LogProbStats`, from the same sweep: no GEMM pass more.
        backend: "torch", "triton", "native" or "reference"; where omitted COPD_BACKEND, else the fastest available.
        workspace_bytes: most memory for a chunk's logits; a default for the device where omitted.
        recompute: whether backward makes the logits again. False keeps them until then, which saves a GEMM pass, if all
            of them fit `workspace_bytes`; "auto" does so where that is faster: always on CUDA, on a CPU where D is at
            least 64, or 512 where it multiplies 16-bit operands as they are (below, the pass costs less than the first
            touch of fresh memory). True where many results wait for their backward, because each keeps its own.

    Returns:
        (logp, entropy, lse), (...) each, fp32 (fp64 for fp64 inputs), in nats; all differentiable in the head's hidden,
        lm_head and bias. With `stats` also (is_top1, mean_logits, log_sum_sq_probs).

    Raises:
        ValueError, TypeError: an argument breaks its rule. RuntimeError: the backend is not available here.
    """
    check_head("logprob", "head", head)
    shape, device = head.hidden.shape[:-1], head.hidden.device
    check_integer("logprob", "ignore_index", ignore_index)
    check_integers("logprob", "tokens", tokens, shape, device)
    rule = f"be in 0..{head.V - 1} or {ignore_index}"
    check_values("logprob", "tokens", tokens, lambda t: ((t >= 0) & (t < head.V)) | (t == ignore_index), rule)
    check_temperatures("logprob", temperature, tokens != ignore_index)
    check_workspace("logprob", workspace_bytes)
    check("logprob", "recompute", recompute in (True, False, "auto"), "be True, False or 'auto'", repr(recompute))

    name = resolve("logprob", backend, device, head.shard.split)
    if name == "reference":
        results = reference.logprob(head, tokens, temperature=temperature, ignore_index=ignore_index)
        return results if stats else LogProb(*results[:3])
    flat = flatten([head])
    hidden, lm_head, bias, numbers, size = (x[0] for x in flat[:-1])
    if recompute == "auto":
        recompute = not keeps_logits(head.hidden.shape[-1], head.hidden.dtype, device)
    outputs = logprob_op(
        hidden,
        lm_head,
        bias,
        tokens.reshape(-1),
        numbers,
        temperatures(temperature, shape, logits_dtype([head.hidden])),
        size,
        flat.shard,
        ignore_index,
        name,
        workspace_bytes or 0,
        # nothing to keep for a backward that will not come
        bool(recompute) or not any(wanted(head)),
        stats,
        True,
    )
    logp, entropy, lse, *extra = (x.view(shape) for x in (*outputs[:3], *outputs[6 if stats else 9 :]))
    return LogProbStats(logp, entropy, lse, *extra) if stats else LogProb(logp, entropy, lse)
