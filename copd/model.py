"""The policy: loading it, and running it from token ids to hidden states.

`Sequences` is what every forward pass reads: prompts, each with G completions. Images and videos are encoded once a
prompt and shared by its G rows, in sampling and in training alike. Nothing here touches `lm_head`: `copd_kernels` does.

B = P * G rows, L positions (prompt left-padded, then completion), D hidden size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from copd.config import ModelConfig
from copd.processor import load_processor
from copd.tasks import Prompt, vocabulary

MEDIA = (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2))


def build_tiny(cfg: ModelConfig, seed: int) -> PreTrainedModel:
    """A Qwen3-VL of about half a million parameters that reads the words of `copd.tasks.vocabulary`."""
    head_dim = cfg.hidden_size // cfg.heads
    section = [head_dim // 2 - 2 * (head_dim * 3 // 16), head_dim * 3 // 16, head_dim * 3 // 16]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary.SIZE,
            "hidden_size": cfg.hidden_size,
            "intermediate_size": 2 * cfg.hidden_size,
            "num_hidden_layers": cfg.layers,
            "num_attention_heads": cfg.heads,
            "num_key_value_heads": cfg.heads,
            "head_dim": head_dim,
            "initializer_range": cfg.init_std,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": section,
                "mrope_interleaved": True,
            },
            "eos_token_id": vocabulary.ID[vocabulary.EOS],
            "pad_token_id": vocabulary.ID[vocabulary.PAD],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": cfg.vision_layers,
            "hidden_size": cfg.vision_hidden_size,
            "intermediate_size": 2 * cfg.vision_hidden_size,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": cfg.hidden_size,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
            "initializer_range": cfg.init_std,
        },
        image_token_id=vocabulary.ID[vocabulary.IMAGE],
        video_token_id=vocabulary.ID[vocabulary.VIDEO],
        vision_start_token_id=vocabulary.ID[vocabulary.VISION_START],
        vision_end_token_id=vocabulary.ID[vocabulary.VISION_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


def load(cfg: ModelConfig, seed: int, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The base model, fp32, and its processor (a tokenizer for a text-only model)."""
    if cfg.path is None:
        return build_tiny(cfg, seed).to(device), vocabulary.tokenizer()
    attention = cfg.attention
    if attention is None:
        flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if flash else "sdpa"
    liger = cfg.liger and device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    if liger:
        apply_liger(AutoConfig.from_pretrained(cfg.path).model_type)
    model, processor = load_saved(cfg.path, attn_implementation=attention)
    return model.to(device), processor


def load_saved(path: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """What `save_pretrained` wrote, model in fp32 and processor, whatever its class."""
    config = AutoConfig.from_pretrained(path)
    multimodal = hasattr(config, "vision_config")
    if multimodal and not config.model_type.startswith("qwen3_vl"):
        raise ValueError(f"model: path must be a Qwen3-VL or a text-only model; got {config.model_type!r} in {path}")
    auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32, **options), load_processor(str(path))


def load_like(folder: Path, base: PreTrainedModel, processor: Any) -> PreTrainedModel:
    """The model in `folder`. Raises `ValueError` where its tokenizer or vocabulary is not the base's."""
    model, own = load_saved(folder)
    if vocabulary_of(own) != vocabulary_of(processor):
        raise ValueError(f"branch: tokenizer of {folder} must be the base's; got another vocabulary")
    rows, base_rows = (m.get_output_embeddings().weight.shape[0] for m in (model, base))
    if rows != base_rows:
        raise ValueError(f"branch: vocabulary of {folder} must have the base's {base_rows} rows; got {rows}")
    return model


def vocabulary_of(processor: Any) -> dict[str, int]:
    return getattr(processor, "tokenizer", processor).get_vocab()


def apply_liger(model_type: str) -> None:
    """Liger's RMSNorm, SwiGLU and RoPE for models built from here on; its losses stay off."""
    from liger_kernel.transformers import monkey_patch

    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is not None:
        patch(cross_entropy=False, fused_linear_cross_entropy=False)


