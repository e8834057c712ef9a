"""What the lab sets beyond `copd.config`: the tiny model and its warm start. Any file of a run may set these too."""

from __future__ import annotations

from dataclasses import dataclass, field

from copd.config import Config
from copd.settings import ModelConfig


@dataclass(frozen=True)
class TinyConfig(ModelConfig):
    """`path: None` builds the tiny Qwen3-VL of these sizes."""

    hidden_size: int = 128
    """width of the language model"""
    layers: int = 2
    """depth of the language model"""
    heads: int = 4
    """attention heads, of `hidden_size / heads` each"""
    vision_hidden_size: int = 32
    """width of the vision tower"""
    vision_layers: int = 2
    """depth of the vision tower"""
    init_std: float = 0.05
    """standard deviation of the initial matrices; at 0.02 the warm start is much slower"""


@dataclass(frozen=True)
class WarmStartConfig:
    clean_steps: int = 0
    """stage 1: at most so many steps of imitation of correct solutions; 0 skips the warm start"""
    slip_steps: int = 150
    """stage 2: steps of imitation of a careless annotator, so that there is something left for RL to learn"""
    target_accuracy: float = 0.95
    """stage 1 ends when every domain answers so many of 100 fresh prompts, greedily"""
    check_every: int = 50
    """steps between those checks"""
    lr: float = 3e-3
    """peak learning rate of stage 1; stage 2 falls from 1e-3 to 1e-4"""
    batch: int = 48
    """solutions of each domain a step; a domain at the target falls to a third"""
    domain_batch: dict[str, int] = field(default_factory=dict)
    """`batch` of single domains: long prompts cost more, and need not be the harder ones"""
    cache_dir: str = "runs/warmstart"
    """finished warm starts, one folder a configuration and seed, shared by all runs"""


@dataclass(frozen=True)
class LabConfig(Config):
    model: TinyConfig = field(default_factory=TinyConfig)
    warmstart: WarmStartConfig = field(default_factory=WarmStartConfig)
