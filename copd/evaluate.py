"""Measuring: accuracy on held-out prompts, and how far branches are from each other."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from copd.branch import Branch
from copd.rollout import completions, rewards, seed_of
from copd.tasks import Task
from copd_kernels import agreement

Record = dict[str, Any]


def accuracy(branch: Branch, task: Task, prompts: int, samples: int) -> tuple[Record, list[Record]]:
    """Mean reward on the task's first test prompts, sampled and greedy; and a few samples to show."""
    cfg = branch.cfg
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
    shown = [
        {
            "branch": branch.name,
            "domain": task.name,
            "index": row.index,
            "prompt": row.text,
            "completion": text,
            "answer": str(row.columns.get("answer", "")),
            "reward": value,
            "images": [data_uri(image) for image in row.images],
        }
        for row, text, value in zip(
            rows[: cfg.eval.shown], completions(task, sampled)[::samples], reward[:, 0].tolist(), strict=False
        )
    ]
    return record, shown


@torch.no_grad()
def divergence(student: Branch, teacher: Branch, task: Task) -> Record:
    """Top-k overlap and KLs between two branches at the tokens that `student` samples on the task's test prompts.

    `symmetric_kl` is forward + reverse, not halved.
    """
    cfg = student.cfg
    rows = [task.prompt(i, "test") for i in range(min(cfg.eval.divergence_prompts, task.size("test")))]
    rollout = student.rollout(rows, seed_of("divergence", task.name))
    score = teacher.score(rollout)
    totals = torch.zeros(3)
    with student.on_device():
        for micro, part in enumerate(rollout.sequences.micro_batches(cfg.micro_batch_tokens)):
            seen = agreement(
                student.head(rollout, part)[0],
                [score.head(micro, student.device)],
                k=cfg.eval.top_k,
                temperature=cfg.rollout.temperature,
            )
            totals += torch.stack([value.sum().cpu() for value in seen])
    tokens = int(rollout.mask.sum())
    overlap, forward_kl, reverse_kl = (totals / tokens).tolist()
    return {
        "student": student.name,
        "teacher": teacher.name,
        "domain": task.name,
        "overlap": overlap,
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "symmetric_kl": forward_kl + reverse_kl,
        "tokens": tokens,
    }


def data_uri(image: np.ndarray) -> str:
    """A PNG of (H, W, 3) uint8 for a web page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
