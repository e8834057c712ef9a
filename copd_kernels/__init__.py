"""Hidden states and `lm_head` in; log-probs and multi-teacher KL, values and gradients, out. Never full logits."""

from copd_kernels.agreement import agreement
from copd_kernels.head import Head
from copd_kernels.kl import kl
from copd_kernels.logprob import logprob
from copd_kernels.mutual import mutual_kl
from copd_kernels.results import Agreement, LogProb, MutualKL

__version__ = "0.1.0"

__all__ = ["Agreement", "Head", "LogProb", "MutualKL", "agreement", "kl", "logprob", "mutual_kl"]
