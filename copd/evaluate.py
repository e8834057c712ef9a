"""Measuring: accuracy on held-out prompts, and how far branches are from each other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from copd import topology
from copd.branch import Branch
from copd.coevolve import Plan
from copd.log import Log
from copd.rollout import completions, rewards, seed_of
from copd.task import Task

Record = dict[str, Any]


def measure(plan: Plan, tasks: Mapping[str, Task], log: Log, step: int) -> None:
    """Accuracy of every branch on every domain, and divergence along the edges of the topology, where due."""
    branches, last = {branch.name: branch for branch in plan.branches}, step == len(plan.phases)
    cfg = plan.branches[0].cfg
    if _due(step, cfg.eval.every, last):
        for branch in plan.branches:
            for task in tasks.values():
                log.write("eval", step, accuracy(branch, task, cfg.eval.curve_prompts, 1)[0])
    if _due(step, cfg.eval.every if cfg.eval.divergence_every is None else cfg.eval.divergence_every, last):
        for student, teachers in topology.teachers(cfg).items():
            for teacher in teachers:
                if student in branches and teacher in branches:
                    log.write("divergence", step, divergence(branches[student], branches[teacher], tasks[student]))


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def final(models: list[Branch], tasks: list[Task]) -> tuple[dict[str, dict[str, Record]], list[Record]]:
    """Model -> domain -> accuracy at the end of a run, and the samples to show."""
    found: dict[str, dict[str, Record]] = {}
    samples = []
    for branch in models:
        found[branch.name] = {}
        for task in tasks:
            cfg = branch.cfg.eval
            found[branch.name][task.name], shown = accuracy(branch, task, cfg.prompts, cfg.samples)
            samples += shown
    return found, samples


def accuracy(branch: Branch, task: Task, prompts: int, samples: int) -> tuple[Record, list[Record]]:
    """Mean reward on the task's first test prompts, sampled and greedy; and a few samples to show."""
    rows = [task.prompt(i, "test") for i in range(min(prompts, task.size("test")))]
    sampled = branch.rollout(rows, seed_of("test", task.name), samples)
    greedy = branch.rollout(rows, 0, 1, greedy=True)
    reward = rewards(task, sampled)
    record = {
        "branch": branch.name,
        "domain": task.name,
        "accuracy": reward.mean().item(),
        "accuracy_greedy": rewards(task, greedy).mean().item(),
        "samples": reward.numel(),
        "clipped_ratio": sampled.truncated.float().mean().item(),
        "mean_length": sampled.mask.sum(1).float().mean().item(),
    }
    texts, scores = completions(task, sampled)[::samples], reward[:, 0].tolist()
    shown = [
        {
            "branch": branch.name,
            "domain": task.name,
            "index": row.index,
            "prompt": row.text,
            "completion": text,
            "answer": str(row.columns.get("answer", "")),
            "reward": score,
            "images": [data_uri(image) for image in row.images],
        }
        for row, text, score in list(zip(rows, texts, scores, strict=True))[: branch.cfg.eval.shown]
    ]
    return record, shown


def divergence(student: Branch, teacher: Branch, task: Task) -> Record:
    """Top-k overlap and KLs between two branches at the tokens that `student` samples on the task's test prompts.

    `symmetric_kl` is forward + reverse, not halved.
    """
    rows = [task.prompt(i, "test") for i in range(min(student.cfg.eval.divergence_prompts, task.size("test")))]
    rollout = student.rollout(rows, seed_of("divergence", task.name))
    sums, deltas = student.compare(rollout, teacher.score(rollout))
    overlap, forward_kl, reverse_kl = (torch.tensor(sums) / len(deltas)).tolist()
    return {
        "student": student.name,
        "teacher": teacher.name,
        "domain": task.name,
        "overlap": overlap,
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "symmetric_kl": forward_kl + reverse_kl,
        "tokens": len(deltas),
    }


def data_uri(image: np.ndarray) -> str:
    """A PNG of (H, W, 3) uint8 for a web page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
