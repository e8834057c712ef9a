"""kl: each divergence, several teachers, a frozen head, a soft-capped one, forward alone, and routed teachers."""

import pytest

from bench.rivals import COMPILED, DISTILL, FEW
from copd_kernels.rows import BACKENDS


def bench_reverse(contest):
    contest("kl", DISTILL | COMPILED, backends=BACKENDS)


def bench_jsd(contest):
    contest("kl", DISTILL | COMPILED, divergence="jsd")


def bench_other_dtype(contest, scale):
    contest("kl", DISTILL | COMPILED, dtype=scale.other_dtype)


@pytest.mark.parametrize("divergence", ["forward", "symmetric"])
def bench_divergence(contest, divergence):
    contest("kl", FEW, divergence=divergence)


@pytest.mark.parametrize("T", [2, 4])
def bench_teachers(contest, T):
    contest("kl", FEW, T=T)


def bench_routed_teachers(contest):
    contest("routed_kl", FEW, T=4)


def bench_frozen_head(contest):
    contest("kl", FEW, frozen=True)


def bench_forward_alone(contest):
    contest("kl", FEW, backward=False)


@pytest.mark.parametrize("model", ["qwen3-vl-4b", "llama-3", "gemma"])
def bench_model(contest, model):
    contest("kl", FEW, model=model)
