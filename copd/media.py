"""Pictures and videos as data sets hold them, decoded: paths, URLs, bytes, PIL images, frames, files of video."""

from __future__ import annotations

import base64
import io
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.video_utils import VideoMetadata

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
VIDEOS = {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"}
# a dictionary's key for what it holds; bytes first, the path beside them is a name of where they once were
KEYS = ("bytes", "image", "video", "image_url", "video_url", "url", "path")
SECONDS = 30  # that a URL may take to answer


def source(item: Any, folder: Path) -> Any:
    """What holds a picture or a video: a path (relative ones from `folder`), URL, bytes, PIL image or list of frames.

    Raises `ValueError` for anything else, and for a path where nothing is.
    """
    if isinstance(item, dict):
        return source(next((item[key] for key in KEYS if item.get(key)), None), folder)
    if isinstance(item, str):
        if item.startswith("data:"):
            return base64.b64decode(item.partition(",")[2])
        if re.match("https?://", item):
            return item
        item = folder / item.removeprefix("file://")
    if isinstance(item, Path) and not item.exists():
        raise ValueError(f"{item}, which does not exist")
    if not isinstance(item, Path | bytes | Image.Image | list):
        raise ValueError(type(item).__name__)
    return item


def named(item: Any) -> str:
    """Where a data set says it is: a path or URL, or nothing for what it holds itself."""
    if isinstance(item, dict):
        return next(filter(None, (named(item.get(key)) for key in KEYS)), "")
    return str(item) if isinstance(item, str | Path) and not str(item).startswith("data:") else ""


def like(value: Any) -> bool:
    """Whether a column holds pictures or videos, whatever it is called."""
    if isinstance(value, list):
        return any(map(like, value))
    if isinstance(value, dict):
        return any(isinstance(value.get(key), bytes) or like(value.get(key)) for key in KEYS)
    if isinstance(value, str):
        named = Path(value.partition("?")[0]).suffix.lower() in IMAGES | VIDEOS and not re.search(r"\s", value)
        return named or value.startswith(("data:image/", "data:video/"))
    return isinstance(value, Image.Image)


def _opened(held: Any) -> Any:
    if isinstance(held, str):
        with urllib.request.urlopen(held, timeout=SECONDS) as answer:
            return io.BytesIO(answer.read())
    return io.BytesIO(held) if isinstance(held, bytes) else held


def read_image(item: Any, folder: Path) -> Image.Image:
    """RGB, upright, on white where it is transparent, 16 bits scaled to 8."""
    held = source(item, folder)
    picture: Image.Image = held if isinstance(held, Image.Image) else Image.open(_opened(held))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] in "IF":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535 if values.max() > 255 else 255 if values.max() > 1 or picture.mode[0] == "I" else 1
        picture = Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        clear = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return picture.convert("RGB")


def read_video(item: Any, folder: Path, fps: float, most: int | None) -> tuple[np.ndarray, VideoMetadata]:
    """Frames (T, H, W, 3) uint8, and which they are of how many.

    `item` is a folder or a list of frames, which are `fps` a second, or a file, of which `fps` a second are taken; at
    most `most` of them, evenly spaced. Raises `ValueError` for one without frames, a broken one and unequal frames.
    """
    held = source(item, folder)
    if isinstance(held, Path) and held.is_dir():
        held = sorted((path for path in held.iterdir() if path.suffix.lower() in IMAGES), key=_natural)
    if not isinstance(held, list):
        return _decode(_opened(held), fps, most)
    chosen = _spread(len(held), most)
    frames = [np.asarray(read_image(held[i], folder)) for i in chosen]
    if len({frame.shape for frame in frames}) != 1:
        sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames})
        raise ValueError(f"frames of {' and '.join(sizes)}" if sizes else "no frames")
    return np.stack(frames), VideoMetadata(total_num_frames=len(held), fps=fps, frames_indices=chosen)


def _spread(count: int, most: int | None) -> list[int]:
    found: list[int] = np.linspace(0, count - 1, min(count, most or count)).round().astype(int).tolist()
    return found


def _decode(file: Any, fps: float, most: int | None) -> tuple[np.ndarray, VideoMetadata]:
    try:
        import av
    except ImportError as error:
        raise ImportError("video: files must be read by PyAV; got none; pip install 'copd[video]'") from error
    try:
        with av.open(file) as opened:
            if not opened.streams.video:
                raise ValueError("it has no stream of pictures")
            # times first, without decoding
            packets = opened.demux(opened.streams.video[0])
            times = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
            rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else fps
            step = max(rate / fps, 1.0)
            wanted = [round(i * step) for i in range(int((len(times) - 1) / step) + 1)]
            chosen = [wanted[i] for i in _spread(len(wanted), most)]
        if hasattr(file, "seek"):
            file.seek(0)
        with av.open(file) as opened:
            taken = set(chosen)
            decoded = enumerate(opened.decode(video=0))
            frames = [_upright(frame) for i, frame in decoded if i in taken]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"no video that can be decoded ({error})") from error
    if len(frames) != len(chosen):
        raise ValueError(f"a video that breaks off after {len(frames)} of {len(chosen)} frames")
    return np.stack(frames), VideoMetadata(total_num_frames=len(times), fps=rate, frames_indices=chosen)


def _upright(frame: Any) -> np.ndarray:
    """Pixels (H, W, 3) uint8 as a player shows them: a phone turns and mirrors by a matrix beside them."""
    pixels: np.ndarray = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    # where a step to the right and a step down lead: (x, y) each
    right, down = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2]
    if abs(right[1]) > abs(right[0]):
        pixels, right, down = pixels.swapaxes(0, 1), down, right
    return np.ascontiguousarray(pixels[:: -1 if down[1] < 0 else 1, :: -1 if right[0] < 0 else 1])


def _natural(path: Path) -> list[Any]:
    """frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]
