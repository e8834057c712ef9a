"""Hidden states and `lm_head` in; log-probs and multi-teacher KL, values and gradients, out. Never full logits."""

from .agreement import agreement
from .head import Head
from .kl import kl
from .logprob import logprob
from .model import hidden_states, through_head
from .mutual import mutual_kl
from .results import KL, Agreement, LogProb, LogProbStats, MutualKL
from .teachers import TopK
from .topk import topk

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Agreement",
    "Head",
    "LogProb",
    "LogProbStats",
    "MutualKL",
    "TopK",
    "agreement",
    "hidden_states",
    "kl",
    "logprob",
    "mutual_kl",
    "through_head",
    "topk",
]
