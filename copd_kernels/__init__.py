"""Hidden states and `lm_head` in; log-probs and multi-teacher KL, values and gradients, out. Never full logits."""

from .agreement import agreement
from .head import Head
from .kl import kl
from .logprob import logprob
from .model import hidden_states, through_head
from .mutual import mutual_kl
from .results import Agreement, LogProb, MutualKL

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Head",
    "LogProb",
    "MutualKL",
    "agreement",
    "hidden_states",
    "kl",
    "logprob",
    "mutual_kl",
    "through_head",
]
