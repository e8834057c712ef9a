"""The tiny model: Qwen3-VL's architecture, small enough for a laptop CPU."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from copd.lab.config import TinyConfig
from copd.lab.tasks import vocabulary


def build_tiny(cfg: TinyConfig, seed: int) -> PreTrainedModel:
    """A Qwen3-VL of about half a million parameters that reads the words of `copd.lab.tasks.vocabulary`."""
    head_dim, ids = cfg.hidden_size // cfg.heads, vocabulary.ID
    # a third of the rotary pairs each for time, height and width, the remainder for time
    share = head_dim * 3 // 16
    sizes = {"vocab_size": vocabulary.SIZE, "hidden_size": cfg.hidden_size, "intermediate_size": 2 * cfg.hidden_size}
    heads = {"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.heads, "head_dim": head_dim}
    section = {"mrope_section": [head_dim // 2 - 2 * share, share, share], "mrope_interleaved": True}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | section}
    special = {"eos_token_id": ids[vocabulary.EOS], "pad_token_id": ids[vocabulary.PAD], "tie_word_embeddings": True}
    text = {"num_hidden_layers": cfg.layers, "initializer_range": cfg.init_std} | sizes | heads | rope | special
    width = {"hidden_size": cfg.vision_hidden_size, "intermediate_size": 2 * cfg.vision_hidden_size, "num_heads": 2}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 256}
    output = {"out_hidden_size": cfg.hidden_size, "deepstack_visual_indexes": [0]}
    vision = {"depth": cfg.vision_layers, "initializer_range": cfg.init_std} | width | patches | output
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[vocabulary.IMAGE],
        video_token_id=ids[vocabulary.VIDEO],
        vision_start_token_id=ids[vocabulary.VISION_START],
        vision_end_token_id=ids[vocabulary.VISION_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)
