"""The policy: loading it, and running it from token ids to hidden states.

`Sequences` is what every forward pass reads: prompts, and the completions that follow them. A model runs its own
forward; images and videos of a Qwen3-VL are encoded once a prompt, and shared by its rows. Nothing here touches
`lm_head`: `copd_kernels` does.

B rows, L positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import copd_kernels
from copd.processor import load_processor, read_config
from copd.settings import ModelConfig
from copd.task import Prompt

# of Qwen-VL: pixels and grid as the processor names them, and the id of the placeholder in the model's config
MEDIA = (
    ("pixel_values", "image_grid_thw", "image_token_id"),
    ("pixel_values_videos", "video_grid_thw", "video_token_id"),
)
# state of another form, or kept in the model's own modules
OWN_CACHE = ("minimax", "recurrent_gemma", "reformer", "rwkv", "xlnet", "xlstm")


def load(cfg: ModelConfig, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The base model, fp32, and its processor (a tokenizer for a text-only model)."""
    if cfg.path is None:
        raise ValueError("model: path must name a checkpoint; got none")
    flash, liger = (device.type == "cuda" and find_spec(name) is not None for name in ("flash_attn", "liger_kernel"))
    if cfg.liger and liger:
        apply_liger(AutoConfig.from_pretrained(cfg.path).model_type)
    # None: transformers' choice, sdpa or, where that lacks what the model does (Gemma 2's softcap), its own code
    attention = cfg.attention or ("flash_attention_2" if flash else None)
    model, processor = load_saved(cfg.path, attn_implementation=attention)
    return model.to(device), processor  # type: ignore[arg-type]  # transformers wraps `to`


def load_saved(path: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """What `save_pretrained` wrote, model in fp32 and processor, whatever its class; an adapter applied to its base."""
    if is_adapter(path):
        from copd import adapter  # peft, which it imports, takes a second

        base, processor = load_saved(adapter.base_of(path), **options)
        return adapter.apply(base, path), processor
    config = read_config(path)
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"model: path must hold weights that are not quantised; got {method} in {path}")
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    crossed = getattr(config.get_text_config(), "cross_attention_layers", None)
    if config.is_encoder_decoder or crossed or type(config) not in auto._model_mapping:
        rule = "model: path must hold a decoder that reads tokens, with images in place of some of them or without"
        raise ValueError(f"{rule}; got {config.model_type!r} in {path}")
    if config.model_type in OWN_CACHE:
        rule = "model: path must hold a decoder that transformers samples with its DynamicCache"
        raise ValueError(f"{rule}; got {config.model_type!r} in {path}")
    return auto.from_pretrained(path, dtype=torch.float32, **options), load_processor(str(path))


def is_adapter(folder: str | Path) -> bool:
    """Whether the folder holds a peft adapter, and no model of its own."""
    return (Path(folder) / "adapter_config.json").exists()


def load_like(folder: Path, base: PreTrainedModel, processor: Any) -> PreTrainedModel:
    """The model in `folder`. Raises `ValueError` where its tokenizer or vocabulary is not the base's."""
    model, own = load_saved(folder)
    words = [getattr(p, "tokenizer", p).get_vocab() for p in (own, processor)]
    if words[0] != words[1]:
        raise ValueError(f"branch: tokenizer of {folder} must be the base's; got another vocabulary")
    rows, base_rows = (m.get_output_embeddings().weight.shape[0] for m in (model, base))
    if rows != base_rows:
        raise ValueError(f"branch: vocabulary of {folder} must have the base's {base_rows} rows; got {rows}")
    return model


def apply_liger(model_type: str) -> None:
    """Liger's RMSNorm, SwiGLU and RoPE for models built from here on; its losses stay off."""
    from liger_kernel.transformers import monkey_patch

    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if patch is not None:
        patch(cross_entropy=False, fused_linear_cross_entropy=False)


@dataclass
class Sequences:
    """Rows of tokens, and what else a forward pass reads."""

    prompts: list[Prompt]
    """of each row; the media of one that has several rows are encoded once"""
    input_ids: Tensor
    """(B, L) int64"""
    attention_mask: Tensor | None
    """(B, L) int64, 1 on tokens; None where there is no padding before them: causal attention sees none after them"""
    position_ids: Tensor
    """(3, B, L) int64: time, height, width of multimodal RoPE"""
    completion: Tensor
    """(B, L) bool, the tokens after the prompts"""
    kinds: Tensor
    """(B, L) int32: 0 text, 1 image, 2 video, as the processor told"""

    def predicting(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) that predict the completions' N tokens, row after row, and those tokens (N,)."""
        return hidden[:, :-1][self.completion[:, 1:]], self.input_ids[self.completion]


