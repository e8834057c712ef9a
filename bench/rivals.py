"""Everyone who is measured: this library, eager and compiled PyTorch, and the published kernels.

A contender is a function of `Inputs` that returns the mean over tokens, to be differentiated by the caller. One that
cannot take a case raises `Unsupported` with the reason, which becomes its row. Libraries are imported when called, so
a missing one is a row as well. Libraries know one teacher: more teachers, routing and mutual distillation are what
their users write, one call a pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs
from copd_kernels import Head, agreement, kl, logprob, mutual_kl
from copd_kernels.rows import resolve

Contender = Callable[[Inputs], Tensor]
# what a laptop can spare for one loss
CPU_BYTES = 4 << 30
BETA = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}


class Unsupported(Exception):
    """Why a contender cannot take a case."""


def require(ok: bool, reason: str) -> None:
    if not ok:
        raise Unsupported(reason)


def ours(backend: str | None = None) -> Contender:
    """This library, with the fastest rows of the device where none are named."""

    def run(x: Inputs) -> Tensor:
        options = {"backend": backend}
        try:
            resolve(x.case.op, backend, x.tokens.device)
        except RuntimeError as error:
            raise Unsupported(str(error).split(": ")[-1].split(";")[0]) from error
        if x.case.op == "logprob":
            if x.case.recompute:
                options["recompute"] = True
            return logprob(x.student, x.tokens, **options).logp.mean()
        if x.case.op == "agreement":
            return torch.stack([value.mean() for value in agreement(x.student, x.teachers, **options)])
        options["divergence"] = x.case.divergence
        if x.case.op == "mutual_kl":
            return mutual_kl(x.heads, **options).loss
        return kl(x.student, x.teachers, teacher_index=x.index, **options)

    return run


def full_logits(head: Head, wide: bool) -> Tensor:
    """(N, V) fp32, from a GEMM that keeps fp32 logits or rounds them to the model's dtype."""
    hidden, lm_head = (head.hidden.float(), head.lm_head.float()) if wide else (head.hidden, head.lm_head)
    z = F.linear(hidden, lm_head).float()
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def diverge(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """Summed over tokens, as trainers write it with `F.kl_div`; jsd with beta 1/2."""

    def kl_sum(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, log_target=True, reduction="sum")

    if divergence == "reverse":
        return kl_sum(log_p, log_q)
    if divergence == "forward":
        return kl_sum(log_q, log_p)
    if divergence == "symmetric":
        return kl_sum(log_p, log_q) + kl_sum(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return (kl_sum(log_q, log_m) + kl_sum(log_p, log_m)) / 2


def eager(x: Inputs, wide: bool = False) -> Tensor:
    """Every head's full logits."""
    case = x.case
    # a head's logits, log-probs, their gradient and the loss's terms, as far as they live at once
    need = 4 * (case.T + 1) * case.N * case.V * 4
    require(x.tokens.is_cuda or need <= CPU_BYTES, f"would need about {need >> 30} GiB")
    z = full_logits(x.student, wide)
    if case.op == "logprob":
        return -F.cross_entropy(z, x.tokens)
    log_p = z.log_softmax(-1)
    if case.op == "mutual_kl":
        every = [log_p, *(full_logits(head, wide).log_softmax(-1) for head in x.teachers)]
        pairs = [(p, q.detach()) for p in every for q in every if p is not q]
        return sum(diverge(p, q, case.divergence) for p, q in pairs) / case.N
    with torch.no_grad():
        log_qs = [full_logits(head, wide).log_softmax(-1) for head in x.teachers]
    if case.op == "agreement":
        top, *others = [in_rows(log.topk(10).indices, case.V) for log in (log_p, *log_qs)]
        common = [torch.isin(other, top).float().mean() for other in others]
        kls = [[diverge(log_p, q, way) / case.N for q in log_qs] for way in ("forward", "reverse")]
        return torch.stack([torch.stack(values).mean() for values in (common, *kls)])
    if x.index is not None:
        routed = [diverge(log_p[x.index == j], q, case.divergence) for j, q in enumerate(log_qs)]
        return sum(routed) / case.N
    return sum(diverge(log_p, q, case.divergence) for q in log_qs) / (case.N * case.T)


def in_rows(ids: Tensor, V: int) -> Tensor:
    """Ids made unique to their row, so that one set operation serves all rows."""
    return ids + V * torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)


def eager_wide(x: Inputs) -> Tensor:
    require(x.case.dtype != torch.float32, "the inputs are fp32 already")
    return eager(x, wide=True)


def compiled(x: Inputs) -> Tensor:
    return compiled_for(x.case)(x)


@functools.cache
def compiled_for(case: Case) -> Contender:
    """`torch.compile` of eager; in a quick run its graph only, since code generation takes half a minute."""
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False, backend="aot_eager" if case.quick else "inductor")


