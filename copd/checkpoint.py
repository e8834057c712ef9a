"""Resumable checkpoints: `checkpoint-<step>/` with the state of every branch and the config that made it.

Weights, master weights and optimiser are all there is to save: data order and sampling are functions of (seed, step).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from copd.branch import Branch
from copd.config import Config, digest, dump

# settings that may change between a run and its continuation
PLACE = {"name", "output_dir", "variant", "device", "threads"}
HOUSEKEEPING = {"resume", "report_to", "checkpoint_every", "keep_checkpoints"}


def identity(cfg: Config) -> str:
    """Names what a checkpoint must agree on with the run that continues it."""
    return digest({key: value for key, value in asdict(cfg).items() if key not in PLACE | HOUSEKEEPING})


def save(directory: Path, step: int, branches: list[Branch], cfg: Config) -> Path:
    """Writes `checkpoint-<step>` whole or not at all, and removes the oldest beyond `cfg.keep_checkpoints`."""
    target = directory / f"checkpoint-{step}"
    scratch = directory / f".checkpoint-{step}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    states = {branch.name: branch.state() for branch in branches}
    torch.save({"step": step, "identity": identity(cfg), "branches": states}, scratch / "state.pt")
    (scratch / "config.yaml").write_text(dump(cfg))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    for old in found(directory)[: -cfg.keep_checkpoints or None]:
        if old != target:
            shutil.rmtree(old)
    return target


def found(directory: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def load(path: Path, branches: list[Branch], cfg: Config) -> int:
    """Restores all branches; returns the steps done. Raises `ValueError` for a checkpoint of another config."""
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if saved["identity"] != identity(cfg):
        raise ValueError(
            f"resume: config must be the one {path} was written with (see its config.yaml); got another; "
            "choose another name, or resume=false"
        )
    for branch in branches:
        branch.load_state(saved["branches"][branch.name])
    return saved["step"]