def collate(
    model: PreTrainedModel,
    prompts: list[Prompt],
    pad: int,
    completions: list[list[int]] | None = None,
    left: bool = False,
) -> Sequences:
    """Prompts, each with its completion, padded to one length L on the right, or on the left to be continued."""
    completions = completions or [[]] * len(prompts)
    rows = [prompt.input_ids + after for prompt, after in zip(prompts, completions, strict=True)]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(prompt.input_ids) for prompt in prompts])[:, None]
    length = int(ends.max())
    # place of each position in its row, from 0; negative or past its end where it is padding
    place = torch.arange(length) - (length - ends if left else torch.zeros_like(ends))
    inside = (place >= 0) & (place < ends)
    input_ids = torch.full((len(rows), length), pad)
    input_ids[inside] = torch.tensor([token for row in rows for token in row])
    mask = inside.long() if left and not inside.all() else None
    kinds = torch.zeros_like(input_ids, dtype=torch.int32)
    kinds[inside & (place < starts)] = torch.tensor(
        [kind for prompt in prompts for kind in prompt.mm_token_type_ids], dtype=torch.int32
    )
    index = getattr(getattr(model, "model", None), "get_rope_index", None)
    if index is not None and any(prompt.media for prompt in prompts):
        reads = signature(index).parameters
        media = {name: value for name, value in media_of(prompts).items() if name in reads}
        positions, _ = index(input_ids, mm_token_type_ids=kinds, attention_mask=mask, **media)
    else:
        positions = place.clamp(min=0).expand(3, -1, -1)
    device, completion = model.device, inside & (place >= starts)
    mask = None if mask is None else mask.to(device)
    after = (part.to(device) for part in (positions, completion, kinds))
    return Sequences(prompts, input_ids.to(device), mask, *after)


def media_of(prompts: list[Prompt]) -> dict[str, Tensor]:
    """Media of all rows, one after the other, as one forward reads them; filled up with zeros to one size."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.media)
    found = {}
    for name in names:
        parts = [prompt.media[name] for prompt in prompts if name in prompt.media]
        frames = sorted({part.shape[1] for part in parts}) if name.endswith("videos") and parts[0].dim() > 2 else []
        if len(frames) > 1:  # LLaVA's, where a frame filled up would be one more to see
            rule = f"model: videos of one batch must have equally many frames for this family; got {frames[0]} and"
            raise ValueError(f"{rule} {frames[-1]}; data.max_frames makes those with more equal")
        size = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        filled = []
        for part in parts:
            behind = [count for want, have in zip(size, part.shape[1:], strict=True) for count in (want - have, 0)]
            filled.append(nn.functional.pad(part, behind[::-1]) if any(behind) else part)
        found[name] = torch.cat(filled)
    return found


def hidden_states(model: PreTrainedModel, batch: Sequences, cache: Any = None) -> Tensor:
    """Last hidden states (B, L, D) after the final norm. With `cache`, keys and values are appended to it."""
    once = model.config.model_type.startswith("qwen3_vl")  # its media are encoded once a prompt
    runs = model.model.language_model if once else model
    reads = signature(runs.forward).parameters
    # transformers below 5.40 knows it by this name, newer ones by that
    named = "cache" if "cache" in reads else "past_key_values"
    extra = {named: cache, "use_cache": cache is not None}
    mask = batch.attention_mask
    if not once:
        rope = hasattr(getattr(model, "model", None), "get_rope_index")
        media = media_of(batch.prompts) | {"mm_token_type_ids": batch.kinds, "token_type_ids": batch.kinds}
        if hasattr(model.config, "vision_config"):
            extra |= {name: value.to(model.device) for name, value in media.items() if name in reads}
        # the model's own forward, whatever it calls its layers and does between them
        with copd_kernels.hidden_states(model):
            hidden: Tensor = model(
                input_ids=batch.input_ids,
                attention_mask=mask,
                position_ids=batch.position_ids if rope else batch.position_ids[0],
                **extra,
            ).logits
            return hidden
    # embeddings; then deepstack, features of early vision layers that the first language layers add where media are
    layers = [model.get_input_embeddings()(batch.input_ids)]
    visual = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for pixels, grid, token in MEDIA:
        if features := encode_media(model, batch, pixels, grid):
            where = batch.input_ids == getattr(model.config, token)
            layers += [torch.zeros_like(layers[0])] * (len(features) - len(layers))
            layers = [
                layer.masked_scatter(where[..., None], feature.to(layer.dtype))
                for layer, feature in zip(layers, features, strict=True)
            ]
            visual = visual | where
    embeds, *deepstack = layers
    return runs(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=batch.position_ids,
        visual_pos_masks=visual if deepstack else None,
        deepstack_visual_embeds=[layer[visual] for layer in deepstack] or None,
        **extra,
    ).last_hidden_state


def encode_media(model: PreTrainedModel, batch: Sequences, pixels: str, grid: str) -> list[Tensor]:
    """Features (visual tokens of all rows, D) of images or videos: the tower's output, then its deepstack layers.

    The tower runs once a prompt; its features are repeated for the prompt's rows, so gradients add up over them.
    """
    rows = [prompt for prompt in batch.prompts if pixels in prompt.media]
    owners = {id(prompt): prompt for prompt in rows}
    if not owners:
        return []
    device = batch.input_ids.device
    grids = torch.cat([prompt.media[grid] for prompt in owners.values()])
    output = model.model.get_image_features(
        torch.cat([prompt.media[pixels] for prompt in owners.values()]).to(device), grids.to(device), return_dict=True
    )
    merged = model.config.vision_config.spatial_merge_size**2
    counts = [int(prompt.media[grid].prod(1).sum()) // merged for prompt in owners.values()]
    # transformers gives a layer as one tensor or as one for each image, depending on its version
    layers = [x if isinstance(x, Tensor) else torch.cat(x) for x in (output.pooler_output, *output.deepstack_features)]
    features = [dict(zip(owners, layer.split(counts), strict=True)) for layer in layers]
    return [torch.cat([parts[id(prompt)] for prompt in rows]) for parts in features]
