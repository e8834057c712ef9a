"""Measuring: accuracy on held-out prompts, and how far branches are from each other."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from copd import files, topology
from copd.branch import Branch
from copd.coevolve import Plan
from copd.distill import TeacherScore, Told
from copd.log import Log
from copd.peers import Peers
from copd.ranks import Place
from copd.rollout import Rollout, completions, rewards, seed_of
from copd.schema import digest
from copd.task import Prompt, Task
from copd_kernels import Head, agreement

logger = logging.getLogger("copd")
Record = dict[str, Any]


def measure(plan: Plan, tasks: Mapping[str, Task], log: Log, step: int) -> None:
    """Accuracy of every branch on every domain, and divergence along the edges of the topology, where due.

    What the log already holds of this step is not measured again.
    """
    last, cfg = step == plan.steps, plan.branches[0].cfg
    if _due(step, cfg.eval.every, last):
        here, names = {branch.name: branch for branch in plan.models(step)}, plan.names(step)
        if cfg.eval.merged and plan.merge is not None and plan.student is None:
            names.append("merged")
            if merged := plan.merge("merged", False):
                here["merged"] = merged
        due = [
            (branch, domain)
            for branch in names
            for domain in tasks
            if not log.last("eval", step=step, branch=branch, domain=tasks[domain].name)
        ]

        def work(item: tuple[str, str]) -> Record:
            return accuracy(here[item[0]], tasks[item[1]], cfg.eval.curve_prompts, 1)[0]

        for _, record in plan.place.each(due, work):
            log.write("eval", step, record)
    if _due(step, cfg.eval.every if cfg.eval.divergence_every is None else cfg.eval.divergence_every, last):
        divergences(plan, tasks, log, step)


def divergences(plan: Plan, tasks: Mapping[str, Task], log: Log, step: int) -> list[Record]:
    """Divergence along the edges of the topology after `step` steps, where the log does not hold it yet."""
    branches = {branch.name: branch for branch in plan.branches}
    cfg, device = plan.branches[0].cfg, plan.branches[0].device
    edges = [
        (student, teacher)
        for student, teachers in topology.teachers(cfg).items()
        for teacher in teachers
        if {student, teacher} <= plan.place.owner.keys()
        and not log.last("divergence", step=step, student=student, teacher=teacher)
    ]
    asked: dict[tuple[str, str], tuple[Rollout, Peers]] = {}

    def ask(edge: tuple[str, str]) -> Rollout:
        task, student = tasks[edge[0]], branches[edge[0]]
        rows, first, peers = _shared(student, task, cfg.eval.divergence_prompts)
        rollout = student.rollout(rows, seed_of("divergence", task.name), first=first)
        asked[edge] = rollout, peers
        return rollout

    def answer(edge: tuple[str, str], rollout: Rollout, keep: torch.device) -> Told:
        return branches[edge[1]].score(rollout, keep=keep).apart()

    found = {}
    for edge, (score, states) in plan.place.exchange(edges, ask, answer, device):
        (rollout, peers), score = asked.pop(edge), replace(score, states=states)
        found[edge] = divergence(branches[edge[0]], rollout, score, tasks[edge[0]], peers)
    plan.place.settle()
    for record in plan.place.union(found, edges).values():
        log.write("divergence", step, record)
    return [record for record in log.of("divergence") if record["step"] == step]


def _due(step: int, every: int, last: bool) -> bool:
    return bool(every) and (last or step % every == 0)


def final(
    models: list[Branch], names: list[str], tasks: list[Task], log: Log, path: Path, place: Place
) -> tuple[dict[str, dict[str, Record]], list[Record]]:
    """Model -> domain -> accuracy at the end of a run, of all models by `names`, and the samples to show.

    `models` are those that live here. `path` keeps what is done, for the process that takes over from one that ended.
    """
    cfg, here, by_name = models[0].cfg, {branch.name: branch for branch in models}, {task.name: task for task in tasks}
    state: dict[str, Any] = {"of": digest(cfg.eval, cfg.merge, log.total), "final": {}, "samples": []}
    saved = place.told(lambda: json.loads(path.read_text()) if path.exists() else state)
    if saved["of"] == state["of"]:
        state = saved
    everything = [(name, domain) for name in names for domain in by_name]

    def work(item: tuple[str, str]) -> tuple[Record, list[Record]]:
        return accuracy(here[item[0]], by_name[item[1]], cfg.eval.prompts, cfg.eval.samples)

    due = [(name, domain) for name, domain in everything if domain not in state["final"].get(name, {})]
    for (name, domain), (record, shown) in place.each(due, work):
        state["final"].setdefault(name, {})[domain] = record
        state["samples"] += shown
        if place.first:
            files.write(path, json.dumps(state))
    for name, domain in everything:
        record = state["final"][name][domain]
        if not log.last("final", step=log.total, **record):
            log.write("final", log.total, record)
        logger.info("final: %s on %s: reward %.3f", name, domain, record["reward"])
    return state["final"], state["samples"]


def accuracy(branch: Branch, task: Task, prompts: int, samples: int) -> tuple[Record, list[Record]]:
    """Mean reward on the task's first test prompts, sampled and greedy, and a few samples to show.

    Where every reward is 0 or 1 the mean is an accuracy too, and called so. Ranks of a branch share the prompts.
    """
    rows, first, peers = _shared(branch, task, prompts)

    def mine() -> tuple[list[Record], list[Tensor]]:
        sampled = branch.rollout(rows, seed_of("test", task.name), samples, first=first)
        greedy = branch.rollout(rows, 0, 1, greedy=True, first=first)
        reward, best = rewards(task, sampled), rewards(task, greedy)
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
            for row, text, score in list(zip(rows, texts, scores, strict=True))[: max(0, branch.cfg.eval.shown - first)]
        ]
        return shown, [reward, best, sampled.truncated.cpu(), sampled.mask.sum(1).cpu()]

    everyones = peers.all(peers.together(mine))
    reward, best, truncated, length = (torch.cat(x) for x in zip(*(found for _, found in everyones), strict=True))
    means = {"": reward.nanmean().item(), "_greedy": best.nanmean().item()}
    record = {
        "branch": branch.name,
        "domain": task.name,
        "samples": reward.numel(),
        "clipped_ratio": truncated.float().mean().item(),
        "mean_length": length.float().mean().item(),
    }
    record |= {f"reward{how}": mean for how, mean in means.items()}
    known = torch.cat([reward.flatten(), best.flatten()])
    if ((known == 0) | (known == 1) | known.isnan()).all():  # right or wrong
        record |= {f"accuracy{how}": mean for how, mean in means.items()}
    return record, [sample for shown, _ in everyones for sample in shown]


def _shared(branch: Branch, task: Task, prompts: int) -> tuple[list[Prompt], int, Peers]:
    """This rank's share of a task's first test prompts, how many come before it, and who has the rest."""
    count = min(prompts, task.size("test"))
    peers = branch.peers.over(count)
    share = peers.share(count)
    return [task.prompt(i, "test") for i in range(share.start, share.stop)], share.start, peers


@torch.no_grad()
def divergence(student: Branch, rollout: Rollout, teacher: TeacherScore, task: Task, peers: Peers) -> Record:
    """Top-k overlap and KLs between two branches at the tokens that `student`, or its `peers`, sampled on test prompts.

    `symmetric_kl` is forward + reverse, not halved.
    """
    cfg, sums, count = student.cfg, [0.0] * 3, 0
    with student.active():
        for micro, rows in enumerate(rollout.micro_batches(cfg.micro_batch_tokens)):
            head, tokens = student.head(rollout, rows)
            other = teacher.head(micro, student.device)
            assert isinstance(other, Head)  # measured between whole distributions, whatever is told in training
            seen = agreement(head, [other], k=cfg.eval.top_k, temperature=cfg.rollout.temperature)
            sums = [total + value.sum().item() for total, value in zip(sums, seen, strict=True)]
            count += len(tokens)
    totals = torch.stack(peers.all(torch.tensor([*sums, count], dtype=torch.float64))).sum(0)
    overlap, forward_kl, reverse_kl = (totals[:3].float() / totals[3].float()).tolist()
    return {
        "student": student.name,
        "teacher": teacher.name,
        "domain": task.name,
        "overlap": overlap,
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "symmetric_kl": forward_kl + reverse_kl,
        "tokens": int(totals[3]),
    }


def data_uri(image: np.ndarray) -> str:
    """A PNG of (H, W, 3) uint8 for a web page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
