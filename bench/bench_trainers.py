"""A step of TRL's trainers with and without this library: log-probs as GRPO asks for them, and distillation.

Two layers of the real class, a head of the named vocabulary, random weights; the batch is half prompts, which are read
and not scored. A step is forward and backward of the whole model, with the teachers' forwards. Contenders give TRL's
own numbers: mean policy-gradient loss with an entropy bonus, mean reverse KL or JSD over teachers. Losses and gradients
are held against eager's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench.cases import SPREAD
from bench.measure import Clock
from bench.results import OURS
from bench.rivals import diverge
from copd_kernels.rows import resolve

VOCABULARIES = {"32k": 32_768, "152k": 151_936}
BETA = {"reverse": 1.0, "jsd": 0.5}


class Step:
    """Models, a batch, and each contender's way from the one to a loss."""

    def __init__(self, scale, device: str, V: int, T: int = 0, divergence: str = "reverse") -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        quick = scale.N <= 32
        D, self.V = {"cuda": 2560, "cpu": 64 if quick else 256}[device], V // (scale.shrink[1] if quick else 1)
        sizes = {"hidden_size": D, "intermediate_size": 3 * D, "vocab_size": self.V, "num_hidden_layers": 2}
        heads = {"num_attention_heads": D // 64, "num_key_value_heads": D // 64, "head_dim": 64}
        self.D, self.T, self.divergence, self.device = D, T, divergence, device
        torch.manual_seed(0)
        with torch.device(device):
            config = Qwen3Config(**sizes, **heads, tie_word_embeddings=False)
            self.model, *self.teachers = (Qwen3ForCausalLM(config).to(scale.dtype) for _ in range(1 + T))
            B, self.P = 4, max(4, scale.N // 16)  # as many prompt tokens as completion tokens
            self.ids = torch.randint(0, self.V, (B, 2 * self.P))
            self.advantages = torch.randn(B, 1)
        self.N = B * self.P
        self.labels = self.ids.clone()
        self.labels[:, : self.P] = -100
        for model in (self.model, *self.teachers):
            torch.nn.init.normal_(model.lm_head.weight, std=SPREAD / D**0.5)
        # experts of one base: close to the student
        for teacher in self.teachers:
            for mine, theirs in zip(self.model.parameters(), teacher.parameters(), strict=True):
                theirs.data.copy_(mine.data + 0.2 * theirs.data)
            teacher.eval().requires_grad_(False)
        self.forwards: dict[str, Callable] = {}

    def hidden(self, model) -> Tensor:
        """(N, D): what `lm_head` reads for the completion tokens"""
        return model.model(self.ids).last_hidden_state[:, self.P - 1 : -1].flatten(0, 1)

    def policy_loss(self, logp: Tensor, entropy: Tensor) -> Tensor:
        return -(self.advantages * logp.reshape(-1, self.P)).mean() - 0.01 * entropy.mean()

    def mean(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Of `loss(hidden, teacher's hidden, teacher's lm_head)` over teachers, the student's forward being one."""
        hidden = self.hidden(self.model)
        with torch.no_grad():
            taught = [self.hidden(teacher) for teacher in self.teachers]
        pairs = zip(taught, self.teachers, strict=True)
        return sum(loss(hidden, states, teacher.lm_head.weight) for states, teacher in pairs) / self.T


def fused(kind: str) -> Callable[[Step], Tensor]:
    """TRL's seam: log-probs and entropies from the model, by TRL's forward or by ours."""

    def run(step: Step) -> Tensor:
        from types import SimpleNamespace

        from trl.trainer.utils import add_fused_lm_head

        from copd_kernels.trl import fuse

        if kind not in step.forwards:
            add_fused_lm_head(step.model, outputs=("log_probs", "entropy"))
            if kind == OURS:
                fuse(SimpleNamespace(model=step.model))
            step.forwards[kind] = step.model.__dict__.pop("forward")
        step.model.forward = step.forwards[kind]
        try:
            out = step.model(step.ids, labels=step.labels, fused_lm_head=True)
        finally:
            del step.model.forward
        return step.policy_loss(out.log_probs[:, step.P - 1 :], out.entropy[:, step.P - 1 :])

    return run


def trl_compact(step: Step) -> Tensor:
    """As on a GPU, where TRL projects the scored positions alone."""
    with patch("trl.trainer.utils._use_triton", lambda device: True):
        return fused("TRL")(step)


def liger_policy(step: Step) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    tokens = step.ids[:, step.P :].flatten()
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        step.hidden(step.model), step.model.lm_head.weight, tokens, 1.0, -100, 1, True
    )
    return step.policy_loss(-nll, entropy)


def eager_policy(step: Step) -> Tensor:
    log_p = step.model.lm_head(step.hidden(step.model)).float().log_softmax(-1)
    logp = log_p.gather(-1, step.ids[:, step.P :].flatten()[:, None])[:, 0]
    return step.policy_loss(logp, -(log_p.exp() * log_p).sum(-1))


def our_distillation(step: Step) -> Tensor:
    from copd_kernels.trl import DistillationTrainer

    # without a dataset and a processor, which its loss does not read
    trainer = DistillationTrainer.__new__(DistillationTrainer)
    trainer.teachers, trainer.teacher_weights = step.teachers, None
    trainer.beta, trainer.temperature = BETA[step.divergence], 1.0
    prompt, completion = step.ids.split(step.P, dim=1)
    inputs = {"prompt_ids": prompt, "completion_ids": completion}
    inputs |= {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
    return trainer._compute_loss(step.model, inputs, None)[0]


def trl_distillation(step: Step) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(step.N, device=step.device)
    weight, beta = step.model.lm_head.weight, BETA[step.divergence]
    return step.mean(lambda p, q, teacher: _chunked_divergence_loss(p, q, weight, teacher, mask, beta)[0])


def liger_distillation(step: Step) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # compiled is its default; on a CPU that costs half a minute and gains nothing
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[step.divergence], compiled=step.device == "cuda")
    labels = torch.zeros(step.N, dtype=torch.int64, device=step.device)
    return step.mean(lambda p, q, teacher: loss(p, step.model.lm_head.weight, q, teacher, labels))


def eager_distillation(step: Step) -> Tensor:
    def loss(p: Tensor, q: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = (q @ teacher.T).float().log_softmax(-1)
        return diverge(step.model.lm_head(p).float().log_softmax(-1), log_q, step.divergence) / step.N

    return step.mean(loss)


POLICY = {OURS: fused(OURS), "eager": eager_policy, "TRL": fused("TRL"), "TRL, completions alone": trl_compact}
POLICY |= {"Liger FLSCE": liger_policy}
DISTILLATION = {OURS: our_distillation, "eager": eager_distillation, "TRL": trl_distillation}
DISTILLATION |= {"Liger chunked_loss": liger_distillation}


def contest(benchmark, record, scale, step: Step, contenders: dict[str, Callable[[Step], Tensor]], **case) -> None:
    clock = Clock(step.device)
    entries = {name: {"name": name, "ms": [], "cpu_ms": [], "why": None} for name in contenders}

    def call(name: str) -> Tensor:
        step.model.zero_grad()
        start = time.process_time()
        loss = contenders[name](step)
        loss.backward()
        clock.wait()
        # beside others on the machine, what a step costs is told better by this clock than by the wall's
        entries[name]["cpu_ms"].append(1e3 * (time.process_time() - start))
        return loss.detach()

    def gradients() -> list[Tensor]:
        return [x.grad.float() for x in (step.model.lm_head.weight, step.model.model.embed_tokens.weight)]

    want, want_gradients = call("eager"), gradients()
    narrow = scale.dtype != torch.float32
    for name, entry in entries.items():
        try:
            error = abs(call(name) - want) / abs(want)
        except ImportError as missing:
            entry["why"] = f"cannot be imported: {missing}"
            continue
        off = max(((x - y).norm() / y.norm()).item() for x, y in zip(gradients(), want_gradients, strict=True))
        entry |= {"loss_error": error.item(), "gradient_error": off}
        assert error < (1e-2 if narrow else 1e-5), f"{name}: {error}"
        assert off < (5e-2 if narrow else 1e-4), f"{name}: {off}"
    del want_gradients
    able = [name for name, entry in entries.items() if not entry["why"]]
    for name in able:
        step.model.zero_grad()
        entries[name]["peak_mib"] = clock.peak(lambda name=name: call(name))

    for entry in entries.values():
        entry["cpu_ms"].clear()

    def others() -> None:
        for name in able[1:]:
            entries[name]["ms"].append(clock.time(lambda name=name: call(name)))
        clock.settle()

    benchmark.pedantic(call, args=(OURS,), setup=others, rounds=scale.rounds)
    if benchmark.enabled:
        entries[OURS]["ms"] = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    entries[OURS]["backend"] = resolve("kl", None, torch.device(step.device))
    shape = {"model": "qwen3", "D": step.D, "V": step.V, "N": step.N, "layers": 2, "device": step.device}
    shape |= {"dtype": str(scale.dtype).removeprefix("torch.")}
    record({"op": "trainer"} | case | shape | {"entries": list(entries.values())})


@pytest.fixture(autouse=True)
def libraries():
    pytest.importorskip("trl", minversion="1.15")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def bench_log_probs(benchmark, record, scale, device, vocabulary):
    step = Step(scale, device, VOCABULARIES[vocabulary])
    contest(benchmark, record, scale, step, POLICY, trainer="GRPO")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(("T", "divergence"), [(1, "reverse"), (1, "jsd"), (4, "reverse")])
def bench_distillation(benchmark, record, scale, device, vocabulary, T, divergence):
    step = Step(scale, device, VOCABULARIES[vocabulary], T, divergence)
    contest(benchmark, record, scale, step, DISTILLATION, trainer="distillation", T=T, divergence=divergence)
