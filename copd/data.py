"""Rows from files: JSONL or Hugging Face `datasets`, with images and videos, through the model's processor.

Columns are `prompt` (text or chat messages), `images` (or `image`), `videos` (or `video`), and any other, which the
rewards get; `copd.rows` takes other spellings to these, `copd.media` decodes what they hold, `copd.ahead` before the
step that needs it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from copd import media, rewards, rows
from copd.ahead import Ahead
from copd.apart import Apart
from copd.rows import MEDIA_COLUMNS
from copd.settings import DataConfig
from copd.tables import Rows, read, unseen
from copd.task import Prompt, Split

logger = logging.getLogger("copd")
THUMBNAIL = 256  # pixels of the longer side of the images kept for the report


class FileTask:
    """Rows of files as a `copd.task.Task`. A training row that equals a test row is left out."""

    def __init__(self, name: str, cfg: DataConfig, processor: Any) -> None:
        self.name, self.cfg, self.processor = name, cfg, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.chat = cfg.chat and getattr(processor, "chat_template", None) is not None
        self.placeholders = placeholders(processor, cfg)
        limit = cfg.reward_timeout
        self.functions = [rewards.load(name) if limit is None else Apart(name, limit) for name in cfg.rewards]
        self.reward_stats: dict[str, float] = {}
        """mean and standard deviation of each reward in the last call, for the log"""
        self.overlong: set[tuple[Split, int]] = set()
        """rows that have been replaced by the next one"""
        train = test = read(cfg.path, cfg.split, cfg.config_name)
        if cfg.test_path is None and cfg.test_split is None:
            kept: Sequence[int] = range(len(train) - cfg.test_rows)
            held_out = range(len(kept), len(train))
        else:
            test = read(cfg.test_path or cfg.path, cfg.test_split or cfg.split, cfg.config_name)
            kept, held_out = range(len(train)), range(len(test))
        whole = len(kept)
        kept = unseen(train, kept, test, held_out)
        what = f"{len(kept)} rows to train on, {len(held_out)} to test on"
        logger.info("%s: %s; left out: %d that equal a test row", name, what, whole - len(kept))
        if not (len(kept) and len(held_out)):
            got = f"{len(train)} rows of {cfg.path} and test_rows {cfg.test_rows}"
            raise ValueError(f"{name}: data must leave rows to train on and rows to test on; got {got}")
        self.rows: dict[Split, tuple[Rows, Sequence[int]]] = {"train": (train, kept), "test": (test, held_out)}
        self.files: dict[Split, str] = {"train": cfg.path, "test": cfg.test_path or cfg.path}
        # of a table in memory it is cheap enough to find what is missing before the first step
        checked = {
            split: range(len(indices) if isinstance(table, list) else 1)
            for split, (table, indices) in self.rows.items()
        }
        shown = [self._check(split, index) for split, among in checked.items() for index in among]
        self.ahead = Ahead(self._read, cfg.decode_ahead if any(shown) else 0)

    def size(self, split: Split) -> int:
        return len(self.rows[split][1])

    def prompt(self, index: int, split: Split = "train") -> Prompt:
        """Row `index`; if it is longer than `max_prompt_tokens` that is an error, or the next row that fits."""
        limit = self.cfg.max_prompt_tokens
        for step in range(self.size(split)):
            row = (index + step) % self.size(split)
            # only the row that was asked for has been expected
            prompt = self._prompt(row, split, self._read if step else self.ahead.take)
            if limit is None or len(prompt.input_ids) <= limit:
                return prompt
            if self.cfg.overlong == "error":
                where, length = self._where(split, row), len(prompt.input_ids)
                what = "raise max_prompt_tokens, or set overlong to next"
                raise ValueError(f"{where}: prompt must have at most {limit} tokens; got {length}; {what}")
            if (split, row) not in self.overlong:
                self.overlong.add((split, row))
                rule = f"prompt of {len(prompt.input_ids)} tokens left out for the next that has at most {limit}"
                logger.warning("%s: %s; %d so far", self._where(split, row), rule, len(self.overlong))
        raise ValueError(f"{self.name}: one {split} prompt must have at most {limit} tokens; got none")

    def expect(self, indices: Iterable[int]) -> None:
        """Rows to train on that will be asked for next, in this order: their media may be decoded ahead."""
        self.ahead.expect((index, "train") for index in indices)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def reward(self, prompts: list[Prompt], completions: list[str]) -> list[float]:
        """The weighted sum of `cfg.rewards`, which see prompts and completions as chats where the file has chats.

        NaN, and a line in the log, for a completion that has no reward. Raises `ValueError` where those are more than a
        share of `cfg.max_failed_rewards`.
        """
        names = sorted({name for prompt in prompts for name in prompt.columns})
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        places = [self._place(prompt) for prompt in prompts]
        held = {place: self._row(*place)["prompt"] for place in set(places)}  # a table may decode pictures for it
        asked = [held[place] for place in places]
        answered = [
            text if isinstance(question, str) else [{"role": "assistant", "content": text}]
            for question, text in zip(asked, completions, strict=True)
        ]
        score = rewards.combine(self.functions, self.cfg.reward_weights, asked, answered, columns)
        problems = {self._where(*places[i]): why for i, why in score.problems.items()}
        for where, why in problems.items():
            logger.warning("%s: reward: %s", where, why)
        if len(score.problems) > self.cfg.max_failed_rewards * len(completions):
            where, why = next(iter(problems.items()))
            rule = f"{where}: at most {self.cfg.max_failed_rewards:.0%} of a batch may fail its reward"
            raise ValueError(f"{rule}; got {len(score.problems)} of {len(completions)}; {why}")
        self.reward_stats = {"rewards/failed_ratio": len(score.problems) / len(completions)}
        for name, values in score.parts.items():
            if known := [value for value in values if value is not None]:
                self.reward_stats[f"rewards/{name}/mean"] = float(np.mean(known))
                self.reward_stats[f"rewards/{name}/std"] = float(np.std(known))
        return score.total

    def _place(self, prompt: Prompt) -> tuple[Split, int]:
        return ("train", prompt.index) if prompt.index >= 0 else ("test", -1 - prompt.index)

    def _row(self, split: Split, index: int) -> dict[str, Any]:
        found, indices = self.rows[split]
        return rows.named(found[indices[index]], self.cfg)

    def _where(self, split: Split, index: int) -> str:
        return f"{self.name}: row {self.rows[split][1][index]} of {self.files[split]}"

    def _check(self, split: Split, index: int) -> bool:
        """Whether the row has media.

        Raises `ValueError` for one that no step could use: prompt, media, and the columns that rewards ask for.
        """
        row, where = self._row(split, index), self._where(split, index)
        if not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
            asked = (rows.FORMATS[self.cfg.format] | self.cfg.columns).get("prompt", "prompt")
            raise ValueError(f"{where}: {asked} must be text or a list of messages; got {row.get('prompt')!r}")
        if clash := {"prompts", "completions"} & row.keys():
            rule = "columns must not be called prompts or completions, which every reward is handed"
            raise ValueError(f"{where}: {rule}; got {sorted(clash)[0]!r}")
        for message in [] if isinstance(row["prompt"], str) else row["prompt"]:
            if not (isinstance(message, dict) and "role" in message and isinstance(message.get("content"), str | list)):
                raise ValueError(f"{where}: messages must have a role, and content as text or parts; got {message!r}")
        if not isinstance(row["prompt"], str) and all(message["role"] != "user" for message in row["prompt"]):
            roles = [message["role"] for message in row["prompt"]]
            raise ValueError(f"{where}: messages must hold a user turn; got roles {roles}")
        if name := rows.unused(row, self.cfg):
            rule = f"pictures and videos must be in a column called {', '.join(MEDIA_COLUMNS)}"
            raise ValueError(f"{where}: {rule}; got {name!r}; data.columns tells which is which, or none of them")
        _, held = self._placed(row, where)
        if any(held.values()) and self.processor is self.tokenizer:
            raise ValueError(f"{where}: the model must read images; got a tokenizer alone")
        for kind, items in held.items():
            for item in items:
                self._decoded(kind, item, where, split, media.source)
        missing = [
            rewards.needed(function) - {k for k, v in row.items() if v is not None} for function in self.functions
        ]
        if all(missing):
            got = f"no {sorted(missing[0])[0]} for {self.cfg.rewards[0]}"
            raise ValueError(f"{where}: row must have the columns that one of its rewards asks for; got {got}")
        return any(held.values())

    def _placed(self, row: dict[str, Any], where: str) -> tuple[Any, dict[str, list[Any]]]:
        """The prompt with its media in their places, and those media."""
        prompt, held = row["prompt"], rows.media_of(row)
        if not self.chat:
            if not isinstance(prompt, str):
                raise ValueError(f"{where}: messages must have a chat template; got a model without, or chat false")
            return "\n\n".join(filter(None, [self.cfg.system_prompt, prompt])), held
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.cfg.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.cfg.system_prompt}, *messages]
        try:
            messages, held = rows.placed(messages, held)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        text = "\n".join(part.get("text", "") for message in messages for part in message["content"])
        if self.processor is self.tokenizer:
            joined = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
            messages = [message | {"content": words} for message, words in zip(messages, joined, strict=True)]
        elif typed := [word for word in self.placeholders if word in text]:
            raise ValueError(
                f"{where}: text must not hold the place of a picture or video that is not there; got {typed[0]}"
            )
        return messages, held

    def _decoded(self, kind: str, item: Any, where: str, split: Split, read: Callable[..., Any], *how: Any) -> Any:
        file = Path(self.files[split])
        rule = {
            "image": "be a path, a URL, bytes or a picture",
            "video": "be a file, a folder of frames or a list of them",
        }[kind]
        try:
            return read(item, file if file.is_dir() else file.parent, *how)
        except ImportError:  # of what reads films, for all rows alike
            raise
        except Exception as error:  # whatever a network and decoders of damaged files may raise
            name, got = media.named(item), str(error) or type(error).__name__
            raise ValueError(f"{where}: {kind} must {rule}; got {got}{name and f' from {name}'}") from error

    def _read(self, index: int, split: Split) -> tuple[dict[str, Any], Any, list[Image.Image], list[Any]]:
        """A row, its prompt with the places of its media, and those media; in whichever thread."""
        row, where = self._row(split, index), self._where(split, index)
        placed, held = self._placed(row, where)
        images = [self._decoded("image", item, where, split, media.read_image) for item in held["image"]]
        how = (media.read_video, self.cfg.fps, self.cfg.max_frames)
        return row, placed, images, [self._decoded("video", item, where, split, *how) for item in held["video"]]

    def _prompt(self, index: int, split: Split, read: Callable[..., Any]) -> Prompt:
        row, placed, images, videos = read(index, split)
        where, text = self._where(split, index), self._render(placed)
        inputs: dict[str, Any] = {}
        if images:
            inputs["images"] = images
        if videos:
            frames, metadata = ([video[i] for video in videos] for i in (0, 1))
            inputs |= {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}
        try:
            if inputs:
                inputs = dict(self.processor(text=[text], return_tensors="pt", **inputs))
            else:
                inputs = dict(self.tokenizer([text], return_tensors="pt", add_special_tokens=not self.chat))
        except Exception as error:  # of whatever processor
            raise ValueError(f"{where}: the model's processor must read it; got {error}") from error
        input_ids = inputs.pop("input_ids")[0].tolist()
        kinds = inputs.pop("mm_token_type_ids", inputs.pop("token_type_ids", None))
        shown = images + [Image.fromarray(frame) for frames, _ in videos for frame in frames]
        return Prompt(
            task=self.name,
            where=where,
            index=index if split == "train" else -1 - index,
            text=text,
            input_ids=input_ids,
            mm_token_type_ids=[0] * len(input_ids) if kinds is None else kinds[0].tolist(),
            media={
                name: value for name, value in inputs.items() if name != "attention_mask" and isinstance(value, Tensor)
            },
            columns={name: value for name, value in row.items() if name not in ("prompt", *MEDIA_COLUMNS)},
            images=[_thumbnail(image) for image in shown],
        )

    def _render(self, placed: Any) -> str:
        """The prompt as the model reads it, with one placeholder for each image and video."""
        if not self.chat:
            return str(placed)
        begun = placed[-1]["role"] == "assistant"  # the completion goes on from there
        rendered: str = self.processor.apply_chat_template(
            placed,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **self.cfg.chat_template_kwargs,
        )
        return rendered


def placeholders(processor: Any, cfg: DataConfig) -> set[str]:
    """Words of a text that stand for pictures or videos: the processor's own, and those that data sets use."""
    named = re.compile(r"(\w*image|video|vision\w*|boi|eoi)_token$")
    owners = (processor, getattr(processor, "tokenizer", processor))
    own = {getattr(owner, name, None) for owner in owners for name in dir(owner) if named.match(name)}
    own |= {f"<{kind}>" for kind in ("image", "video") if cfg.columns.get(f"{kind}s", kind) is not None}
    return {word for word in own if isinstance(word, str) and word}


def _thumbnail(image: Image.Image) -> np.ndarray:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)
