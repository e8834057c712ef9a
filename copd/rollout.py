"""Sampling: prompts in, completions with their log-probs out.

Each prompt is prefilled once and its KV cache repeated for its G samples; a row that has ended leaves the batch. What a
row samples depends on its prompt, its place and the seed, not on the rows beside it. Media placeholders are never
sampled: a completion with one could not be scored; log-probs are those over all words, as the loss has them.
B = P * G rows, C completion tokens.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from copd.model import Sequences, collate, hidden_states
from copd.settings import RolloutConfig
from copd.task import Prompt, Task
from copd_kernels import Head, reference


class Special(NamedTuple):
    """Token ids."""

    eos: list[int]
    pad: int
    media: list[int]
    """placeholders, never sampled"""


@dataclass
class Rollout:
    """G completions of each of P prompts: row `b` belongs to prompt `b // samples`."""

    prompts: list[Prompt]
    samples: int
    tokens: Tensor
    """(B, C) int64 completions, padded after EOS"""
    mask: Tensor
    """(B, C) bool, tokens up to EOS included"""
    logp: Tensor
    """(B, C) fp32, the sampler's own log-probs, over all words (0 outside `mask`)"""
    truncated: Tensor
    """(B,) bool, completions that reached the limit without EOS"""

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and completion."""
        after = self.mask.sum(1).tolist()
        return [len(self.prompts[row // self.samples].input_ids) + count for row, count in enumerate(after)]

    def micro_batches(self, tokens: int) -> list[list[int]]:
        """Rows of like length, in each at most `tokens` tokens (but one row at least), padding included.

        Padding is a tenth of them at most, or so few tokens (`tokens` / 128) that one more pass would cost more. In the
        order of their first rows, so that the first ones are not those with the longest.
        """
        lengths = self.lengths()
        groups: list[list[int]] = []
        width = needed = 0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            needed += lengths[row]
            computed = (len(groups[-1]) + 1) * width if groups else math.inf
            if computed > tokens or computed - needed > max(computed / 10, tokens / 128):
                groups.append([])
                width = needed = lengths[row]
            groups[-1].append(row)
        return sorted(sorted(group) for group in groups)

    def computed(self, tokens: int) -> int:
        """Tokens, padding included, of one pass over micro-batches of at most `tokens` tokens."""
        lengths = self.lengths()
        return sum(len(rows) * max(lengths[row] for row in rows) for rows in self.micro_batches(tokens))

    def sequences(self, model: PreTrainedModel, rows: list[int], pad: int) -> Sequences:
        """`rows` as scoring and training read them."""
        completions = [self.tokens[row][self.mask[row]].tolist() for row in rows]
        return collate(model, [self.prompts[row // self.samples] for row in rows], pad, completions)


def seed_of(*key: object) -> int:
    """A 63-bit seed from any printable key.

    Every random draw of a run has its own key (run seed, purpose, domain, step), so no stream depends on what other
    branches drew and a resumed run needs no generator state.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def rewards(task: Task, rollout: Rollout, of: slice = slice(None)) -> Tensor:
    """Rewards (P, G) fp32 of the prompts in `of`. Raises `ValueError` where the task returns another number of them."""
    samples = rollout.samples
    prompts = [prompt for prompt in rollout.prompts[of] for _ in range(samples)]
    first = (of.start or 0) * samples
    texts = completions(task, rollout, slice(first, first + len(prompts)))
    values = task.reward(prompts, texts)
    if len(values) != len(texts):
        raise ValueError(f"reward: {task.name!r} must return one value a completion ({len(texts)}); got {len(values)}")
    return torch.tensor(values, dtype=torch.float32).view(-1, samples)


def completions(task: Task, rollout: Rollout, of: slice = slice(None)) -> list[str]:
    """The text of each row in `of`, special tokens left out."""
    rows = zip(rollout.tokens[of], rollout.mask[of], strict=True)
    return [task.decode(tokens[mask].tolist()) for tokens, mask in rows]


