"""One training step of a Qwen3 model by stage: policy gradient on its own batch, distillation on another's.

Two layers of the real class with a head of the named shape; the rest of the depth would only dilute what differs.
The learning rate is zero, so that every round does the same work.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import MODELS
from bench.measure import Clock
from bench.results import OURS
from copd_kernels import Head, kl, logprob
from copd_kernels.rows import resolve

LENGTH = 32


def our_policy(model, hidden: Tensor, tokens: Tensor) -> Tensor:
    return -logprob(Head.of(model, hidden), tokens).logp.mean()


def our_distill(model, hidden: Tensor, teacher, teacher_hidden: Tensor) -> Tensor:
    return kl(Head.of(model, hidden), Head.of(teacher, teacher_hidden))


def eager_policy(model, hidden: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model.lm_head(hidden).float().flatten(0, 1), tokens.flatten())


def eager_distill(model, hidden: Tensor, teacher, teacher_hidden: Tensor) -> Tensor:
    log_p = model.lm_head(hidden).float().log_softmax(-1)
    with torch.no_grad():
        log_q = teacher.lm_head(teacher_hidden).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / hidden.shape[:-1].numel()


class Step:
    """A model, its teacher, an optimiser and one step, which notes the ms of each stage."""

    def __init__(self, policy: Callable, distill: Callable, config, scale, device: str) -> None:
        from transformers import Qwen3ForCausalLM

        torch.manual_seed(0)
        with torch.device(device):
            self.model, self.teacher = (Qwen3ForCausalLM(config).to(scale.dtype) for _ in range(2))
            self.own, self.cross = torch.randint(0, config.vocab_size, (2, max(1, scale.N // LENGTH), LENGTH + 1))
        # a branch of the same base: close to the student
        for mine, theirs in zip(self.model.parameters(), self.teacher.parameters(), strict=True):
            theirs.data.copy_(mine.data + 0.05 * theirs.data)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.policy, self.distill, self.clock = policy, distill, Clock(device)
        self.stages: dict[str, list[float]] = defaultdict(list)
        self.ms: list[float] = []

    def __call__(self) -> float:
        self.clock.settle()
        start = self.last = time.perf_counter()
        own = self.model.model(self.own[:, :-1]).last_hidden_state
        cross = self.model.model(self.cross[:, :-1]).last_hidden_state
        self.stage("backbone")
        with torch.no_grad():
            taught = self.teacher.model(self.cross[:, :-1]).last_hidden_state
        self.stage("teacher")
        loss = self.policy(self.model, own, self.own[:, 1:])
        self.stage("logprob")
        loss = loss + self.distill(self.model, cross, self.teacher, taught)
        self.stage("kl")
        loss.backward()
        self.stage("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.stage("optimizer")
        self.ms.append(1e3 * (time.perf_counter() - start))
        return loss.item()

    def stage(self, name: str) -> None:
        self.clock.wait()
        now = time.perf_counter()
        self.stages[name].append(1e3 * (now - self.last))
        self.last = now


def bench_step(benchmark, record, scale, device):
    transformers = pytest.importorskip("transformers", minversion="4.51")
    D, V, _ = MODELS["qwen3-vl-4b"]
    D, V = D // scale.shrink[0], V // scale.shrink[1]
    sizes = {"hidden_size": D, "intermediate_size": 3 * D, "vocab_size": V, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4 * max(1, D // 512), "num_key_value_heads": 4, "head_dim": min(128, D // 4)}
    config = transformers.Qwen3Config(**sizes, **heads, tie_word_embeddings=True)
    mine = Step(our_policy, our_distill, config, scale, device)
    eager = Step(eager_policy, eager_distill, config, scale, device)
    # the first step warms up
    assert mine() == pytest.approx(eager(), rel=1e-2 if scale.dtype == torch.bfloat16 else 1e-5)
    steps = {OURS: mine, "eager": eager}
    for step in steps.values():
        step.peak = step.clock.peak(step)
        step.stages.clear()
        step.ms.clear()
    benchmark.pedantic(mine, setup=lambda: eager() and None, rounds=scale.rounds)

    entries = [{"name": n, "ms": s.ms, "peak_mib": s.peak, "stages": s.stages} for n, s in steps.items()]
    entries[0]["backend"] = resolve("step", None, torch.device(device))
    shape = {"model": "qwen3-vl-4b", "shrink": scale.shrink, "D": D, "V": V, "layers": config.num_hidden_layers}
    shape |= {"N": mine.own[:, 1:].numel(), "dtype": str(scale.dtype).removeprefix("torch."), "device": device}
    record({"op": "step"} | shape | {"entries": entries})
