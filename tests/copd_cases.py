"""Tiny settings, and the lab's model and tasks, that the tests of the loop share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from copd import checkpoint, schema, train
from copd.batch import Batch
from copd.branch import Branch
from copd.coevolve import Plan
from copd.lab.config import LabConfig
from copd.lab.start import start
from copd.lab.tasks import vocabulary
from copd.lab.tasks.arithmetic import Arithmetic
from copd.lab.tasks.count import Count
from copd.lab.tasks.motion import Motion
from copd.lab.tiny import build_tiny

CPU = torch.device("cpu")
TINY = [
    "threads=1",
    "model.hidden_size=32",
    "model.vision_hidden_size=16",
    "rollout.prompts=2",
    "rollout.samples=3",
    "rollout.max_new_tokens=4",
    "rollout.mask_truncated=false",
    "optim.lr=1e-3",
    "cycles=1",
    "rl_steps=1",
    "opd_steps=1",
    "opd.signal=reverse",
    "eval.prompts=4",
    "eval.samples=1",
    "eval.curve_prompts=2",
    "eval.divergence_prompts=2",
    "eval.shown=1",
]
TASKS = {"text": Arithmetic, "image": Count, "video": Motion, "text2": Arithmetic, "image2": Count}
KINDS = {"text": "arithmetic", "image": "count", "video": "motion", "text2": "arithmetic", "image2": "count"}


def make_config(tmp_path: Path, *overrides: str, domains: tuple[str, ...] = ("text", "image")) -> LabConfig:
    owned = [f"branches.{name}.task={KINDS[name]}" for name in domains]
    place = [f"output_dir={tmp_path}", f"warmstart.cache_dir={tmp_path / 'warmstart'}"]
    return schema.load(LabConfig, None, [*owned, *place, *TINY, *overrides])


def make_branch(cfg: LabConfig, name: str = "text", seed: int = 0, domain: str | None = None) -> Branch:
    model, processor = build_tiny(cfg.model, seed), vocabulary.tokenizer()
    domain = domain or name
    return Branch(name, [TASKS[domain](domain)], model, processor, cfg, CPU)


def make_run(cfg: LabConfig) -> train.Run:
    return train.Run(cfg, *start(cfg, CPU))


def run(cfg: LabConfig) -> dict[str, Any]:
    return train.run(cfg, start)


def save(directory: Path, step: int, plan: Plan, cfg: LabConfig) -> Path:
    """A checkpoint, here and now."""
    return checkpoint.write(directory, checkpoint.take(plan, step), cfg)


def weights(branch: Branch) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in branch.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reward_longer(prompts: list, completions: list[str]) -> list[float]:
    """A reward that random completions of one prompt differ in, so that advantages are not all zero."""
    return [float(sum(map(len, text))) for text in completions]


def scored(batch: Batch, *teachers: Branch) -> Batch:
    """The batch with what its teachers say, as the loop would ask them."""
    lesson = batch.lesson
    for place, teacher in enumerate(teachers):
        rows, heads, opd = lesson.teachers[place].rows, lesson.signal != "sampled", teacher.cfg.opd
        lesson.teachers[place] = teacher.score(batch.rollout, rows, heads, opd.overlap_tokens, opd.teacher_top_k)
    return batch


def cross_batch(student: Branch, owner: Branch, step: int = 0, others: tuple[Branch, ...] = ()) -> Batch:
    teachers = (owner, *others)
    return scored(student.cross_batch(owner.task_of(step), [t.name for t in teachers], step), *teachers)


def routed_batch(student: Branch, owners: list[Branch], step: int = 0) -> Batch:
    return scored(student.routed_batch({owner.name: owner.tasks[0] for owner in owners}, step), *owners)
