"""Verifiable rewards with TRL's signature: `reward(prompts, completions, **columns) -> list[float | None]`.

A completion is a string, or, where the row's prompt is a list of chat messages, a list of one assistant message. Every
column of the rows arrives as a list of the same length. None means that the reward does not apply to that row.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

Reward = Callable[..., "list[float | None]"]
Completion = str | list[dict[str, Any]]


def exact_match(completions: list[Completion], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the final answer is `answer` but for case, spaces, `$`, `*` and a closing full stop, else 0.

    The final answer is the last `\\boxed{}`, else the last `<answer></answer>`, else what follows the last `answer is`,
    `answer:` or `answer` on its line, else the whole completion. None where the row has no `answer`.
    """
    return [
        None if want is None else float(_normal(final_answer(got)) == _normal(str(want)))
        for got, want in zip(map(_content, completions), answer, strict=True)
    ]


def multiple_choice(completions: list[Completion], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the final answer chooses the letter of `answer` (`B`, `(b)`, `B. text`), else 0.

    Without a marked final answer the last capital letter that stands alone counts (but not the word I). None where
    `answer` has no letter.
    """
    rewards: list[float | None] = []
    for got, want in zip(map(_content, completions), answer, strict=True):
        letter, marked = _letter(str(want)), final_answer(got)
        alone = re.findall(r"(?<![\w'])[A-HJ-Z](?![\w'])", marked)
        chosen = _letter(marked) or (alone[-1] if alone else None)
        rewards.append(None if letter is None else float(chosen == letter))
    return rewards


def math_verify(completions: list[Completion], answer: list[Any], **columns: Any) -> list[float | None]:
    """1 where the completion's mathematical answer equals `answer` (as `math-verify` judges), else 0.

    None where the row has no `answer`, or one that `math-verify` cannot parse. Parsing is cut off after a few seconds
    in the main thread; elsewhere there is no such limit, because it needs a signal.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise RuntimeError("math_verify: needs the package math-verify; run: pip install math-verify") from error
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    rewards: list[float | None] = []
    for got, want in zip(map(_content, completions), answer, strict=True):
        # a bare answer is LaTeX only between dollars
        forms = [] if want is None else [f"${want}$", str(want)]
        gold = next(filter(None, (parse(form, parsing_timeout=limit) for form in forms)), None)
        found = gold and verify(gold, parse(got, parsing_timeout=limit), timeout_seconds=limit)
        rewards.append(None if gold is None else float(bool(found)))
    return rewards


def think_format(completions: list[Completion], **columns: Any) -> list[float | None]:
    """1 where the completion is one `<think>…</think>` and then an answer, else 0.

    The opening tag may be missing: chat templates of reasoning models write it at the end of the prompt.
    """
    rewards: list[float | None] = []
    for completion in completions:
        thought, closed, rest = _content(completion).strip().removeprefix("<think>").partition("</think>")
        clean = "<think>" not in thought + rest and "</think>" not in rest
        rewards.append(float(bool(closed and rest.strip() and clean)))
    return rewards


BUILT_IN: dict[str, Reward] = {
    "exact_match": exact_match,
    "multiple_choice": multiple_choice,
    "math_verify": math_verify,
    "format": think_format,
}


def load(name: str) -> Reward:
    """The reward called `name`: a key of `BUILT_IN`, or `module:function`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"rewards: name must be one of {list(BUILT_IN)} or module:function; got {name!r}")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"rewards: {name!r} must be importable; got {error}; is its folder in PYTHONPATH?") from error
    if not callable(reward):
        raise ValueError(f"rewards: {name!r} must be a function; got a {type(reward).__name__}")
    return reward


class Score(NamedTuple):
    total: list[float]
    """Σ_f weight_f · reward_f of each completion; NaN where a problem leaves it without"""
    parts: dict[str, list[float | None]]
    """each function's rewards, by its name"""
    problems: dict[int, str]
    """completion -> why it has no reward"""


def combine(
    functions: list[Reward],
    weights: list[float] | None,
    prompts: list[Any],
    completions: list[Completion],
    columns: dict[str, list[Any]],
) -> Score:
    """Σ_f weight_f · reward_f of every completion, over the functions that apply to its row.

    Args:
        functions: rewards with TRL's signature, at least one; coroutine functions too.
        weights: one for each function; None is 1 each.
        prompts, completions: the same number of each.
        columns: name -> one value for each completion.

    A completion for which a function raises, or gives no finite number, or to which none applies, is a problem of that
    completion alone. Raises `ValueError` where a function returns no list, or one of another length.
    """
    if not functions:
        raise ValueError("combine: functions must name at least one reward; got none")
    weights = [1.0] * len(functions) if weights is None else weights
    if len(weights) != len(functions):
        raise ValueError(f"combine: weights must be one for each of the {len(functions)} rewards; got {len(weights)}")
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    parts: dict[str, list[float | None]] = {}
    problems: dict[int, str] = {}
    totals: list[float | None] = [None] * len(completions)
    for name, function, weight in zip(names, functions, weights, strict=True):
        try:
            parts[name] = call(name, function, prompts, completions, columns)
        except Exception as error:
            if isinstance(error, WrongList):
                raise
            # which completion it was, only one at a time can tell
            parts[name] = [None] * len(completions)
            for i in range(len(completions)):
                row = {column: values[i : i + 1] for column, values in columns.items()}
                try:
                    parts[name][i] = call(name, function, prompts[i : i + 1], completions[i : i + 1], row)[0]
                except Exception as problem:
                    problems[i] = f"{name} raised {type(problem).__name__}: {problem}"
        for i, reward in enumerate(parts[name]):
            if isinstance(reward, int | float) and math.isfinite(reward):
                totals[i] = (totals[i] or 0.0) + weight * float(reward)
            elif reward is not None:
                problems[i] = f"{name} must return finite numbers or None; got {reward!r}"
                parts[name][i] = None
    for i in (i for i, total in enumerate(totals) if total is None):
        problems.setdefault(i, f"one of {names} must apply to every row; got None from all")
    total = [math.nan if i in problems or value is None else value for i, value in enumerate(totals)]
    return Score(total, parts, problems)


class WrongList(ValueError):
    """What a reward returned is not one value for each completion: a fault of the function, not of a row."""


def call(
    name: str, function: Reward, prompts: list[Any], completions: list[Completion], columns: dict[str, list[Any]]
) -> list[float | None]:
    """What `function` gives. Raises `WrongList` for anything but one value a completion."""
    rewards: Any = function(prompts=prompts, completions=completions, **columns)
    if inspect.iscoroutine(rewards):
        rewards = asyncio.run(rewards)
    rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # an array or tensor
    rule = f"combine: {name} must return one reward for each of the {len(completions)} completions"
    if not isinstance(rewards, list | tuple):
        raise WrongList(f"{rule}; got a {type(rewards).__name__}")
    if len(rewards) != len(completions):
        raise WrongList(f"{rule}; got {len(rewards)}")
    # a numpy number or a tensor of one element is a number too
    return [reward.item() if hasattr(reward, "item") else reward for reward in rewards]


def needed(function: Reward) -> set[str]:
    """Columns that a reward asks for by name, without a default."""
    given = {"prompts", "completions", "completion_ids"}
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in parameters if p.kind in kinds and p.default is p.empty} - given


def final_answer(text: str) -> str:
    """The part of a completion that states the answer; see `exact_match`."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + 7 : end]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1]
    *before, stated = re.split(r"\banswer\b(?:\s+is\b)?\s*:?", text, flags=re.IGNORECASE)
    return stated.strip("* \n").partition("\n")[0] if before else text


def _content(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _normal(text: str) -> str:
    return " ".join(text.split()).lstrip("*$ ").rstrip("*$. ").casefold()


def _letter(text: str) -> str | None:
    match = re.fullmatch(r"\W*([A-Za-z])(?:[).:\]*]+.*|\W*)", text.strip(), re.DOTALL)
    return match[1].upper() if match else None
