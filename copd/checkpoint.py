"""Resumable checkpoints: `checkpoint-<step>/` with a folder for every branch (`copd.state`) and the run's config.

A run goes on from it on as many ranks as there are now. Weights and optimiser are all there is to save: data order and
sampling are functions of (seed, step).
"""

from __future__ import annotations

import logging
import re
import zipfile
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from copd import files, state, tables
from copd.coevolve import Plan
from copd.config import Config
from copd.peers import Peers
from copd.schema import dump
from copd.settings import DataConfig

logger = logging.getLogger("copd")
FORMAT = 3
"""of a checkpoint: 1 has all branches in `state.pt`, 2 a file a branch, 3 a folder of shards a branch"""
# settings that may change between a run and its continuation: where it runs, ...
PLACE = {
    "name",
    "output_dir",
    "variant",
    "arm",
    "device",
    "threads",
    "timeout",
    "resume",
    "report_to",
    "warmstart.cache_dir",
}
# ... what is kept and measured of it, how long it goes on, ...
KEPT = {
    "checkpoint_every",
    "checkpoint_async",
    "keep_checkpoints",
    "checkpoint_required",
    "eval",
    "merge",
    "opd.overlap_tokens",
}
LENGTH = {"cycles", "mixed_steps", "mixed_rollouts", "mopd_steps", "consolidate.steps"}
# ... and what makes room: the sums are the same but for rounding, the samples come from the same distribution
ROOM = {
    "micro_batch_tokens",
    "offload",
    "rollout.cache_tokens",
    "rollout.engine_options",
    "model.activation_checkpointing",
    "model.compile",
}


def identity(cfg: Config) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that continues it: settings, and digests of data and code."""
    free = PLACE | KEPT | LENGTH | ROOM
    if cfg.method != "copd":  # whose phases do not alternate
        free |= {"rl_steps", "opd_steps"}
    if cfg.consolidate.steps:  # the merged model learns
        free -= {"merge"}
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix in free:
            return
        if isinstance(value, DataConfig):
            value = replace(value, decode_ahead=0)  # the same rows
            found.update({f"{prefix}: {what}": digest for what, digest in tables.fingerprint(value).items()})
        if is_dataclass(value):
            for field in fields(value):
                walk(f"{prefix}.{field.name}".strip("."), getattr(value, field.name))
        elif prefix == "branches":
            for name, branch in value.items():
                walk(f"{prefix}.{name}", branch)
        else:
            found[prefix] = value

    walk("", cfg)
    return found


def same(saved: dict[str, Any], cfg: Config, where: str) -> None:
    """Raises `ValueError` naming what changed. Settings that the saved run did not know yet are taken as they are."""
    now = identity(cfg)
    branches = {key for key in saved.keys() ^ now.keys() if key.startswith("branches.") and key.endswith(".task")}
    changed = [key for key in now if key in saved and saved[key] != now[key]] + sorted(branches)
    if changed:
        got = ", ".join(f"{key} {now.get(key)!r} after {saved.get(key)!r}" for key in changed)
        raise ValueError(f"resume: config must be the one of {where}; got {got}; choose another name, or resume=false")


@dataclass(frozen=True)
class Moment:
    """What a checkpoint keeps of a run, after `step` steps."""

    step: int
    phases: list[str]
    branches: dict[str, state.Parts]
    """those that live here"""
    everyone: Peers
    peers: Peers
    """who writes it, and who writes a branch of it"""


def take(plan: Plan, step: int, copy: bool = False) -> Moment:
    """The moment as it is, or a copy of it in host memory, to be written while training goes on."""
    branches = {branch.name: state.parts(branch) for branch in plan.models(step)}
    if copy:
        branches = {name: state.copied(found) for name, found in branches.items()}
    return Moment(step, plan.phases[:step], branches, *plan.place.aside)


def write(directory: Path, moment: Moment, cfg: Config) -> Path:
    """Writes `checkpoint-<step>` whole or not at all, and removes the oldest beyond `cfg.keep_checkpoints`."""
    target, everyone = directory / f"checkpoint-{moment.step}", moment.everyone
    with everyone.folder(target) as scratch:

        def branches() -> dict[str, int]:
            written = (state.write(scratch / folder(name), x, moment.peers) for name, x in moment.branches.items())
            return {file: digest for found in written for file, digest in found.items()}

        mine = everyone.together(branches)
        digests = {file: digest for found in everyone.all(mine) for file, digest in found.items()}
        if everyone.first:
            known = {"format": FORMAT, "step": moment.step, "identity": identity(cfg), "phases": moment.phases}
            torch.save(known | {"digests": digests}, scratch / "state.pt")
            (scratch / "config.yaml").write_text(dump(cfg))
    if everyone.first:
        prune(directory, cfg.keep_checkpoints, target)
    return target


def folder(name: str) -> str:
    return f"branch-{name}"


def prune(directory: Path, keep: int, newest: Path) -> None:
    """Removes the oldest checkpoints beyond `keep`."""
    for old in found(directory)[:-keep]:
        if old != newest:
            files.discard(old)


def found(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; other trainers' folders have another file in them."""
    paths = [file.parent for file in directory.glob("checkpoint-*/state.pt")]
    ours = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(ours, key=lambda path: int(path.name.rpartition("-")[2]))


def resume(directory: Path, plan: Plan, cfg: Config) -> int:
    """Restores the newest checkpoint that can be read; returns the steps done, 0 where there is none."""
    paths = plan.place.told(lambda: found(directory))
    for path in reversed(paths):
        try:
            step = load(path, plan, cfg)
        except (OSError, EOFError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            logger.warning("resume: %s cannot be read (%s)", path, reason)
            continue
        if plan.place.first:
            prune(directory, cfg.keep_checkpoints, path)  # a kill may have come before it
        return step
    if paths:
        raise ValueError(f"resume: a checkpoint in {directory} must be readable; got none; resume=false starts anew")
    return 0


def load(path: Path, plan: Plan, cfg: Config) -> int:
    """Restores all models, wherever they lived, and the phases taken; returns the steps done.

    Raises `ValueError` for a checkpoint of another format or config, `OSError` or `RuntimeError` for a damaged one.
    """

    place = plan.place

    def readable() -> int:
        saved = read(path / "state.pt")
        older = 3 if "digests" in saved else 1 if "branches" in saved else 2  # which did not say so
        if (got := saved.get("format", older)) != FORMAT:
            rule = (
                f"resume: {path} must be a checkpoint of format {FORMAT}; got format {got}, of another version of copd"
            )
            raise ValueError(f"{rule}; go on with that one, or resume=false starts anew")
        same(saved["identity"], cfg, f"{path} (see its config.yaml)")
        step = int(saved["step"])
        if plan.govern is not None:
            plan.phases[:step] = saved["phases"]
        taken = min(step, len(plan.phases))
        if plan.phases[:taken] != saved["phases"][:taken]:
            raise ValueError(f"resume: cycles must leave the {step} steps of {path} what they were; got other phases")
        for name in filter(place.holds, plan.names(step)):
            state.check(path / folder(name), saved["digests"], place.peers)
        return step

    step = place.together(readable)
    models = plan.models(step)

    def restored() -> int:
        for branch in models:
            state.read(path / folder(branch.name), branch)
        return step

    return place.together(restored)


def read(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote. Raises `OSError` for a file that is damaged."""
    try:
        with zipfile.ZipFile(file) as archive:  # torch writes checksums, and does not read them
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"{file} is cut off or no checkpoint: {error}") from error
    if damaged:
        raise OSError(f"{file} is damaged at {damaged}")
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found
