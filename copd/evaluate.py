"""Measuring: accuracy on held-out prompts, and how far branches are from each other."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from copd import files, topology
from copd.branch import Branch
from copd.coevolve import Plan
from copd.log import Log
from copd.rollout import completions, rewards, seed_of
from copd.schema import digest
from copd.task import Task

logger = logging.getLogger("copd")
Record = dict[str, Any]


def measure(plan: Plan, tasks: Mapping[str, Task], log: Log, step: int) -> None:
    """Accuracy of every branch on every domain, and divergence along the edges of the topology, where due.

    What the log already holds of this step is not measured again.
    """
    last, cfg = step == plan.steps, plan.branches[0].cfg
    if _due(step, cfg.eval.every, last):
        models = plan.models(step)
        if cfg.eval.merged and plan.merge is not None and plan.student is None:
            models = [*models, plan.merge("merged", False)]
        for branch in models:
            for task in tasks.values():
                if not log.last("eval", step=step, branch=branch.name, domain=task.name):
                    log.write("eval", step, accuracy(branch, task, cfg.eval.curve_prompts, 1)[0])
    if _due(step, cfg.eval.every if cfg.eval.divergence_every is None else cfg.eval.divergence_every, last):
        divergences(plan, tasks, log, step)


def divergences(plan: Plan, tasks: Mapping[str, Task], log: Log, step: int) -> list[Record]:
    """Divergence along the edges of the topology after `step` steps, where the log does not hold it yet."""
    branches = {branch.name: branch for branch in plan.branches}
    for student, teachers in topology.teachers(plan.branches[0].cfg).items():
        for teacher in teachers:
            measured = log.last("divergence", step=step, student=student, teacher=teacher)
            if student in branches and teacher in branches and not measured:
                log.write("divergence", step, divergence(branches[student], branches[teacher], tasks[student]))
    return [record for record in log.of("divergence") if record["step"] == step]


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def final(
    models: list[Branch], tasks: list[Task], log: Log, path: Path
) -> tuple[dict[str, dict[str, Record]], list[Record]]:
    """Model -> domain -> accuracy at the end of a run, and the samples to show.

    `path` keeps what is done, model by model, for the process that takes over from one that ended here.
    """
    cfg = models[0].cfg
    state: dict[str, Any] = {"of": digest(cfg.eval, cfg.merge, log.total), "final": {}, "samples": []}
    if path.exists() and (saved := json.loads(path.read_text()))["of"] == state["of"]:
        state = saved
    for branch in models:
        found = state["final"].setdefault(branch.name, {})
        for task in tasks:
            if task.name not in found:
                found[task.name], shown = accuracy(branch, task, cfg.eval.prompts, cfg.eval.samples)
                state["samples"] += shown
                files.write(path, json.dumps(state))
            record = found[task.name]
            if not log.last("final", step=log.total, **record):
                log.write("final", log.total, record)
            logger.info("final: %s on %s: reward %.3f", branch.name, task.name, record["reward"])
    return state["final"], state["samples"]


def accuracy(branch: Branch, task: Task, prompts: int, samples: int) -> tuple[Record, list[Record]]:
    """Mean reward on the task's first test prompts, sampled and greedy, and a few samples to show.

    Where every reward is 0 or 1 the mean is an accuracy too, and called so.
    """
    rows = [task.prompt(i, "test") for i in range(min(prompts, task.size("test")))]
    sampled = branch.rollout(rows, seed_of("test", task.name), samples)
    greedy = branch.rollout(rows, 0, 1, greedy=True)
    reward, best = rewards(task, sampled), rewards(task, greedy)
    means = {"": reward.nanmean().item(), "_greedy": best.nanmean().item()}
    record = {
        "branch": branch.name,
        "domain": task.name,
        "samples": reward.numel(),
        "clipped_ratio": sampled.truncated.float().mean().item(),
        "mean_length": sampled.mask.sum(1).float().mean().item(),
    }
    record |= {f"reward{how}": mean for how, mean in means.items()}
    known = torch.cat([reward.flatten(), best.flatten()])
    if ((known == 0) | (known == 1) | known.isnan()).all():  # right or wrong
        record |= {f"accuracy{how}": mean for how, mean in means.items()}
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
