"""Who samples: transformers in the model itself, or vLLM with a copy of its weights (`rollout.engine`)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

from transformers import PreTrainedModel

from copd.config import Config
from copd.rollout import Rollout, Special, generate
from copd.settings import RolloutConfig
from copd.task import Prompt
from copd.weights import Weights


class Engine(Protocol):
    def sample(
        self,
        weights: Weights,
        prompts: list[Prompt],
        samples: int,
        special: Special,
        seed: int,
        greedy: bool = False,
        first: int = 0,
    ) -> Rollout:
        """`samples` completions of each prompt by the weights as they are now, which must be active.

        `first` prompts of the same batch are sampled elsewhere: what a row samples depends on its place in the whole.
        """


class Transformers:
    """The model itself samples: nothing is copied."""

    def __init__(self, cfg: RolloutConfig) -> None:
        self.cfg = cfg

    def sample(
        self,
        weights: Weights,
        prompts: list[Prompt],
        samples: int,
        special: Special,
        seed: int,
        greedy: bool = False,
        first: int = 0,
    ) -> Rollout:
        return generate(weights.model, prompts, samples, self.cfg, special, seed, greedy, first)


def make(cfg: Config, model: PreTrainedModel, processor: Any) -> Engine:
    """The engine of a process: one for all its branches. vLLM itself starts at the first rollout."""
    check(cfg.rollout)
    if cfg.rollout.engine == "transformers":
        return Transformers(cfg.rollout)
    from copd.vllm import VLLM

    return VLLM(cfg, model, processor)


def check(cfg: RolloutConfig) -> None:
    """Raises `ImportError` for an engine that is not installed."""
    if cfg.engine == "vllm" and find_spec("vllm") is None:
        raise ImportError("rollout: engine vllm must be installed; got none; pip install 'copd[vllm]' installs it")
