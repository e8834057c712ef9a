"""Rows as data sets spell them, in one form: names of TRL, verl and EasyR1, OpenAI's parts, `<image>` in the text."""

from __future__ import annotations

import re
from typing import Any

from copd import media
from copd.settings import DataConfig

# our column <- theirs; a dot reaches into a column
FORMATS = {"trl": {}, "verl": {"answer": "reward_model.ground_truth"}, "easyr1": {"prompt": "problem"}}
MEDIA_COLUMNS = ("images", "image", "videos", "video")
PARTS = {"image": "image", "image_url": "image", "input_image": "image", "video": "video", "video_url": "video"}
LITERAL = re.compile("<(image|video)>")


def named(row: dict[str, Any], cfg: DataConfig) -> dict[str, Any]:
    """The row under our names; without those that the config maps to nothing."""
    found = dict(row)
    for ours, theirs in (FORMATS[cfg.format] | cfg.columns).items():
        value: Any = row if theirs else None
        for part in theirs.split(".") if theirs else ():
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[ours] = value
        elif ours in cfg.columns:  # a format's are read where they are there
            found.pop(ours, None)
    return found


def unused(row: dict[str, Any], cfg: DataConfig) -> str | None:
    """A column that looks like pictures or videos, and is none that we read or were told to leave."""
    told = {theirs.partition(".")[0] for theirs in (FORMATS[cfg.format] | cfg.columns).values() if theirs}
    left = cfg.columns.keys() | told | {*MEDIA_COLUMNS, "prompt"}
    return next((name for name, value in row.items() if name not in left and media.like(value)), None)


def media_of(row: dict[str, Any]) -> dict[str, list[Any]]:
    """The images and videos of a row's columns. A list of frames is one video."""
    found = {"image": row.get("images") or row.get("image") or [], "video": row.get("videos") or []}
    if row.get("video"):
        found["video"] = [row["video"]]
    return {kind: items if isinstance(items, list) else [items] for kind, items in found.items()}


def placed(messages: list[dict[str, Any]], held: dict[str, list[Any]]) -> tuple[list[dict[str, Any]], dict[str, list]]:
    """Messages whose contents are parts of three types, text, image and video; and their media, in that order.

    `<image>` and `<video>` in the text are places where the row's columns have media and no part has a place for them;
    media without any place come before the first user turn, as TRL puts them.
    Raises `ValueError` for a part of another type, and for more or fewer places than media.
    """
    parts = [
        part for m in messages if isinstance(m["content"], list) for part in m["content"] if isinstance(part, dict)
    ]
    kinds = {PARTS.get(part.get("type", "")) for part in parts}
    literal = {kind for kind, items in held.items() if items and kind not in kinds}
    left = {kind: list(items) for kind, items in held.items()}
    found: dict[str, list[Any]] = {kind: [] for kind in held}
    places = dict.fromkeys(held, 0)

    def place(kind: str, item: Any) -> dict[str, str]:
        places[kind] += 1
        if item is not None or left[kind]:
            found[kind].append(left[kind].pop(0) if item is None else item)
        return {"type": kind}

    made = []
    for message in messages:
        content = message["content"]
        new: list[dict[str, str]] = []
        for part in [content] if isinstance(content, str) else content:
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            if kind := PARTS.get(part.get("type", "")):
                new.append(place(kind, next((part[key] for key in media.KEYS if part.get(key)), None)))
            elif part.get("type") in ("text", "input_text"):
                for i, piece in enumerate(LITERAL.split(part.get("text") or "")):
                    if i % 2 and piece in literal:
                        new.append(place(piece, None))
                    elif i % 2 or piece:
                        new.append({"type": "text", "text": f"<{piece}>" if i % 2 else piece})
            else:
                raise ValueError(f"messages must have parts of text, image or video; got {part.get('type')!r}")
        made.append(message | {"content": new})
    for kind, items in left.items():
        wanted = len(found[kind]) + len(items)
        if items and not places[kind]:
            user = next(message for message in made if message["role"] == "user")
            user["content"] = [{"type": kind}] * len(items) + user["content"]
            found[kind] = items
        elif places[kind] != wanted:
            raise ValueError(f"messages must place each {kind} once, {wanted} in all; got {places[kind]}")
    return made, found
