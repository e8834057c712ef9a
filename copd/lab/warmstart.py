"""The base of the synthetic suites: a tiny model that imitates worked answers, well and then carelessly.

Stage 1 imitates correct solutions until every domain is answered; stage 2 imitates an annotator who slips
(`copd.lab.tasks.synthetic`). The result is cached by configuration, task and seed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from copd.lab.config import LabConfig
from copd.lab.tasks.synthetic import SyntheticTask
from copd.model import collate, hidden_states, load_saved
from copd.rollout import generate, rewards, seed_of, special_tokens
from copd.schema import digest
from copd.task import Task
from copd_kernels import Head, logprob

logger = logging.getLogger("copd")
WARM = "warm start:"
"""how its lines in a log begin"""
SLIP_LR = (1e-3, 1e-4)
WARMUP_STEPS = 50


def warm_start(model: PreTrainedModel, processor: Any, tasks: list[Task], cfg: LabConfig) -> PreTrainedModel:
    """The warm-started base, from the cache where it has been made before."""
    if cfg.warmstart.clean_steps == 0:
        return model
    synthetic = [task for task in tasks if isinstance(task, SyntheticTask)]
    if len(synthetic) < len(tasks):
        rule = "warm start: tasks must offer worked solutions, as synthetic ones do"
        (first, *_) = (task.name for task in tasks if task not in synthetic)
        raise ValueError(f"{rule}; got {first!r}; set warmstart.clean_steps=0")
    branches = {name: [branch.task, dict(branch.options)] for name, branch in cfg.branches.items()}
    made_of = (replace(cfg.model, adapter=None), replace(cfg.warmstart, cache_dir=""), branches, cfg.seed)
    cached = Path(cfg.warmstart.cache_dir) / digest(*made_of)
    if not cached.exists():
        history = _train(model, processor, synthetic, cfg)
        # several runs of a study may get here at once: whoever renames first wins
        scratch = cached.with_name(f"{cached.name}-{os.getpid()}")
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        (scratch / "accuracy.json").write_text(json.dumps(history))
        try:
            scratch.rename(cached)
        except OSError:
            shutil.rmtree(scratch)
    return load_saved(cached)[0].to(model.device)  # type: ignore[arg-type]  # transformers wraps `to`


def _train(
    model: PreTrainedModel, processor: Any, tasks: list[SyntheticTask], cfg: LabConfig
) -> list[dict[str, float]]:
    """Warm-starts `model` in place; returns the greedy accuracies of the checks in stage 1."""
    warm, special = cfg.warmstart, special_tokens(model, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm.lr, weight_decay=0.01)
    whole = {task.name: warm.domain_batch.get(task.name, warm.batch) for task in tasks}
    batch, history, reached = dict(whole), [], {}

    def update(step: int, lr: float, sizes: dict[str, int], careful: bool) -> None:
        optimizer.param_groups[0]["lr"] = lr
        for task in tasks:
            loss = _imitation_loss(model, task, sizes[task.name], step, careful, special.pad, cfg.seed)
            (loss / len(tasks)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()

    with tqdm(total=warm.clean_steps + warm.slip_steps, desc="warm start", disable=None) as bar:
        for step in range(1, warm.clean_steps + 1):
            update(step - 1, warm.lr * min(1.0, step / WARMUP_STEPS), batch, True)
            if step % warm.check_every == 0:
                for task in tasks:
                    prompts = [task.prompt(i, "test") for i in range(100)]
                    rollout = generate(model, prompts, 1, cfg.rollout, special, 0, greedy=True)
                    reached[task.name] = rewards(task, rollout).mean().item()
                    share = 3 if reached[task.name] >= warm.target_accuracy else 1
                    batch[task.name] = max(1, whole[task.name] // share)
                history.append({"step": step} | reached)
                found = ", ".join(f"{name} {value:.2f}" for name, value in reached.items())
                bar.set_postfix_str(found)
                if bar.disable:
                    logger.info("%s step %d of at most %d, %s", WARM, step, warm.clean_steps, found)
                if min(reached.values()) >= warm.target_accuracy:
                    break
        if bar.disable:
            logger.info("%s %d steps with slips", WARM, warm.slip_steps)
        for after in range(warm.slip_steps):
            update(step + after, SLIP_LR[0] + (SLIP_LR[1] - SLIP_LR[0]) * (after / warm.slip_steps), whole, False)
    return history


def _imitation_loss(
    model: PreTrainedModel, task: SyntheticTask, size: int, step: int, careful: bool, pad: int, seed: int
) -> torch.Tensor:
    """Mean of −log p over the tokens of `size` worked answers."""
    rng = np.random.default_rng(seed_of(seed, "warmstart", task.name, step))
    indices = rng.integers(task.size("train"), size=size).tolist()
    answers = [task.solution(index, rng, careful) for index in indices]
    batch = collate(model, [task.prompt(index) for index in indices], pad, answers)
    hidden, tokens = batch.predicting(hidden_states(model, batch))
    return -logprob(Head.of(model, hidden), tokens).logp.mean()
