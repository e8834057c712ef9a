"""Sampling: prompts in, completions with their log-probs out.

Each prompt is prefilled once and its KV cache repeated for its G samples; generation stops when every row has ended.
Media placeholders are never sampled: a completion with one could not be scored. B = P * G rows, C completion tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from copd.model import Sequences, collate, extend, hidden_states
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
    sequences: Sequences
    """prompts and completions, (B, L + C)"""
    tokens: Tensor
    """(B, C) int64 completions, padded after EOS"""
    mask: Tensor
    """(B, C) bool, tokens up to EOS included"""
    logp: Tensor
    """(B, C) fp32, the sampler's own log-probs (0 outside `mask`)"""
    truncated: Tensor
    """(B,) bool, completions that reached the limit without EOS"""


def seed_of(*key: object) -> int:
    """A 63-bit seed from any printable key.

    Every random draw of a run has its own key (run seed, purpose, domain, step), so no stream depends on what other
    branches drew and a resumed run needs no generator state.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def rewards(task: Task, rollout: Rollout, of: slice = slice(None)) -> Tensor:
    """Rewards (P, G) fp32 of the prompts in `of`. Raises `ValueError` where the task returns another number of them."""
    samples = rollout.sequences.samples
    prompts = [prompt for prompt in rollout.sequences.prompts[of] for _ in range(samples)]
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
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    media = [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
    # padding is masked: without a token of its own, any will do
    return Special(eos, next(i for i in (tokenizer.pad_token_id, *eos, 0) if i is not None), media)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[Prompt],
    samples: int,
    cfg: RolloutConfig,
    special: Special,
    seed: int,
    greedy: bool = False,
) -> Rollout:
    """`samples` completions of each prompt, at `cfg.temperature` or greedily."""
    device = model.device
    chunk = cfg.chunk_prompts or len(prompts)
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()  # activation checkpointing, on in training mode, would drop the KV cache
    whole = collate(model, prompts, special.pad, device)
    parts = [
        _generate(model, whole.take(slice(i, min(i + chunk, len(prompts)))), samples, cfg, special, generator, greedy)
        for i in range(0, len(prompts), chunk)
    ]
    width = max(tokens.shape[1] for tokens, _ in parts)
    # -1: a place that no chunk reached, or that follows EOS
    tokens = torch.cat([pad(tokens, (0, width - tokens.shape[1]), value=-1) for tokens, _ in parts])
    logp = torch.cat([pad(logp, (0, width - logp.shape[1])) for _, logp in parts])
    mask = tokens >= 0
    tokens = tokens.where(mask, special.pad)
    truncated = ~(torch.isin(tokens, torch.tensor(special.eos, device=device)) & mask).any(1)
    return Rollout(extend(whole, tokens, mask), tokens, mask, logp * mask, truncated)


def _generate(
    model: PreTrainedModel,
    prompts: Sequences,
    samples: int,
    cfg: RolloutConfig,
    special: Special,
    generator: torch.Generator,
    greedy: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens (P * G, C), -1 after EOS, and their log-probs."""
    cache = DynamicCache(config=model.config)
    last = hidden_states(model, prompts, cache)[:, -1].repeat_interleave(samples, 0)  # (B, D)
    cache.batch_repeat_interleave(samples)
    mask = prompts.attention_mask.repeat_interleave(samples, 0)
    position = prompts.position_ids.amax(dim=(0, 2)).repeat_interleave(samples)  # (B,)
    ends = torch.tensor(special.eos, device=last.device)
    done = torch.zeros(last.shape[0], dtype=torch.bool, device=last.device)
    tokens, logps = [], []
    while True:
        # softcap and scale included, as every log-prob of the tokens will be
        logits = reference.logits(Head.of(model, last)).float() / cfg.temperature  # (B, V), the last position alone
        logits[:, special.media] = -torch.inf
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1) if greedy else torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
        logps.append(logp.gather(1, token[:, None])[:, 0])
        tokens.append(token.where(~done, -1))
        done = done | torch.isin(token, ends)
        if len(tokens) == cfg.max_new_tokens or done.all():
            return torch.stack(tokens, 1), torch.stack(logps, 1)
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = Sequences(
            [], samples, token.where(tokens[-1] >= 0, special.pad)[:, None], mask, position[:, None].expand(3, -1, -1)
        )
        last = hidden_states(model, step, cache)[:, -1]