@dataclass
class Sequences:
    """Prompts with the same number of completions each, as tensors. Row `b` belongs to prompt `b // samples`."""

    prompts: list[Prompt]
    samples: int
    input_ids: Tensor
    """(B, L) int64"""
    attention_mask: Tensor
    """(B, L) int64, 1 on tokens"""
    position_ids: Tensor
    """(3, B, L) int64: time, height, width of multimodal RoPE"""

    def take(self, rows: slice) -> Sequences:
        """Rows of whole prompts, or some of the rows of a single prompt."""
        prompts = self.prompts[rows.start // self.samples : -(-rows.stop // self.samples)]
        return Sequences(
            prompts,
            (rows.stop - rows.start) // len(prompts),
            self.input_ids[rows],
            self.attention_mask[rows],
            self.position_ids[:, rows],
        )

    def micro_batches(self, tokens: int) -> list[slice]:
        """Row ranges of at most `tokens` tokens (but one row at least), fit for `take`."""
        count, length = self.input_ids.shape
        rows = max(1, tokens // length)
        if rows >= self.samples:  # whole prompts
            rows -= rows % self.samples
            return [slice(i, min(i + rows, count)) for i in range(0, count, rows)]
        return [
            slice(i, min(i + rows, first + self.samples))
            for first in range(0, count, self.samples)
            for i in range(first, first + self.samples, rows)
        ]


def collate(model: PreTrainedModel, prompts: list[Prompt], pad: int, device: torch.device) -> Sequences:
    """Prompts alone, left-padded to one length L (samples = 1)."""
    length = max(len(prompt.input_ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad)
    kinds = torch.zeros(len(prompts), length, dtype=torch.int32)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        kinds[row, length - len(prompt.input_ids) :] = torch.tensor(prompt.mm_token_type_ids, dtype=torch.int32)
        mask[row, length - len(prompt.input_ids) :] = 1
    if any(prompt.media for prompt in prompts):
        grids = {grid: [p.media[grid] for p in prompts if grid in p.media] for _, grid, _ in MEDIA}
        position_ids, _ = model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=kinds,
            attention_mask=mask,
            **{name: torch.cat(parts) for name, parts in grids.items() if parts},
        )
    else:
        position_ids = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    return Sequences(prompts, 1, input_ids.to(device), mask.to(device), position_ids.to(device))


def extend(prompts: Sequences, completions: Tensor, mask: Tensor) -> Sequences:
    """Prompts followed by `completions` (P * G, C) with `mask` (P * G, C); positions count on from the prompt."""
    samples = completions.shape[0] // len(prompts.prompts)
    steps = torch.arange(1, completions.shape[1] + 1, device=completions.device)
    last = prompts.position_ids.amax(dim=(0, 2))  # (P,)
    after = (last[:, None] + steps).repeat_interleave(samples, 0).expand(3, -1, -1)
    return Sequences(
        prompts.prompts,
        samples,
        torch.cat([prompts.input_ids.repeat_interleave(samples, 0), completions], 1),
        torch.cat([prompts.attention_mask.repeat_interleave(samples, 0), mask.long()], 1),
        torch.cat([prompts.position_ids.repeat_interleave(samples, 1), after], 2),
    )


def hidden_states(model: PreTrainedModel, batch: Sequences, cache: Any = None) -> Tensor:
    """Last hidden states (B, L, D) after the final norm. With `cache`, keys and values are appended to it."""
    extra = {"past_key_values": cache, "use_cache": cache is not None}
    # a batch without padding needs no mask, which leaves SDPA its causal fast path
    mask = None if batch.attention_mask.all() else batch.attention_mask
    if not hasattr(model.config, "vision_config"):
        return model.model(
            batch.input_ids, attention_mask=mask, position_ids=batch.position_ids[0], **extra
        ).last_hidden_state
    embeds = model.get_input_embeddings()(batch.input_ids)
    # deepstack: features of early vision layers, added to the first language layers at the visual positions
    visual = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    deepstack = None
    encoded = [(encode_media(model, batch, *names), kind) for *names, kind in MEDIA]
    present = [(features, kind) for features, kind in encoded if features is not None]
    if present:
        token = {1: model.config.image_token_id, 2: model.config.video_token_id}
        layers = [torch.zeros_like(embeds) for _ in present[0][0][1:]]
        for (features, *early), kind in present:
            where = batch.input_ids == token[kind]
            embeds = embeds.masked_scatter(where[..., None], features.to(embeds.dtype))
            layers = [
                layer.masked_scatter(where[..., None], feature.to(embeds.dtype))
                for layer, feature in zip(layers, early, strict=True)
            ]
            visual = visual | where
        deepstack = [layer[visual] for layer in layers]
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=batch.position_ids,
        visual_pos_masks=visual if present else None,
        deepstack_visual_embeds=deepstack,
        **extra,
    ).last_hidden_state


def encode_media(model: PreTrainedModel, batch: Sequences, pixels: str, grid: str) -> list[Tensor] | None:
    """Features (visual tokens of all rows, D) of images or videos: the tower's output, then its deepstack layers.

    The tower runs once a prompt; its features are repeated for the prompt's rows, so gradients add up over them.
    """
    owners = [prompt for prompt in batch.prompts if pixels in prompt.media]
    if not owners:
        return None
    device = batch.input_ids.device
    grids = torch.cat([prompt.media[grid] for prompt in owners])
    output = model.model.get_image_features(
        torch.cat([prompt.media[pixels] for prompt in owners]).to(device), grids.to(device), return_dict=True
    )
    merged = model.config.vision_config.spatial_merge_size**2
    counts = [int(prompt.media[grid].prod(1).sum()) // merged for prompt in owners]
    # transformers gives a layer as one tensor or as one for each image, depending on its version
    layers = [x if isinstance(x, Tensor) else torch.cat(x) for x in (output.pooler_output, *output.deepstack_features)]
    return [torch.cat([part for part in layer.split(counts) for _ in range(batch.samples)]) for layer in layers]
