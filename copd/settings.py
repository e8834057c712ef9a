"""The parts of a run's settings, each with the rules its fields obey; `copd.config.Config` holds one of each.

Where the paper (arXiv 2604.27083) leaves a point open the default is its most literal reading, and the line below a
field says what else there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from copd.schema import at_least, require


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA: each branch is a delta s B A, s = alpha / rank, of every target's weight."""

    rank: int = 32
    """r, rows of A and columns of B"""
    alpha: float = 64.0
    """scales the delta by alpha / rank"""
    dropout: float = 0.0
    """of what A reads while training; log-probs of sampling and of teachers are without it"""
    target_modules: Any = "all-linear"
    """`all-linear`: every linear layer but the head; or a list of names, or ends of names, of layers"""
    modules_to_save: list[str] = field(default_factory=list)
    """modules of which each branch trains a copy of its own"""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "model.adapter.rank must be at least 1", self.rank)
        require(self.alpha > 0, "model.adapter.alpha must be above 0", self.alpha)
        require(0 <= self.dropout < 1, "model.adapter.dropout must be in [0, 1)", self.dropout)
        named = isinstance(self.target_modules, list) and len(self.target_modules) > 0
        rule = "model.adapter.target_modules must be all-linear or a list of names"
        require(named or self.target_modules == "all-linear", rule, repr(self.target_modules))


@dataclass(frozen=True)
class ModelConfig:
    path: str | None = None
    """a `from_pretrained` name or folder"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; with bfloat16 the optimiser keeps fp32 master weights"""
    attention: str | None = None
    """`attn_implementation`; None takes flash-attn where installed, else what transformers does: SDPA where it can"""
    liger: bool = True
    """use Liger's RMSNorm, SwiGLU and RoPE where installed and on a GPU (never its losses)"""
    compile: str | None = None
    """a backend of `torch.compile`, as `inductor`, for the decoder's blocks when scoring and training (not sampling)"""
    activation_checkpointing: bool = False
    """recompute activations in the backward pass"""
    freeze_vision: bool = False
    """train the language model alone"""
    adapter: AdapterConfig | None = None
    """branches are LoRA adapters of one frozen base (`adapter: {}` for the defaults); None trains all weights"""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """JSONL file, folder, or Hugging Face dataset"""
    split: str = "train"
    """split of a Hugging Face dataset"""
    config_name: str | None = None
    """configuration of a Hugging Face dataset"""
    test_path: str | None = None
    """rows to test on; without it and `test_split` the last `test_rows` rows of `path` are held out"""
    test_split: str | None = None
    """split of a Hugging Face dataset to test on"""
    test_rows: int = 64
    """rows held out when there is neither `test_path` nor `test_split`"""
    format: Literal["trl", "verl", "easyr1"] = "trl"
    """whose names the columns have"""
    columns: dict[str, Any] = field(default_factory=dict)
    """other names: ours to theirs, where a dot reaches into a column, as `answer: reward_model.ground_truth`; null for
    a column that is not to be read, as `images: null`"""
    chat: bool = True
    """a prompt goes through the model's chat template, if it has one; False takes text as it is"""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """handed to the chat template, as Qwen3's `enable_thinking`"""
    system_prompt: str | None = None
    """put before every prompt that has no system message"""
    rewards: list[str] = field(default_factory=lambda: ["exact_match"])
    """names in `copd.rewards`, or `module:function` with TRL's signature"""
    reward_weights: list[float] | None = None
    """weight of each reward; None is 1 each"""
    max_failed_rewards: float = 0.25
    """share of a batch whose rewards may fail: those completions are logged and left out of the loss"""
    reward_timeout: float | None = None
    """seconds that a reward may take for a batch, and then for each completion alone, each in a process of its own;
    None sets no limit"""
    max_prompt_tokens: int | None = None
    """longest prompt, media included; None for no limit"""
    overlong: Literal["error", "next"] = "error"
    """what a longer prompt is: an error, or replaced by the next row that fits"""
    max_frames: int | None = None
    """frames kept of a video, evenly spaced; None keeps all"""
    fps: float = 2.0
    """frames a second that are taken from a video file, and that a folder of frames has"""
    decode_ahead: int = 16
    """rows with pictures or videos that threads decode before the step that needs them; 0 decodes within the step"""

    def __post_init__(self) -> None:
        limit = self.reward_timeout
        require(limit is None or limit > 0, "data.reward_timeout must be above 0, or null", limit)
        at_least(self, "data.", max_prompt_tokens=1, max_frames=1, test_rows=0, decode_ahead=0)
        require(0 <= self.max_failed_rewards <= 1, "data.max_failed_rewards must be in [0, 1]", self.max_failed_rewards)
        require(self.fps > 0, "data.fps must be above 0", self.fps)
        weights, rewards = self.reward_weights, len(self.rewards)
        require(rewards > 0, "data.rewards must name at least one reward", "none")
        rule = f"data.reward_weights must be one for each of the {rewards} rewards"
        require(weights is None or len(weights) == rewards, rule, weights)


