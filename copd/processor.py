"""A checkpoint's processor: tokenizer, chat template and what turns pixels into patches.

transformers reads images with torchvision or PIL, but Qwen3-VL's videos with torchvision alone, and its processor does
not load without. `PilProcessor` stands in for it there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BatchFeature, Qwen3VLProcessor
from transformers.utils import cached_file, is_torchvision_available
from transformers.video_utils import VideoMetadata

QWEN3 = ("qwen3_vl", "qwen3_5")
"""model types, or how they begin, of those that have Qwen3-VL's processor"""


def read_config(path: str | Path) -> Any:
    """A checkpoint's configuration. Raises `ValueError` for a folder that is not there or not a checkpoint."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        rule = "model: path must be a folder written by save_pretrained, or a name on the Hub"
        got = str(path) if Path(path).exists() else f"{path}, which is no folder"
        raise ValueError(f"{rule}; got {got}: {str(error).splitlines()[0]}") from error


def load_processor(path: str | Path) -> Any:
    """The processor of a checkpoint: the model's own, or its tokenizer where the checkpoint has no image processor."""
    path = str(path)
    config = read_config(path)
    if not hasattr(config, "vision_config") or not _settings(path):
        return AutoTokenizer.from_pretrained(path)
    if config.model_type.startswith(QWEN3) and not is_torchvision_available():
        return PilProcessor.from_pretrained(path)
    return AutoProcessor.from_pretrained(path)


class PilProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without torchvision: the same prompts, images resized by PIL, videos by `FrameProcessor`."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = FrameProcessor(image_processor, kwargs.get("video_processor", {}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> PilProcessor:
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        processor.video_processor.settings = _settings(pretrained_model_name_or_path).get("video_processor", {})
        return processor

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes; where torchvision is there, it loads as Qwen3-VL's own processor."""
        names = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
        as_images = {name: getattr(self.image_processor, name) for name in names}
        settings = {"video_processor_type": "Qwen3VLVideoProcessor"} | as_images | self.video_processor.settings
        return super().to_dict() | {"processor_class": "Qwen3VLProcessor", "video_processor": settings}


class FrameProcessor:
    """Qwen3-VL's video processor for frames that need no resizing, by the image processor's own patching."""

    def __init__(self, image_processor: Any, settings: dict[str, Any]) -> None:
        self.image_processor = image_processor
        self.settings = settings
        self.merge_size = image_processor.merge_size
        self.temporal_patch_size = image_processor.temporal_patch_size

    def __call__(self, videos: list[np.ndarray], video_metadata: list[VideoMetadata], **_: Any) -> BatchFeature:
        """`pixel_values_videos` (patches, C * temporal_patch * patch**2) and `video_grid_thw` (videos, 3).

        `videos` are (frames, H, W, C) uint8. Raises `RuntimeError` for frames that the video processor would resize.
        """
        size = self.settings.get("size") or {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}
        colours = {key: self.settings[key] for key in ("image_mean", "image_std") if key in self.settings}
        patch, depth = self.image_processor.patch_size, self.temporal_patch_size
        side = patch * self.merge_size
        pixels, grids = [], []
        for video in videos:
            count, height, width, channels = video.shape
            volume = round(count / depth) * depth * height * width
            if height % side or width % side or not size["shortest_edge"] <= volume <= size["longest_edge"]:
                rule = f"sides in multiples of {side}, {size['shortest_edge']} to {size['longest_edge']} pixels in all"
                got = f"{count} frames of {height} x {width}; pip install torchvision, which resizes them"
                raise RuntimeError(f"video: without torchvision frames must have {rule}; got {got}")
            still = self.image_processor(list(video), do_resize=False, return_tensors="pt", **colours)
            # an image fills a temporal patch with copies of itself: keep one, and put the next frames beside it
            frames = still["pixel_values"].view(count, -1, channels, depth, patch, patch)[:, :, :, 0]
            frames = torch.cat([frames, frames[-1:].expand(-count % depth, *frames.shape[1:])])
            clips = frames.unflatten(0, (-1, depth))  # (T, depth, patches of a frame, C, p, p)
            pixels.append(clips.permute(0, 2, 3, 1, 4, 5).flatten(2).flatten(0, 1))
            grids.append([len(clips), *still["image_grid_thw"][0, 1:].tolist()])
        data = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data | {"video_metadata": video_metadata})


def _settings(path: str | Path) -> dict[str, Any]:
    """`processor_config.json`, or the two files that older checkpoints have in its place."""
    names = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in names]
    whole, image, video = (json.loads(Path(file).read_text(encoding="utf-8")) if file else {} for file in files)
    return whole | {key: value for key, value in (("image_processor", image), ("video_processor", video)) if value}
