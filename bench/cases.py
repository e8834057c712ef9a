"""What is measured: heads of real models by name, the inputs drawn for them, and the exact answer.

Logits have a standard deviation of `SPREAD`; a teacher is the student with noise on its hidden states, so that
KL(p || q) is about `Case.kl`: experts that teach each other are that close, and there most implementations lose the
gradient. N tokens are `UNIQUE` tokens over and over: the float64 answer then costs the same whatever N is, and every
timed result is checked in full, up to millions of tokens.

N tokens, D hidden size, V vocabulary, T teachers (in `mutual_kl` T + 1 heads teach each other).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from copd_kernels import Head, agreement, kl, logprob, mutual_kl

MODELS = {  # D, V, softcap
    "qwen3-vl-4b": (2560, 151_936, None),
    "qwen3-8b": (4096, 151_936, None),
    "llama-3": (4096, 128_256, None),
    "gemma": (2304, 262_144, 30.0),
}
SPREAD = 3.0
UNIQUE = 256


@dataclass(frozen=True)
class Scale:
    """How much of a real head a machine measures."""

    shrink: tuple[int, int]  # divides D and V
    N: int
    rounds: int
    dtype: torch.dtype
    other_dtype: torch.dtype
    sweep_shrink: tuple[int, int]  # of the head in the sweep over N
    sweep: tuple[int, ...]
    alone: int  # the N only this library is asked for


SCALES = {
    "cuda": Scale((1, 1), 8192, 7, torch.bfloat16, torch.float16, (1, 1), (1024, 4096, 16_384, 65_536), 1 << 20),
    "cpu": Scale((8, 16), 1024, 3, torch.float32, torch.bfloat16, (32, 32), (512, 2048, 8192), 1 << 16),
    "quick": Scale((64, 64), 32, 1, torch.float32, torch.bfloat16, (64, 64), (32, 64), 128),
}


@dataclass(frozen=True)
class Case:
    op: str
    model: str
    N: int
    dtype: torch.dtype
    device: str
    shrink: tuple[int, int] = (1, 1)
    T: int = 1
    divergence: str = "reverse"
    backward: bool = True
    frozen: bool = False
    recompute: bool = False  # logprob's logits in backward, whether or not they fit a workspace
    kl: float = 0.01

    @property
    def D(self) -> int:
        return MODELS[self.model][0] // self.shrink[0]

    @property
    def V(self) -> int:
        return MODELS[self.model][1] // self.shrink[1]

    @property
    def softcap(self) -> float | None:
        return MODELS[self.model][2]

    @property
    def quick(self) -> bool:
        return self.shrink == SCALES["quick"].shrink

    @property
    def unique(self) -> int:
        return min(self.N, UNIQUE)


@dataclass(frozen=True)
class Inputs:
    """`heads[0]` is the student; with `index`, teacher j holds only the tokens routed to it."""

    case: Case
    heads: list[Head]
    tokens: Tensor  # (N,)
    index: Tensor | None  # (N,)
    leaves: list[Tensor]

    @property
    def student(self) -> Head:
        return self.heads[0]

    @property
    def teachers(self) -> list[Head]:
        return self.heads[1:]


def draw(case: Case) -> Inputs:
    """Random heads of the case's shape; the same numbers in every call on a device."""
    generator = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    U, D, V = case.unique, case.D, case.V
    hidden, lm_head = normal(U, D), normal(V, D).mul_(SPREAD / D**0.5)
    # KL = var(difference of the logits) / 2, to second order
    noise = (2 * case.kl) ** 0.5 / SPREAD
    states = [hidden, *(hidden + noise * normal(U, D) for _ in range(case.T if case.op != "logprob" else 0))]
    tokens = torch.randint(0, V, (U,), generator=generator, device=case.device)
    index = torch.arange(U, device=case.device) % case.T if case.op == "routed_kl" else None

    repeats = case.N // U
    assert repeats * U == case.N, f"N must be a multiple of {UNIQUE}; got {case.N}"
    tokens, index = tokens.repeat(repeats), index if index is None else index.repeat(repeats)
    kind = {"dtype": case.dtype, "copy": True}
    heads = [Head(h.to(**kind).repeat(repeats, 1), lm_head.to(**kind), softcap=case.softcap) for h in states]
    if index is not None:
        heads[1:] = [replace(head, hidden=head.hidden[index == j]) for j, head in enumerate(heads[1:])]
    leaves = leaves_of(case, heads)
    for leaf in leaves:
        leaf.requires_grad_()
    return Inputs(case, heads, tokens, index, leaves)


def leaves_of(case: Case, heads: list[Head]) -> list[Tensor]:
    """What a gradient is asked of."""
    if not case.backward:
        return []
    students = heads if case.op == "mutual_kl" else heads[:1]
    return [x for head in students for x in ([head.hidden] if case.frozen else [head.hidden, head.lm_head])]


@dataclass(frozen=True)
class Exact:
    """The mean over tokens and its gradients in float64, of the unique tokens."""

    value: Tensor
    gradients: list[Tensor]


def exact(inputs: Inputs) -> Exact:
    """`copd_kernels.reference` on the same numbers, widened, a few tokens at a time."""
    case, U = inputs.case, inputs.case.unique
    owners = None if inputs.index is None else inputs.index[:U]
    heads = [widened(inputs.student, inputs.student.hidden[:U])]
    for j, head in enumerate(inputs.teachers):
        if owners is None:
            hidden = head.hidden[:U]
        else:
            hidden = head.hidden.new_zeros(U, case.D)
            hidden[owners == j] = head.hidden[: (owners == j).sum()]
        heads.append(widened(head, hidden))
    leaves = leaves_of(case, heads)
    for leaf in leaves:
        leaf.requires_grad_()
    weight = torch.full((case.T, U), 1 / case.T, dtype=torch.float64, device=case.device)
    if owners is not None:
        weight = torch.stack([owners == j for j in range(case.T)]).double()

    value = 0
    for start in range(0, U, 128):
        rows = slice(start, start + 128)
        part = [replace(head, hidden=head.hidden[rows]) for head in heads]
        term = total(case, part, inputs.tokens[:U][rows], weight[:, rows]) / U
        if leaves:
            term.backward()
        value = value + term.detach()
    return Exact(value, [leaf.grad for leaf in leaves])


def widened(head: Head, hidden: Tensor) -> Head:
    # a copy even of float64, so that gradients of the oracle never land in the inputs
    return replace(head, hidden=hidden.detach().to(torch.float64, copy=True), lm_head=head.lm_head.detach().double())


def total(case: Case, heads: list[Head], tokens: Tensor, weight: Tensor) -> Tensor:
    """The op's result summed over tokens: (), or (3,) for agreement's three."""
    student, *teachers = heads
    options = {"backend": "reference"}
    if case.op == "logprob":
        return logprob(student, tokens, **options).logp.sum()
    if case.op == "agreement":
        return torch.stack([x.mean(0).sum() for x in agreement(student, teachers, **options)])
    options["divergence"] = case.divergence
    if case.op == "mutual_kl":
        return mutual_kl(heads, **options).loss * len(tokens)
    return kl(student, teachers, teacher_weight=weight, reduction="sum", **options)