def each_pair(pair: Callable[[Head, Head, str], Tensor]) -> Contender:
    """An op of several teachers from a library's mean divergence of two heads."""

    def run(x: Inputs) -> Tensor:
        case = x.case
        require(case.op in ("kl", "routed_kl", "mutual_kl"), f"has no {case.op}")
        ways = ("reverse", "forward") if case.divergence == "symmetric" else (case.divergence,)

        def both(p: Head, q: Head) -> Tensor:
            return sum(pair(p, q.detach(), way) for way in ways)

        if case.op == "mutual_kl":
            return sum(both(p, q) for p in x.heads for q in x.heads if p is not q)
        if x.index is None:
            return sum(both(x.student, q) for q in x.teachers) / case.T
        owned = [replace(x.student, hidden=x.student.hidden[x.index == j]) for j in range(case.T)]
        shares = [head.hidden.shape[0] / case.N for head in owned]
        return sum(share * both(p, q) for share, p, q in zip(shares, owned, x.teachers, strict=True))

    return run


def trl_pair(p: Head, q: Head, divergence: str) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    scales = (1.0, 1.0, p.softcap, 1.0, q.softcap)
    # its second output is a diagnostic
    return ChunkedDivergenceFunction.apply(
        p.hidden, p.lm_head, None, q.hidden, q.lm_head, None, BETA[divergence], *scales
    )[0].mean()


def trl(x: Inputs) -> Tensor:
    if x.case.op != "logprob":
        return each_pair(trl_pair)(x)
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # logp and the entropy, which `logprob` makes too; vocabulary tiles as wide as the divergence's
    head = x.student
    return ChunkedLogProbFunction.apply(
        head.hidden, head.lm_head, None, x.tokens, 1.0, 32768, head.softcap, 1.0, ("entropy",)
    )[0].mean()


def liger_fused_pair(p: Head, q: Head, divergence: str) -> Tensor:
    from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

    require(p.hidden.is_cuda, "its Triton kernels need CUDA")
    require(p.softcap is None, "has no softcap")
    return LigerFusedLinearJSDFunction.apply(p.hidden, p.lm_head, q.hidden, q.lm_head, None, BETA[divergence])


def liger_chunked_pair(p: Head, q: Head, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    require(p.softcap is None, "has no softcap")
    # compiled is its default; on a CPU that costs half a minute and gains nothing
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[divergence], compiled=p.hidden.is_cuda)
    labels = torch.zeros(p.hidden.shape[0], dtype=torch.int64, device=p.hidden.device)
    return loss(p.hidden, p.lm_head, q.hidden, q.lm_head, labels)


def liger_flsce(x: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    require(x.case.op == "logprob", f"has no {x.case.op}")
    require(x.case.softcap is None, "has no softcap")
    return -LigerFusedLinearScaledCrossEntropyFunction.apply(x.student.hidden, x.student.lm_head, x.tokens).mean()


def orda_pair(p: Head, q: Head, divergence: str) -> Tensor:
    import orda_kernel

    require(p.softcap is None, "has no softcap")
    return orda_kernel.distillation_loss(
        p.hidden,
        p.lm_head,
        torch.zeros(p.hidden.shape[0], dtype=torch.int64, device=p.hidden.device),
        orda_kernel.SeparateTeacher(q.hidden, q.lm_head),
        student_ce_weight=0.0,
        teacher_ce_weight=0.0,
        kl_weight=1.0,
        kl_divergence="skew_js" if divergence == "jsd" else divergence,
        kl_beta=0.5 if divergence == "jsd" else None,
        backend="triton" if p.hidden.is_cuda else "torch",
    ).loss


def cut_cross_entropy(x: Inputs) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    require(x.case.op == "logprob", f"has no {x.case.op}")
    require(not x.case.quick, "compiles for half a minute without CUDA")
    head, impl = x.student, "cce" if x.tokens.is_cuda else "torch_compile"
    return -linear_cross_entropy(head.hidden, head.lm_head, x.tokens, softcap=x.case.softcap, impl=impl)


def flash_attention(x: Inputs) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    require(x.case.op == "logprob", f"has no {x.case.op}")
    require(x.case.softcap is None, "has no softcap")
    logits = F.linear(x.student.hidden, x.student.lm_head)
    return -cross_entropy_loss(logits, x.tokens, inplace_backward=True)[0].mean()


EAGER: dict[str, Contender] = {"eager": eager, "eager, fp32 logits": eager_wide}
FEW = EAGER | {"TRL": trl}
COMPILED = {"torch.compile": compiled}
DISTILL = FEW | {
    "Liger fused_linear_jsd": each_pair(liger_fused_pair),
    "Liger chunked_loss": each_pair(liger_chunked_pair),
    "orda": each_pair(orda_pair),
}
LOGPROB = FEW | {
    "Liger FLSCE": liger_flsce,
    "cut-cross-entropy": cut_cross_entropy,
    "flash-attention": flash_attention,
}
