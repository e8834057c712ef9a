"""A branch: one policy with its own data and optimiser.

Everything the loop asks of a model is one of three verbs here: `rollout` samples, `score` judges another branch's
rollout, `learn` makes the optimiser step. `copd.state` saves it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from copd.batch import Batch, NonFiniteLoss, completions, deal, draw
from copd.config import Config
from copd.distill import Lesson, TeacherScore, fixed_weights, likeliest_words, still
from copd.engine import Engine, Transformers
from copd.loss import Parts, loss_of, mismatch
from copd.model import hidden_states
from copd.overlap import overlaps
from copd.peers import Peers
from copd.rlvr import advantages, token_weights
from copd.rollout import Rollout, rewards, seed_of, special_tokens
from copd.task import Prompt, Task
from copd.weights import Weights, Whole, adamw, compile_blocks, set_up
from copd_kernels import Head, TopK, logprob, topk


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
        engine: Engine | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.engine, self.peers = engine or Transformers(cfg.rollout), peers or Peers()
        self.name, self.tasks, self.cfg, self.device = name, tasks, cfg, device
        weights = Whole(model) if isinstance(model, PreTrainedModel) else model
        self.model = model = weights.model
        self.processor, self.special = processor, special_tokens(model, processor)
        self.updates = 0  # optimiser steps of this process
        self.frozen: Weights | None = None  # those of the phase's start, for `opd.teacher: phase_start`
        set_up(model, cfg.model)
        model.to("cpu" if cfg.offload else device)  # type: ignore[arg-type]  # transformers wraps `to`
        if self.peers.mesh is not None:
            from copd.sharded import Sharded  # FSDP2, which it imports, takes a second

            weights = Sharded(model, self.peers, getattr(torch, cfg.model.dtype))
        self.weights: Weights = weights
        self.parameters = weights.parameters()
        exact = cfg.model.dtype == "float32" or self.peers.size > 1  # where FSDP2 rounds for each pass
        # fp32 weights of the optimiser; the model computes with their rounding when it is bf16
        self.master = [p if exact else p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self.rounded = [(p, m) for p, m in zip(self.parameters, self.master, strict=True) if p is not m]
        masters = dict(zip(map(id, self.parameters), self.master, strict=True))
        self.trained = {name: masters[id(p)] for name, p in weights.state().items() if id(p) in masters}
        if not exact:
            model.to(getattr(torch, cfg.model.dtype))
        self.optimizer = adamw(self.master, cfg.optim)

    def task_of(self, step: int) -> Task:
        return self.tasks[step % len(self.tasks)]

    def rollout(
        self, prompts: list[Prompt], seed: int, samples: int | None = None, greedy: bool = False, first: int = 0
    ) -> Rollout:
        """Completions of this policy, `cfg.rollout.samples` a prompt unless said otherwise.

        `first` prompts of the batch are another rank's.
        """
        samples = samples or self.cfg.rollout.samples
        with self.active():
            return self.engine.sample(self.weights, prompts, samples, self.special, seed, greedy, first)

    def _shared(self, prompts: list[Prompt], seed: int) -> Rollout:
        """Completions of this rank's share of a batch."""
        share = self.peers.share(len(prompts))
        return self.rollout(prompts[share], seed, first=share.start)

    def native_batches(self, step: int, end: float = math.inf) -> list[Batch]:
        """A batch of one of this branch's tasks, in turn, or one of each; the next ones come before step `end`."""
        if self.cfg.mixed_batch == "joint":
            return [self.native_batch(step, task, end) for task in self.tasks]
        return [self.native_batch(step, end=end)]

    def native_batch(self, step: int, task: Task | None = None, end: float = math.inf) -> Batch:
        """Rollouts on own prompts, of `task` or of the one whose turn it is, with group advantages from its reward."""
        turns = len(self.tasks) if task is None else 1
        task = task or self.task_of(step)
        key = (self.cfg.seed, "native", task.name)
        prompts = draw(task, self.cfg.rollout.prompts, step // turns, *key, more=step + turns < end)
        rollout = self._shared(prompts, seed_of("sample", *key, step))
        reward = rewards(task, rollout)
        batch = Batch(task.name, rollout, self._weights(rollout, reward))
        batch.rewarded(reward, self.cfg.rlvr, self.peers)
        batch.stats |= getattr(task, "reward_stats", {})
        return batch

    def cross_batch(
        self, task: Task, teachers: Sequence[str], step: int, shared_by: int = 1, end: float = math.inf
    ) -> Batch:
        """This policy's rollouts on `task`, for its owner, who comes first among the teachers, and others to score."""
        cfg, count = self.cfg, self.cfg.rollout.prompts
        turns = 1 if cfg.mixed_batch == "joint" else len(self.tasks)
        if cfg.opd.batch == "split":
            count = max(1, count // shared_by)
        own = task if len(self.tasks) > 1 else self.tasks[0]
        key = (cfg.seed, "cross", own.name, task.name)
        prompts = draw(task, count, step, *key, every=turns, more=step + turns < end)
        rollout = self._shared(prompts, seed_of("sample", *key, step))
        lesson = Lesson(
            [TeacherScore(name) for name in teachers], cfg.opd.signal, fixed_weights(len(teachers), cfg.opd)
        )
        weight = self._weights(rollout)
        if len(teachers) > 1 and cfg.opd.teacher_weight == "better":
            lesson.advantage = advantages(rewards(task, rollout), cfg.rlvr).flatten().to(weight.device)
        return Batch(task.name, rollout, weight, lesson=lesson)

    def routed_batch(self, owners: Mapping[str, Task], step: int, end: float = math.inf) -> Batch:
        """Rollouts on a batch of prompts dealt out among the tasks, for the branch that owns each to score."""
        cfg, tasks = self.cfg, list(owners.values())
        key = (cfg.seed, "consolidate")
        prompts, owned = deal(tasks, cfg.rollout.prompts, step, *key, more=step + 1 < end)
        rollout, share = self._shared(prompts, seed_of("sample", *key, step)), self.peers.share(len(prompts))
        owned = [slice(*(min(max(p, share.start), share.stop) - share.start for p in (s.start, s.stop))) for s in owned]
        rows = [slice(p.start * cfg.rollout.samples, p.stop * cfg.rollout.samples) for p in owned]
        scores = [TeacherScore(name, own) for name, own in zip(owners, rows, strict=True)]
        batch = Batch("all", rollout, self._weights(rollout), lesson=Lesson(scores, cfg.consolidate.signal))
        if not cfg.consolidate.native:
            return batch
        reward = torch.cat([rewards(task, rollout, p) for task, p in zip(tasks, owned, strict=True)])
        batch.weight = self._weights(rollout, reward)
        return batch.rewarded(reward, cfg.rlvr, self.peers)

    def _weights(self, rollout: Rollout, reward: Tensor | None = None) -> Tensor:
        """Of each token in the loss; none where the reward of its row is NaN."""
        keep = rollout.mask & ~rollout.truncated[:, None] if self.cfg.rollout.mask_truncated else rollout.mask
        if reward is not None:
            keep = keep & ~reward.isnan().view(-1, 1).to(keep.device)
        if self.peers.size == 1:
            return token_weights(keep, self.cfg.rlvr)
        rows, tokens = map(sum, zip(*self.peers.all((len(keep), int(keep.sum()))), strict=True))
        return token_weights(keep, self.cfg.rlvr, rows, tokens)

    def head(
        self, rollout: Rollout, rows: list[int], only: slice | None = None, model: PreTrainedModel | None = None
    ) -> tuple[Head, Tensor]:
        """The head over the N completion tokens of `rows`, of those in `only` if given, and those tokens (N,)."""
        model = model or self.model
        if only is not None:
            rows = [row for row in rows if only.start <= row < only.stop]
            if not rows:
                weight = model.get_output_embeddings().weight
                return Head.of(model, weight.new_empty(0, weight.shape[1])), rollout.tokens.new_empty(0)
        batch = rollout.sequences(model, rows, self.special.pad)
        hidden, tokens = batch.predicting(hidden_states(model, batch))
        return Head.of(model, hidden), tokens

    @torch.no_grad()
    def score(
        self,
        rollout: Rollout,
        rows: slice | None = None,
        heads: bool = True,
        likeliest: int = 0,
        listed: int | None = None,
        keep: torch.device | None = None,
    ) -> TeacherScore:
        """This branch as teacher of another's rollout, or of some rows, with the weights of this very moment.

        Log-probs; where a divergence is asked for the `heads`, or in their place the `listed` likeliest words, which
        stay on `keep`; top words of the first `likeliest` tokens.
        """
        cfg, weights = self.cfg, self.frozen or self.weights
        keep = torch.device("cpu") if cfg.offload else keep or self.device
        states: list[Tensor | TopK] = []
        score = TeacherScore(self.name, rows, states=states)
        with self.active(weights):
            for micro in rollout.micro_batches(cfg.micro_batch_tokens):
                head, tokens = self.head(rollout, micro, rows, weights.model)
                score.logp.append(logprob(head, tokens, temperature=cfg.rollout.temperature).logp)
                if likeliest > 0:
                    ids, _ = topk(replace(head, hidden=head.hidden[:likeliest]), cfg.eval.top_k)
                    score.likeliest.append(ids.int())
                    likeliest -= len(tokens)
                if not heads:
                    continue
                if listed is not None:
                    states.append(likeliest_words(head, listed, cfg.rollout.temperature, keep))
                    continue
                score.head_then = score.head_then or still(head, keep)
                states.append(head.hidden.to(keep))
        return score

    def learn(self, batches: list[Batch]) -> dict[str, Any]:
        """`cfg.rlvr.updates_per_batch` steps on the sum of the losses of a step's batches, and what to log of it."""
        start, updates = time.perf_counter(), self.cfg.rlvr.updates_per_batch
        metrics: dict[str, Any] = {"domain": batches[0].domain}
        for batch in batches:
            if batch.lesson is not None:
                batch.lesson.weigh(batch.rollout, batch.weight, self.cfg, self.peers)
                read = partial(self.head, batch.rollout)
                with self.active():
                    metrics |= overlaps(batch, batch.lesson, read, self.cfg, self.peers)
        stats = [batch.stats for batch in batches if batch.stats]
        metrics |= {name: sum(s[name] for s in stats) / len(stats) for name in (stats[0] if stats else ())}
        if len(stats) > 1:
            metrics |= {f"reward/{batch.domain}": batch.stats["reward"] for batch in batches if batch.stats}
        totals: Counter[str] = Counter()
        with self.active(learns=True):
            for _ in range(updates):
                with self._seeded():
                    for batch in batches:
                        totals.update(self._backward(batch))
                grad_norm = nn.utils.clip_grad_norm_(self.master, self.cfg.optim.max_grad_norm)
                if isinstance(grad_norm, DTensor):
                    grad_norm = grad_norm.full_tensor()
                if not torch.isfinite(grad_norm):
                    rule = f"update: gradient of branch {self.name!r} must be finite"
                    raise NonFiniteLoss(f"{rule}; got {grad_norm}", batches[-1])
                self.updates += 1
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.publish()
        metrics |= {name: value / updates for name, value in totals.items()} | mismatch(batches, self.cfg, self.peers)
        for name in ("kl", "overlap"):
            if values := [value for key, value in metrics.items() if key.startswith(f"{name}/")]:
                metrics[name] = sum(values) / len(values)
        metrics |= completions(batches, self.cfg.micro_batch_tokens, self.peers)
        return metrics | {
            "grad_norm": grad_norm.item(),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "update_time": time.perf_counter() - start,
        }

    def _backward(self, batch: Batch) -> Counter[str]:
        """Adds the gradient of one batch to the master weights; returns what was optimised, part by part."""
        totals: Counter[str] = Counter()
        cfg, rollout = self.cfg, batch.rollout
        beta = cfg.opd.branch_beta.get(self.name, cfg.opd.beta)
        # training mode is what switches checkpointing on; dropout would part the ratio from 1
        self.weights.train(cfg.model.activation_checkpointing)
        micro_batches = rollout.micro_batches(cfg.micro_batch_tokens)

        def part(micro: int) -> tuple[Tensor, Parts]:
            rows = micro_batches[micro]
            return loss_of(batch, micro, rows, *self.head(rollout, rows), beta, cfg)

        # ranks that split a model compute in step: one with fewer micro-batches repeats its last, for nothing
        seen = [any(rollout.prompts[row // rollout.samples].media for row in rows) for rows in micro_batches]
        for micro, media in enumerate(self.peers.rounds(seen)):
            again = micro >= len(micro_batches)
            loss, parts = self.weights.run(partial(part, min(micro, len(micro_batches) - 1)), media)
            if not torch.isfinite(loss.detach()):
                rule = f"update: loss of branch {self.name!r} must be finite"
                raise NonFiniteLoss(f"{rule}; got {loss.item()} from {batch}", batch)
            (0 * loss if again else loss).backward()
            self._collect()
            for name, value in ({} if again else parts).items():
                totals[name] += value.item()  # type: ignore[assignment]  # a Counter adds floats as well
        everyones = self.peers.all(totals)
        return Counter({name: sum(found[name] for found in everyones) for name in totals})

    def _collect(self) -> None:
        """Adds bf16 gradients to the fp32 ones of the master weights."""
        for parameter, master in self.rounded:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def publish(self) -> None:
        """Rounds the fp32 weights into the model."""
        for parameter, master in self.rounded:
            parameter.data.copy_(master)

    def freeze(self) -> Weights:
        """Keeps a copy of the weights as they are now, to teach with until `thaw`."""
        self.frozen = self.weights.copy()
        if self.frozen.model is not self.model:
            compile_blocks(self.frozen.model, self.cfg.model.compile)
        return self.frozen

    def thaw(self) -> None:
        if self.frozen is not None:
            self.frozen.remove()
        self.frozen = None

    @contextmanager
    def active(self, weights: Weights | None = None, learns: bool = False) -> Iterator[None]:
        """The model is on the device and has the branch's weights, or those given, for the length of the block."""
        weights = weights or self.weights
        with self.on_device(), weights.active(learns):
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
