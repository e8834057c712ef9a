"""logprob: forward and backward, its logits made again, forward alone, a frozen head, a soft-capped one."""

from bench.rivals import COMPILED, FEW, LOGPROB
from copd_kernels.rows import BACKENDS


def bench_logprob(contest):
    contest("logprob", LOGPROB | COMPILED, backends=BACKENDS)


def bench_recomputed_logits(contest):
    contest("logprob", LOGPROB | COMPILED, recompute=True)


def bench_other_dtype(contest, scale):
    contest("logprob", LOGPROB, dtype=scale.other_dtype)


def bench_forward_alone(contest):
    contest("logprob", LOGPROB, backward=False)


def bench_frozen_head(contest):
    contest("logprob", FEW, frozen=True)


def bench_softcap(contest):
    contest("logprob", FEW, model="gemma")
