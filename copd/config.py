"""Every setting of a run, in one frozen tree.

A YAML file and `key=value` arguments are laid over these defaults; a key that is not here is an error. Where the paper
(arXiv 2604.27083) leaves a point open the default is its most literal reading, and the comment says what else there is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from copd.schedule import OverlapConfig
from copd.schema import at_least, require
from copd.settings import (
    BranchConfig,
    ConsolidateConfig,
    EvalConfig,
    MergeConfig,
    ModelConfig,
    OPDConfig,
    OptimConfig,
    RLVRConfig,
    RolloutConfig,
)

Method = Literal["copd", "expert", "mixed", "mopd", "independent"]


@dataclass(frozen=True)
class Config:
    name: str = "run"
    """folder of the run below `output_dir`"""
    output_dir: str = "runs"
    """where runs are written"""
    variant: str = ""
    """suite the run belongs to in a study; runs of one variant are compared"""
    arm: str = ""
    """what the run is in that comparison, one method standing there with several settings; empty is its method"""
    method: Method = "copd"
    """`copd`; `independent`: the same branches without distillation, merged at the end; `expert`: those, unmerged;
    `mixed`: one model, all domains; `mopd`: one student of frozen experts"""
    seed: int = 0
    """seed of model, data order and sampling"""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`"""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice; results are reproducible for one thread count only"""
    branches: dict[str, BranchConfig] = field(default_factory=dict)
    """the domains, and the branch that owns each; the first is the hub unless `hub` says otherwise"""
    topology: Literal["hub", "all"] = "hub"
    """`hub`: hub and spokes teach each other, spokes do not; `all`: all pairs (the same for two branches)"""
    hub: str | None = None
    """name of the hub branch; None is the first"""
    cycles: int = 8
    """N, number of Phase I + Phase II cycles"""
    rl_steps: int = 9
    """S_RL, steps of each Phase I"""
    opd_steps: int = 6
    """S_OPD, steps of each Phase II; S_RL : S_OPD = 1.5 was the paper's best"""
    schedule: Literal["fixed", "overlap"] = "fixed"
    """`fixed`: S_RL and S_OPD steps in turn; `overlap`: as many steps in all, each phase as long as `overlap` says"""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    consolidate: ConsolidateConfig = field(default_factory=ConsolidateConfig)
    mixed_batch: Literal["in_turn", "joint"] = "in_turn"
    """of `mixed` and of the student of `mopd`: a domain a step, or a batch of every domain in every step"""
    mixed_steps: int | None = None
    """steps of `mixed`; None: as many as `mixed_rollouts` says"""
    mixed_rollouts: Literal["native", "all"] = "native"
    """what `mixed` samples: as much as the branches' native batches, K times their steps or jointly as many; or as all
    of `copd` with the same settings, for distillation and consolidation too"""
    mopd_steps: int | None = None
    """steps of the `mopd` student; None: as many as take the distillation batches of `copd`, consolidation's too"""
    experts: str | None = None
    """folder of a finished `expert` or `independent` run whose branches teach in `mopd`; None trains them first"""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rlvr: RLVRConfig = field(default_factory=RLVRConfig)
    opd: OPDConfig = field(default_factory=OPDConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    micro_batch_tokens: int = 65536
    """tokens (padding included) of one forward and backward pass; gradients of micro-batches add up"""
    offload: bool = False
    """a branch's weights and optimiser leave the device while another works"""
    checkpoint_every: int = 0
    """steps between resumable checkpoints, beside that of the last step and of one before a failure; 0 for none"""
    checkpoint_async: bool = True
    """training goes on while a checkpoint is written, from a copy of it in host memory"""
    keep_checkpoints: int = 2
    """older checkpoints are removed"""
    checkpoint_required: bool = True
    """a checkpoint that cannot be written, as on a full disk, ends the run; False says so and goes on"""
    resume: bool = True
    """continue from the run's newest checkpoint, if there is one; False moves what is there aside and starts anew"""
    timeout: float = 7200.0
    """seconds that ranks wait for each other before they give up: more than the longest batch of rollouts takes"""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """trackers beside `metrics.jsonl`"""

    @property
    def steps(self) -> int:
        """Optimiser steps of one branch."""
        return self.cycles * (self.rl_steps + self.opd_steps)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def __post_init__(self) -> None:
        names = list(self.branches)
        require(bool(names), "branches must name at least one domain", "none")
        for name, branch in self.branches.items():
            require(bool(branch.task), f"branches.{name}.task must be set", "nothing")
        for name in self.opd.branch_beta:
            require(name in names, f"opd.branch_beta must name branches {names}", repr(name))
        for name in self.merge.weights:
            require(name in names, f"merge.weights must name branches {names}", repr(name))
        whole = self.merge.into == "adapter" and self.model.adapter is None
        require(not whole, "merge.into must be model without model.adapter", self.merge.into)
        adapter = bool(self.consolidate.steps) and self.merge.into == "adapter"
        require(not adapter, "merge.into must be model with consolidate.steps", self.merge.into)
        rule = "offload must be false with model.adapter, whose base no branch can leave"
        require(not (self.offload and self.model.adapter), rule, self.offload)
        require(self.hub in (None, *names), f"hub must be one of the branches {names}", repr(self.hub))
        rule = "branches must have names that make folders, and not base, merged or overall"
        for name in names:
            free = re.fullmatch(r"\w[\w.-]*", name) and name not in ("base", "merged", "overall")
            require(bool(free), rule, repr(name))
        at_least(self, cycles=0, rl_steps=0, opd_steps=0, checkpoint_every=0, threads=0)
        require(self.timeout > 0, "timeout must be above 0", self.timeout)
        at_least(self, keep_checkpoints=1, micro_batch_tokens=1, mixed_steps=1, mopd_steps=1)