@dataclass(frozen=True)
class BranchConfig:
    task: str = ""
    """`data`: rows of files; or a task that whoever starts the run knows, as `copd.lab` knows synthetic ones"""
    options: dict[str, Any] = field(default_factory=dict)
    """arguments of that task"""
    data: DataConfig = field(default_factory=DataConfig)
    """where the rows come from when `task` is `data`"""


@dataclass(frozen=True)
class RolloutConfig:
    prompts: int = 256
    """prompts a batch, of each branch"""
    samples: int = 8
    """G, completions a prompt"""
    max_new_tokens: int = 16384
    """longest completion; one that reaches it without EOS is truncated"""
    temperature: float = 1.0
    """divides the logits when sampling, and the same logits in every log-prob and KL"""
    mask_truncated: bool = True
    """a truncated completion takes no part in the loss (it is counted and logged)"""
    cache_tokens: int | None = None
    """positions of the KV cache at once, over all rows; None for no limit: set it when the cache does not fit"""
    engine: Literal["transformers", "vllm"] = "transformers"
    """who samples: the model itself, or vLLM with a copy of its weights"""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """arguments of vLLM's engine (`EngineArgs`), as `gpu_memory_utilization` or `max_model_len`"""

    def __post_init__(self) -> None:
        at_least(self, "rollout.", prompts=1, samples=1, max_new_tokens=1, cache_tokens=1)
        require(self.temperature > 0, "rollout.temperature must be above 0", self.temperature)


@dataclass(frozen=True)
class RLVRConfig:
    clip_low: float = 0.2
    """ε_low of the clipped ratio"""
    clip_high: float = 0.28
    """ε_high of the clipped ratio"""
    loss_aggregation: Literal["sequence", "token"] = "sequence"
    """`sequence` 1/B Σ_i 1/|y_i| Σ_t, as in the paper; `token` 1/Σ_i|y_i| Σ_i Σ_t, as in DAPO and EasyVideoR1's code"""
    normalize_advantage: bool = True
    """divide by the standard deviation of the group; False keeps r − mean (Dr. GRPO)"""
    advantage_eps: float = 1e-4
    """added to that standard deviation"""
    updates_per_batch: int = 1
    """optimiser steps on each batch; the ratio leaves 1, and the clip acts, from the second one on"""
    importance_cap: float | None = 2.0
    """C of truncated importance sampling: a sampled token counts min(π/π_sampler, C) times; None turns it off"""

    def __post_init__(self) -> None:
        at_least(self, "rlvr.", clip_low=0, clip_high=0, advantage_eps=0, updates_per_batch=1)
        cap = self.importance_cap
        require(cap is None or cap > 0, "rlvr.importance_cap must be above 0, or null", cap)


