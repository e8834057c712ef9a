"""A branch: one policy with its own data and optimiser.

Everything the loop asks of a model is one of four verbs here: `rollout` samples, `score` judges another branch's
rollout, `learn` makes the optimiser step, `state` saves. Placing a branch elsewhere means moving these four.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from copd.batch import Batch, NonFiniteLoss, draw
from copd.config import Config
from copd.distill import TeacherScore, delta, divergence_loss
from copd.model import hidden_states
from copd.rlvr import advantages, deviation, policy_loss, token_weights
from copd.rollout import Rollout, generate, rewards, seed_of, special_tokens
from copd.task import Prompt, Task
from copd.weights import Weights, Whole
from copd_kernels import Head, agreement, logprob


class Branch:
    """One policy. `tasks` are the domains it owns: one, or all of them for mixed RLVR, taken in turn."""

    def __init__(
        self,
        name: str,
        tasks: list[Task],
        model: PreTrainedModel | Weights,
        processor: Any,
        cfg: Config,
        device: torch.device,
    ) -> None:
        self.name, self.tasks, self.cfg, self.device = name, tasks, cfg, device
        self.weights: Weights = Whole(model) if isinstance(model, PreTrainedModel) else model
        self.model = model = self.weights.model
        self.processor, self.special = processor, special_tokens(model, processor)
        self.updates = 0  # optimiser steps of this process
        self.frozen: Weights | None = None  # those of the phase's start, for `opd.teacher: phase_start`
        if cfg.model.freeze_vision and hasattr(model.model, "visual"):
            model.model.visual.requires_grad_(False)
        if cfg.model.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.to("cpu" if cfg.offload else device)  # type: ignore[arg-type]  # transformers wraps `to`
        self.parameters = self.weights.parameters()
        # fp32 weights of the optimiser; the model computes with their rounding when it is bf16
        self.master = [
            p if cfg.model.dtype == "float32" else p.detach().to(torch.float32, copy=True) for p in self.parameters
        ]
        self.rounded = [(p, m) for p, m in zip(self.parameters, self.master, strict=True) if p is not m]
        model.to(getattr(torch, cfg.model.dtype))
        first_beta, second_beta = cfg.optim.betas
        self.optimizer = torch.optim.AdamW(
            [{"params": self.master}],  # none of a base or a merged model, which is but evaluated
            lr=cfg.optim.lr,
            betas=(first_beta, second_beta),
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
        )

    def task_of(self, step: int) -> Task:
        return self.tasks[step % len(self.tasks)]

    def rollout(self, prompts: list[Prompt], seed: int, samples: int | None = None, greedy: bool = False) -> Rollout:
        """Completions of this policy, `cfg.rollout.samples` a prompt unless said otherwise."""
        samples = samples or self.cfg.rollout.samples
        with self.active():
            return generate(self.model, prompts, samples, self.cfg.rollout, self.special, seed, greedy)

    def native_batch(self, step: int) -> Batch:
        """Rollouts on this branch's own prompts, with group advantages from its reward."""
        task, cfg = self.task_of(step), self.cfg
        key = (cfg.seed, "native", task.name)
        prompts = draw(task, cfg.rollout.prompts, step // len(self.tasks), *key)
        rollout = self.rollout(prompts, seed_of("sample", *key, step))
        reward = rewards(task, rollout)
        spread = deviation(reward)
        stats = {
            "reward": reward.nanmean().item(),
            "reward_std": spread.mean().item(),
            "frac_reward_zero_std": (spread == 0).float().mean().item(),
        }
        stats |= getattr(task, "reward_stats", {})
        advantage = advantages(reward, cfg.rlvr).flatten().to(rollout.mask.device)
        known = ~reward.isnan().flatten().to(rollout.mask.device)
        return Batch(task.name, rollout, self._weights(rollout, known), advantage=advantage, stats=stats)

    def cross_batch(self, teacher: Branch, step: int, shared_by: int = 1) -> Batch:
        """This policy's rollouts on the teacher's prompts, scored by the teacher as it is now."""
        cfg, task = self.cfg, teacher.task_of(step)
        count = cfg.rollout.prompts
        if cfg.opd.batch == "split":
            count = max(1, count // shared_by)
        key = (cfg.seed, "cross", self.task_of(step).name, task.name)
        rollout = self.rollout(draw(task, count, step, *key), seed_of("sample", *key, step))
        # the sampled signal needs no more of the teacher than its log-probs, but for the logged overlap
        keep = cfg.opd.overlap_tokens if cfg.opd.signal == "sampled" else math.inf
        return Batch(task.name, rollout, self._weights(rollout), teacher=teacher.score(rollout, keep))

    def _weights(self, rollout: Rollout, known: Tensor | None = None) -> Tensor:
        keep = rollout.mask & ~rollout.truncated[:, None] if self.cfg.rollout.mask_truncated else rollout.mask
        return token_weights(keep if known is None else keep & known[:, None], self.cfg.rlvr)

    def head(self, rollout: Rollout, rows: slice, model: PreTrainedModel | None = None) -> tuple[Head, Tensor]:
        """The head over the N completion tokens of `rows`, and those tokens (N,)."""
        model = model or self.model
        hidden = hidden_states(model, rollout.sequences.take(rows))
        mask = rollout.mask[rows]
        # position i predicts token i + 1
        hidden = hidden[:, -mask.shape[1] - 1 : -1][mask]  # (N, D)
        return Head.of(model, hidden), rollout.tokens[rows][mask]

    @torch.no_grad()
    def score(self, rollout: Rollout, keep_tokens: float = math.inf) -> TeacherScore:
        """This branch as teacher of another's rollout: log-probs and heads of this very moment."""
        cfg, weights = self.cfg, self.frozen or self.weights
        keep = self.device if not cfg.offload else torch.device("cpu")
        score, lm_head = TeacherScore(self.name, [], []), None
        with self.active(weights):
            for rows in rollout.sequences.micro_batches(cfg.micro_batch_tokens):
                head, tokens = self.head(rollout, rows, weights.model)
                score.logp.append(logprob(head, tokens, temperature=cfg.rollout.temperature).logp)
                if keep_tokens <= 0:
                    continue
                keep_tokens -= len(tokens)
                if lm_head is None:  # of its own where it trains: a frozen one does not move before students read it
                    lm_head = (head.lm_head.clone() if head.lm_head.requires_grad else head.lm_head).to(keep)
                score.heads.append(replace(head, hidden=head.hidden.to(keep), lm_head=lm_head))
        return score

    def learn(self, batches: list[Batch]) -> dict[str, Any]:
        """`cfg.rlvr.updates_per_batch` steps on the sum of the losses of a step's batches, and what to log of it."""
        start, updates = time.perf_counter(), self.cfg.rlvr.updates_per_batch
        metrics: dict[str, Any] = {"domain": batches[0].domain}
        for batch in batches:
            metrics |= batch.stats if batch.teacher is None else self._agreement(batch.rollout, batch.teacher)
        totals: Counter[str] = Counter()
        with self.active():
            for _ in range(updates):
                with self._seeded():
                    for batch in batches:
                        totals.update(self._backward(batch))
                grad_norm = nn.utils.clip_grad_norm_(self.master, self.cfg.optim.max_grad_norm)
                if not torch.isfinite(grad_norm):
                    rule = f"update: gradient of branch {self.name!r} must be finite"
                    raise NonFiniteLoss(f"{rule}; got {grad_norm}", batches[-1])
                self.updates += 1
                self.optimizer.step()
                self.optimizer.zero_grad()
                self._publish()
        metrics |= {name: value / updates for name, value in totals.items()}
        for name in ("kl", "overlap"):
            if values := [value for key, value in metrics.items() if key.startswith(f"{name}/")]:
                metrics[name] = sum(values) / len(values)
        truncated = torch.cat([batch.rollout.truncated for batch in batches])
        length = torch.cat([batch.rollout.mask.sum(1) for batch in batches]).float()
        weighed = torch.cat([batch.weight.any(1) for batch in batches])
        for kind, lengths in (("", length), ("terminated_", length[~truncated])):
            for name, value in (("mean", torch.mean), ("min", torch.min), ("max", torch.max)):
                metrics[f"completions/{name}_{kind}length"] = value(lengths).item() if len(lengths) else 0.0
        return metrics | {
            "grad_norm": grad_norm.item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "completions/clipped_ratio": truncated.float().mean().item(),
            "completions/weighed_ratio": weighed.float().mean().item(),
            "num_tokens": sum(int(batch.rollout.sequences.attention_mask.sum()) for batch in batches),
            "tokens": int(length.sum()),
            "rollouts": len(truncated),
            "update_time": time.perf_counter() - start,
        }

    def _backward(self, batch: Batch) -> Counter[str]:
        """Adds the gradient of one batch to the master weights; returns what was optimised, part by part."""
        totals: Counter[str] = Counter()
        cfg, rollout, teacher = self.cfg, batch.rollout, batch.teacher
        beta = 1.0 if teacher is None else cfg.opd.branch_beta.get(self.name, cfg.opd.beta)
        # training mode is what switches checkpointing on; dropout would part the ratio from 1
        self.weights.train(cfg.model.activation_checkpointing)
        for micro, rows in enumerate(rollout.sequences.micro_batches(cfg.micro_batch_tokens)):
            mask = rollout.mask[rows]
            head, tokens = self.head(rollout, rows)
            weight = batch.weight[rows][mask]
            parts: dict[str, Tensor] = {}
            if teacher is not None and cfg.opd.signal != "sampled":
                loss = divergence_loss(head, teacher.head(micro, self.device), weight, cfg.rollout.temperature, cfg.opd)
                parts[f"kl/{teacher.name}"] = loss.detach()
            else:
                seen = logprob(head, tokens, temperature=cfg.rollout.temperature)
                old = batch.logp_old.setdefault(micro, seen.logp.detach())
                if teacher is None:
                    assert batch.advantage is not None  # a native batch has one
                    advantage = batch.advantage[rows][:, None].expand(mask.shape)[mask]
                    parts["entropy"] = (weight * seen.entropy.detach()).sum()
                    parts["sampling_logp_difference"] = (weight * (old - rollout.logp[rows][mask]).abs()).sum()
                else:
                    advantage = delta(teacher.logp[micro].to(self.device), old, cfg.opd)
                    # the sampled estimate of KL(student || teacher)
                    parts[f"kl/{teacher.name}"] = -(weight * advantage).sum()
                loss, clipped = policy_loss(
                    seen.logp, old, advantage, weight, cfg.rlvr, clip=teacher is None or cfg.opd.clip_ratio
                )
                parts |= clipped if teacher is None else {}
            parts["loss/rlvr" if teacher is None else "loss/opd"] = parts["loss"] = beta * loss.detach()
            if not torch.isfinite(loss.detach()):
                rule = f"update: loss of branch {self.name!r} must be finite"
                raise NonFiniteLoss(f"{rule}; got {loss.item()} from {batch}", batch)
            (beta * loss).backward()
            self._collect()
            for name, value in parts.items():
                totals[name] += value.item()  # type: ignore[assignment]  # a Counter adds floats as well
        return totals

    def _collect(self) -> None:
        """Adds bf16 gradients to the fp32 ones of the master weights."""
        for parameter, master in self.rounded:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def _publish(self) -> None:
        """Rounds the master weights into the model."""
        for parameter, master in self.rounded:
            parameter.data.copy_(master)

    def _agreement(self, rollout: Rollout, teacher: TeacherScore) -> dict[str, float]:
        """Top-k overlap with, and δ of, a cross batch's teacher before the update, on the first tokens of the batch."""
        name = teacher.name
        sums, deltas = self.compare(rollout, teacher, self.cfg.opd.overlap_tokens)
        if not len(deltas):
            return {}
        ends = {f"delta_min/{name}": deltas.min().item(), f"delta_max/{name}": deltas.max().item()}
        return {f"overlap/{name}": sums[0] / len(deltas)} | ends

    @torch.no_grad()
    def compare(self, rollout: Rollout, teacher: TeacherScore, limit: float = math.inf) -> tuple[list[float], Tensor]:
        """On the first N tokens of a rollout, at most `limit`: sums of overlap, forward and reverse KL; and δ (N,)."""
        sums, deltas, temperature = [0.0] * 3, [torch.empty(0)], self.cfg.rollout.temperature
        with self.active():
            for micro, rows in enumerate(rollout.sequences.micro_batches(self.cfg.micro_batch_tokens)):
                if limit <= 0:
                    break
                head, tokens = self.head(rollout, rows)
                tokens = tokens[: int(min(limit, len(tokens)))]
                student, other = (
                    replace(h, hidden=h.hidden[: len(tokens)]) for h in (head, teacher.head(micro, self.device))
                )
                seen = agreement(student, [other], k=self.cfg.eval.top_k, temperature=temperature)
                sums = [total + value.sum().item() for total, value in zip(sums, seen, strict=True)]
                logp = logprob(student, tokens, temperature=temperature).logp
                deltas.append((teacher.logp[micro][: len(tokens)].to(logp.device) - logp).cpu())
                limit -= len(tokens)
        return sums, torch.cat(deltas)

    def freeze(self) -> Weights:
        """Keeps a copy of the weights as they are now, to teach with until `thaw`."""
        self.frozen = self.weights.copy()
        return self.frozen

    def thaw(self) -> None:
        if self.frozen is not None:
            self.frozen.remove()
        self.frozen = None

    def state(self) -> dict[str, Any]:
        return {
            "weights": self.weights.state(),
            "master": self.master,
            "optimizer": self.optimizer.state_dict(),
            "frozen": self.frozen and self.frozen.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.weights.load_state(state["weights"])
        for master, saved in zip(self.master, state["master"], strict=True):
            master.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["frozen"] is not None:
            self.freeze().load_state(state["frozen"])

    @contextmanager
    def active(self, weights: Weights | None = None) -> Iterator[None]:
        """The model is on the device and has the branch's weights, or those given, for the length of the block."""
        weights = weights or self.weights
        with self.on_device(), weights.active():
            weights.model.eval()
            yield

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Dropout draws from the run's seed and the number of updates: nothing to save, nothing another can shift."""
        done = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_of(self.cfg.seed, "dropout", done))
            yield

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """With `cfg.offload`, the branch visits its device for the length of the block."""
        here = self.model.get_input_embeddings().weight.device
        if not self.cfg.offload or here.type == self.device.type:
            yield
            return
        self._move(self.device)
        try:
            yield
        finally:
            self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        self.model.to(device)  # type: ignore[arg-type]  # transformers wraps `to`
        if self.frozen is not None:
            self.frozen.model.to(device)  # type: ignore[arg-type]  # transformers wraps `to`
        for master in self.master:
            master.data = master.data.to(device)
        # loading casts the moments to where their weights are
        self.optimizer.load_state_dict(self.optimizer.state_dict())
