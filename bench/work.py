"""How much work an op is, in one place, and the bare GEMMs that are its roof.

A GEMM pass is 2·N·V·D FLOP. The work needed is each head's logits once, and for the gradients one pass for dhidden and
one for dlm_head; an op that sweeps twice projects twice, which counts as spent, not as needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from copd_kernels import schedule
from copd_kernels.reference import accumulator


@dataclass(frozen=True)
class Sweep:
    """One walk over the tokens: GEMM passes of each kind."""

    project: int
    dhidden: int = 0
    dlm_head: int = 0

    @property
    def passes(self) -> int:
        return self.project + self.dhidden + self.dlm_head


def sweeps(case: Case) -> list[Sweep]:
    """What copd_kernels spends. `logprob` must know each token's upstream gradient, so its backward sweeps again."""
    back, head = int(case.backward), int(case.backward and not case.frozen)
    if case.op == "logprob":
        return [Sweep(1)] + [Sweep(int(not keeps(case)), back, head)] * back
    if case.op == "mutual_kl":
        K = case.T + 1
        return [Sweep(K, K * back, K * head)]
    return [Sweep(2 if case.op == "routed_kl" else case.T + 1, back, head)]


def keeps(case: Case) -> bool:
    """Whether logprob keeps its logits for backward, by the rule of `recompute="auto"`."""
    worth = schedule.keeps_logits(case.D, case.dtype, torch.device(case.device))
    fits = case.N * case.V * accumulator(case.dtype).itemsize <= schedule.budget(0, torch.device(case.device))
    return worth and fits and not case.recompute


def passes_spent(case: Case) -> int:
    return sum(sweep.passes for sweep in sweeps(case))


def flops_needed(case: Case) -> float:
    first, *again = sweeps(case)
    needed = first.passes + sum(sweep.passes - sweep.project for sweep in again)
    return needed * 2.0 * case.N * case.V * case.D


def bytes_needed(inputs: Inputs) -> int:
    """Every input read once, every gradient written once; per-token results are too small to count."""
    tensors = [x for head in inputs.heads for x in (head.hidden, head.lm_head)] + inputs.leaves
    return sum(x.numel() * x.element_size() for x in tensors)


def roof(inputs: Inputs) -> Callable[[], None]:
    """The op's GEMMs and nothing else: its operands, fp32 results and chunk heights, into memory at hand."""
    case = inputs.case
    out_dtype = accumulator(case.dtype)
    operand = schedule.operand_dtype(inputs.student.hidden, out_dtype)
    lm_heads = [head.lm_head.detach().to(operand) for head in inputs.heads]
    hidden = inputs.student.hidden.detach().to(operand)
    like = torch.empty(0, dtype=out_dtype, device=case.device)
    # routed tokens are walked teacher by teacher
    segments = case.T if case.op == "routed_kl" else 1

    def prepare(sweep: Sweep) -> tuple[Sweep, schedule.Workspace, list[Tensor]]:
        narrow = schedule.dlogits_dtype(operand, like)
        apart = sweep.dhidden and (narrow is not None or case.op == "mutual_kl" or not sweep.project)
        kind = (narrow or out_dtype) if apart else None
        space = schedule.Workspace(case.N // segments, sweep.project, case.V, like, 0, kind)
        if apart:
            # zeros would cost a GPU less power and time than gradients do
            space.separate.normal_()
        return sweep, space, [like.new_empty(case.V, case.D) for _ in range(sweep.dlm_head)]

    plan = [prepare(sweep) for sweep in sweeps(case)]
    dhidden = like.new_empty(case.N, case.D)

    def run() -> None:
        for sweep, space, dlm_heads in plan:
            for segment, chunk in itertools.product(range(segments), space.chunks):
                z, dlogits = space.logits(chunk), space.dlogits(chunk)
                for k in range(sweep.project):
                    schedule.addmm(z[k], hidden[chunk], lm_heads[k].T)
                for k in range(sweep.dhidden):
                    schedule.addmm(dhidden[chunk], dlogits, lm_heads[k])
                for dlm_head in dlm_heads:
                    schedule.addmm(dlm_head, dlogits.T, hidden[chunk], accumulate=segment + chunk.start > 0)

    return run


def outputs_mib(leaves: list[Tensor]) -> float:
    """What grows with the inputs whatever the workspace: each gradient and its fp32 accumulator."""
    return sum(x.numel() * (x.element_size() + 4) for x in leaves) / 2**20