@dataclass(frozen=True)
class OPDConfig:
    signal: Literal["sampled", "reverse", "forward", "jsd"] = "sampled"
    """`sampled`: the paper's δ on the sampled token; otherwise that divergence over the whole vocabulary"""
    beta: float = 1.0
    """β_k, weight of the distillation signal (the paper gives no value)"""
    branch_beta: dict[str, float] = field(default_factory=dict)
    """β of single branches, over `beta`"""
    jsd_beta: float = 0.5
    """weight of the teacher in the mixture, for `jsd`"""
    delta_clamp: float | None = None
    """bound of |δ| for `sampled`; the paper has none, peers clamp at 5 to 10"""
    clip_ratio: bool = True
    """δ goes through the clipped ratio like any advantage; False is plain REINFORCE"""
    native: bool = True
    """every distillation step also takes a native GRPO batch; False distils alone"""
    teacher: Literal["live", "phase_start"] = "live"
    """`live`: the teacher's weights of this very step; `phase_start`: frozen when the phase began"""
    teacher_top_k: int | None = None
    """a teacher tells its so many likeliest words and the mass of the rest, in place of hidden states and `lm_head`:
    what a small message or a server can hold; of divergences, `consolidate`'s too; None tells everything"""
    teachers: Literal["owner", "all"] = "owner"
    """who scores a cross batch: the branch that owns its prompts, or every other branch in one sweep"""
    teacher_weight: Literal["fixed", "better"] = "fixed"
    """with `all`: `owner_weight`, or by how much each teacher's way raises the reward of the student's rollouts"""
    owner_weight: float | None = None
    """with `fixed`: weight of the owner, the rest being shared by the others; None weighs all the same"""
    batch: Literal["per_edge", "split"] = "per_edge"
    """`prompts` for each teacher, or shared out among a branch's teachers"""
    overlap_tokens: int = 4096
    """positions of each cross batch on which overlap and KL are logged"""

    def __post_init__(self) -> None:
        at_least(self, "opd.", beta=0, delta_clamp=0, overlap_tokens=0, teacher_top_k=1)
        require(0 <= self.jsd_beta <= 1, "opd.jsd_beta must be in [0, 1]", self.jsd_beta)
        weight = self.owner_weight
        require(weight is None or 0 <= weight <= 1, "opd.owner_weight must be in [0, 1]", weight)
        rule = "opd.owner_weight must be null with teacher_weight: better"
        require(weight is None or self.teacher_weight == "fixed", rule, weight)


@dataclass(frozen=True)
class ConsolidateConfig:
    steps: int = 0
    """steps in which the merged model learns from the branches after the merge; 0 is the paper's method"""
    signal: Literal["sampled", "reverse", "forward", "jsd"] = "forward"
    """as `opd.signal`; each prompt is judged by the branch that owns it"""
    native: bool = False
    """rewards of the same rollouts add a GRPO loss"""

    def __post_init__(self) -> None:
        require(self.steps >= 0, "consolidate.steps must be at least 0", self.steps)


@dataclass(frozen=True)
class MergeConfig:
    method: Literal["mean", "weighted", "task_arithmetic", "ties"] = "mean"
    """how branches become one model; the paper averages"""
    weights: dict[str, float] = field(default_factory=dict)
    """weight of each branch: normalised for `weighted`, taken as they are otherwise (default 1 each)"""
    scale: float = 1.0
    """λ of task arithmetic and TIES, on the summed or elected task vector"""
    density: float = 0.2
    """share of each task vector that TIES keeps"""
    into: Literal["model", "adapter"] = "model"
    """of adapters: one whole model, or one adapter of their base"""
    rank: int | None = None
    """of that adapter: cut to so many ranks by SVD, its error reported; None keeps the sum of all ranks, exact"""

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, "merge.density must be in (0, 1]", self.density)
        require(self.rank is None or self.rank >= 1, "merge.rank must be at least 1", self.rank)
        full = self.into == "adapter" and self.method == "ties" and self.rank is None
        require(not full, "merge.rank must be given for ties into an adapter, whose vectors have full rank", "none")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6
    """AdamW's learning rate, constant"""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's momenta"""
    eps: float = 1e-8
    """AdamW's ε; 1e-5 keeps rows of unused words still in a tiny model"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""

    def __post_init__(self) -> None:
        at_least(self, "optim.", lr=0, eps=0, weight_decay=0, max_grad_norm=0)
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(two, "optim.betas must be two numbers in [0, 1)", self.betas)


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """steps between accuracies of all branches; 0 for none but the final ones"""
    merged: bool = False
    """the merge of the branches as they are is measured along with them, which takes the memory of one more model"""
    divergence_every: int | None = None
    """steps between overlaps and KLs between branches; None is `every`; a few to a phase show its saw-tooth"""
    prompts: int = 300
    """held-out prompts of each domain at the end"""
    samples: int = 2
    """samples a prompt at temperature 1; accuracy is their mean (pass@1)"""
    curve_prompts: int = 100
    """held-out prompts of each domain during training, one sample each"""
    divergence_prompts: int = 16
    """prompts of each domain on which overlap and KL between branches are measured"""
    top_k: int = 10
    """k of the top-k overlap"""
    shown: int = 4
    """samples of each model and domain kept for the report"""

    def __post_init__(self) -> None:
        at_least(self, "eval.", prompts=1, samples=1, curve_prompts=1, divergence_prompts=1, top_k=1)
        at_least(self, "eval.", every=0, divergence_every=0, shown=0)