def special_tokens(model: PreTrainedModel, processor: Any) -> Special:
    tokenizer = getattr(processor, "tokenizer", processor)
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    eos = sorted(ends - {None})
    # image_token_id, video_token_id, vision_start_token_id, boi_token_index and the like
    named = re.compile(r"(image|video|vision|boi|eoi|audio)_.*(id|index)$")
    words, known = range(model.get_output_embeddings().weight.shape[0]), model.config.to_dict().items()
    media = sorted({value for name, value in known if named.match(name) and value in words})
    # padding is masked: without a token of its own, any will do
    return Special(eos, next(i for i in (tokenizer.pad_token_id, *eos, 0) if i is not None), media)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks compiled for training would be anew, for a cache that grows
def generate(
    model: PreTrainedModel,
    prompts: list[Prompt],
    samples: int,
    cfg: RolloutConfig,
    special: Special,
    seed: int,
    greedy: bool = False,
    first: int = 0,
) -> Rollout:
    """`samples` completions of each prompt, at `cfg.temperature` or greedily; `first` of the batch are elsewhere.

    The KV cache holds at most `cfg.cache_tokens` positions, padding included (but one row's at least): rows for which
    there is no room any more are set aside, and continued later from their own tokens.
    """
    model.eval()  # activation checkpointing, on in training mode, would drop the KV cache
    device, shape = model.device, (samples, cfg.max_new_tokens)
    # drawn on the CPU, so that every device samples the same
    generators = [torch.Generator().manual_seed(seed_of(seed, place)) for place in range(first, first + len(prompts))]
    noise = [torch.rand(shape, dtype=torch.float64, generator=generator) for generator in generators]
    rows = len(prompts) * samples
    draft = _Draft(
        torch.full((rows, cfg.max_new_tokens), -1, device=device),
        torch.zeros(rows, cfg.max_new_tokens, device=device),
        None if greedy else torch.cat(noise).to(device),
        [0] * rows,
    )
    waiting = list(range(rows))
    while waiting:
        length = {row: len(prompts[row // samples].input_ids) + draft.length[row] for row in waiting}
        waiting.sort(key=length.__getitem__)
        # room for every row to double, or most of them would soon be set aside again
        room = (cfg.cache_tokens or math.inf) / 2
        fit = max(1, sum(count * length[row] <= room for count, row in enumerate(waiting, start=1)))
        waiting = _decode(model, prompts, samples, waiting[:fit], draft, cfg, special) + waiting[fit:]
    width = max(draft.length)
    tokens, logp = draft.tokens[:, :width], draft.logp[:, :width]
    mask = tokens >= 0
    tokens = tokens.where(mask, special.pad)
    truncated = ~(torch.isin(tokens, torch.tensor(special.eos, device=device)) & mask).any(1)
    return Rollout(prompts, samples, tokens, mask, logp, truncated)


class _Draft(NamedTuple):
    """What has been sampled so far, of all B rows."""

    tokens: Tensor
    """(B, C), -1 where there is none"""
    logp: Tensor
    """(B, C)"""
    noise: Tensor | None
    """(B, C) fp64, uniform in [0, 1); None to decode greedily"""
    length: list[int]


def _decode(
    model: PreTrainedModel,
    prompts: list[Prompt],
    samples: int,
    rows: list[int],
    draft: _Draft,
    cfg: RolloutConfig,
    special: Special,
) -> list[int]:
    """Samples `rows` to their ends; returns those that the cache had no room for."""
    device, budget = model.device, cfg.cache_tokens or math.inf
    # rows that have nothing but their prompt yet share its prefill
    stems = {(row // samples, row if draft.length[row] else None): row for row in rows}
    place = {stem: index for index, stem in enumerate(stems)}
    owner = torch.tensor([place[row // samples, row if draft.length[row] else None] for row in rows], device=device)
    begun = [draft.tokens[row, : draft.length[row]].tolist() for row in stems.values()]
    batch = collate(model, [prompts[row // samples] for row in stems.values()], special.pad, begun, left=True)
    cache = DynamicCache(config=model.config)
    cache.layers = [_Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    last = hidden_states(model, batch, cache)[owner, -1]  # (B, D)
    cache.reorder_cache(owner)  # type: ignore[arg-type]  # it is int64
    # of no use where states alone are carried on, and pure state-space models take none
    attends = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    mask = batch.attention_mask[owner] if batch.attention_mask is not None and attends else None
    width, position = batch.input_ids.shape[1], batch.position_ids.amax(dim=(0, 2))[owner]
    row, ends = torch.tensor(rows, device=device), torch.tensor(special.eos, device=device)
    at = torch.tensor([draft.length[r] for r in rows], device=device)
    aside: list[int] = []
    while True:
        # softcap and scale included, as every log-prob of the tokens will be
        logits = reference.logits(Head.of(model, last)).float() / cfg.temperature  # (B, V), the last position alone
        total = logits.logsumexp(-1)
        logits[:, special.media] = -torch.inf
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1) if draft.noise is None else draw(logp, draft.noise[row, at])
        draft.tokens[row, at] = token
        draft.logp[row, at] = logits.gather(1, token[:, None])[:, 0] - total
        at, position, width = at + 1, position + 1, width + 1
        live = (~torch.isin(token, ends) & (at < cfg.max_new_tokens)).nonzero()[:, 0]
        over = len(live) * width > budget and len(live) > 1
        if len(live) < len(row) or over:
            kept = live[: len(live) // 2] if over else live
            aside += row[live[len(kept) :]].tolist()
            for r, length in zip(row.tolist(), at.tolist(), strict=True):
                draft.length[r] = length
            if not len(kept):
                return aside
            # the last rows move to where others left, so that few of them are copied
            order = torch.arange(len(kept), device=device)
            order[~torch.isin(order, kept)] = kept[kept >= len(kept)]
            row, at, position, token = row[order], at[order], position[order], token[order]
            mask = None if mask is None else mask[order]
            cache.reorder_cache(order)  # type: ignore[arg-type]  # it is int64
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = position[:, None].expand(3, -1, -1)
        new = token[:, None]
        step = Sequences([], new, mask, positions, torch.ones_like(new, dtype=torch.bool), torch.zeros_like(new).int())
        last = hidden_states(model, step, cache)[:, -1]


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """The word (B,) at which the distribution function of `logp` (B, V) passes `uniform` (B,), fp64 in [0, 1)."""
    passed = logp.exp().cumsum(-1, dtype=torch.float64)  # (B, V)
    word = torch.searchsorted(passed, uniform[:, None] * passed[:, -1:], right=True)
    return word[:, 0].clamp(max=logp.shape[1] - 1)


class _Layer(DynamicLayer):
    """Keys and values with room ahead for what comes, where transformers' copies them all at every token."""

    def __init__(self) -> None:
        super().__init__()
        self._room: list[Tensor] = []  # for keys, for values: (rows, heads, positions, D), of which the first are used

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, (rows, heads, count, _) = self.get_seq_length(), key_states.shape
        end = start + count
        if not self._room or self._room[0].shape[2] < end:
            spare = end + max(64, end // 4)
            self._room = [new.new_empty(rows, heads, spare, new.shape[3]) for new in (key_states, value_states)]
            if self.keys is not None and self.values is not None and start:
                self._room[0][:, :, :start], self._room[1][:, :, :start] = self.keys, self.values
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:rows, :, start:end] = new
        return self._use(rows, end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
        if not self._room:  # a layer that borrows its keys from another
            return
        count, length = len(beam_idx), self.get_seq_length()
        if count > len(self._room[0]):
            self._room = [room.index_select(0, beam_idx) for room in self._room]
        else:
            moved = (beam_idx != torch.arange(count, device=beam_idx.device)).nonzero()[:, 0]
            for room in self._room:
                room[moved, :, :length] = room[beam_idx[moved], :, :length]
        self._use(count, length)

    def _use(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:rows, :, :length] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values
