"""Algorithm 1 of Co-Evolving Policy Distillation (arXiv 2604.27083), and its baselines as the same loop.

What differs between methods is a `Plan`: which branches there are, who teaches whom, and what each step does.

    copd          K branches, taught by their neighbours' live weights in Phase II
    independent   K branches, the same steps, nobody teaches   (`expert`: the same, not merged)
    mixed         one branch that owns all domains, taken in turn or all in every step
    mopd          one student without rewards, taught by frozen experts in turn

After the merge, `consolidate` (not in the paper) is one more plan: the merged model is the only one that learns, on
every branch's prompts, each taught by the branch that owns it.

Left out or read differently against the paper: no reference KL (its equation has none); a step is one rollout batch and
`rlvr.updates_per_batch` (1) optimiser steps on it; the native and the cross batch each average over themselves, and
their losses add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from copd import schedule, topology
from copd.batch import Batch
from copd.branch import Branch
from copd.config import Config
from copd.task import Task
from copd.weights import Weights


@dataclass
class Plan:
    branches: list[Branch]
    """those that learn"""
    phases: list[str]
    """what each step is: `rl`, `opd` or `consolidate`; with `govern` those decided so far"""
    teachers: dict[str, list[Branch]] = field(default_factory=dict)
    """of each branch, in Phase II"""
    native: bool = True
    """Phase II takes a native batch too"""
    in_turn: bool = False
    """one teacher a step, instead of all"""
    steps: int = 0
    """phases in all; 0 for those listed"""
    govern: Callable[[list[str]], str] | None = None
    """from the phases so far to the next one; None takes those listed"""
    merge: Callable[[str, bool], Branch] | None = None
    """the merge of the branches as they are now, under a name, to learn or only to be measured"""
    student: Branch | None = None
    """the merge that learns in `consolidate`"""

    def __post_init__(self) -> None:
        self.steps = self.steps or len(self.phases)

    def phase(self, step: int) -> str:
        """What step `step` does; with `govern` every step is asked for once, in order."""
        if step == len(self.phases) and self.govern is not None:
            self.phases.append(self.govern(self.phases))
        return self.phases[step]

    def models(self, step: int) -> list[Branch]:
        """All that have learnt anything when `step` steps are done, or will in the next."""
        if self.student is None and self.merge is not None and "consolidate" in self.phases[: step + 1]:
            self.student = self.merge("consolidated", True)
        return self.branches if self.student is None else [*self.branches, self.student]


def make_plan(
    cfg: Config,
    tasks: Mapping[str, Task],
    branch: Callable[..., Branch],
    expert: Callable[[str], PreTrainedModel | Weights],
    merged: Callable[[], PreTrainedModel | Weights],
    overlap: Callable[[], float],
) -> Plan:
    """The plan of `cfg.method`.

    `branch(name, tasks, model=base)` makes a branch, `expert(name)` a frozen teacher, `merged()` the branches' merge;
    `overlap()` measures how close they are.
    """
    everything = list(tasks.values())
    # batches on which `copd` distils
    taught = topology.cross_batches(cfg) * cfg.cycles * cfg.opd_steps + cfg.consolidate.steps
    if cfg.method == "mixed":
        batches = cfg.steps * len(tasks) + (taught if cfg.mixed_rollouts == "all" else 0)
        steps = math.ceil(batches / len(tasks)) if cfg.mixed_batch == "joint" else batches
        return Plan([branch("mixed", everything)], ["rl"] * (cfg.mixed_steps or steps))
    if cfg.method == "mopd":
        experts = [branch(name, [task], expert(name)) for name, task in tasks.items()]
        student = branch("student", everything)
        return Plan([student], ["opd"] * (cfg.mopd_steps or taught), {"student": experts}, native=False, in_turn=True)
    branches = {name: branch(name, [tasks[name]]) for name in topology.local(list(tasks))}
    learners, after = list(branches.values()), ["consolidate"] * cfg.consolidate.steps

    def merge(name: str, learns: bool) -> Branch:
        model = merged()
        if learns:
            assert isinstance(model, PreTrainedModel)  # the config refuses a merge into an adapter
            model.requires_grad_(True)
        return branch(name, everything, model)

    if cfg.method == "expert":
        return Plan(learners, ["rl"] * cfg.steps)
    if cfg.method == "independent":
        return Plan(learners, ["rl"] * cfg.steps + after, merge=merge)
    teachers = {name: [branches[teacher] for teacher in who] for name, who in topology.teachers(cfg).items()}
    plan = Plan(
        learners,
        schedule.fixed(cfg.cycles, cfg.rl_steps, cfg.opd_steps) + after,
        teachers,
        native=cfg.opd.native,
        merge=merge,
    )
    if cfg.schedule == "overlap":
        plan.phases, plan.govern = [], schedule.by_overlap(cfg.overlap, cfg.steps, overlap)
    return plan


def coevolve(plan: Plan, start: int = 0) -> Iterator[tuple[int, str, dict[str, dict[str, Any]]]]:
    """Runs the steps from `start`; yields (steps done, phase, metrics of each branch) after each."""
    for step in range(start, plan.steps):
        phase = plan.phase(step)
        if plan.branches[0].cfg.opd.teacher == "phase_start":
            mark_phase(plan, step)
        learners = plan.models(step)[len(plan.branches) :] if phase == "consolidate" else plan.branches
        # everything is sampled and scored with the weights of this step ...
        batches = {branch.name: gather(plan, branch, phase, step) for branch in learners}
        # ... before any branch moves
        yield step + 1, phase, {branch.name: branch.learn(batches[branch.name]) for branch in learners}


def gather(plan: Plan, student: Branch, phase: str, step: int) -> list[Batch]:
    """Phase I: a native batch. Phase II: a native batch, and rollouts of the student that each teacher scores.

    Consolidation: rollouts on everybody's prompts, each scored by its owner.
    """
    if phase == "consolidate":
        return [student.routed_batch(plan.branches, step)]
    batches = student.native_batches(step) if phase == "rl" or plan.native else []
    if phase == "opd":
        teachers = plan.teachers[student.name]
        if plan.in_turn:
            teachers = [teachers[step % len(teachers)]]
        everyone = plan.branches if student.cfg.opd.teachers == "all" else []
        for teacher in teachers:
            others = [branch for branch in everyone if branch not in (student, teacher)]
            batches.append(student.cross_batch(teacher, step, len(teachers), others))
    return batches


def mark_phase(plan: Plan, step: int) -> None:
    """Freezes all teachers where a Phase II begins, and lets them go where it ends."""
    before = plan.phases[step - 1] if step else "rl"
    if "opd" in (before, plan.phases[step]) and plan.phases[step] != before:
        for branch in plan.branches:
            branch.freeze() if plan.phases[step] == "opd" else branch.thaw()
