"""Algorithm 1 of Co-Evolving Policy Distillation (arXiv 2604.27083), and its baselines as the same loop.

What differs between methods is a `Plan`: which branches there are, who teaches whom, and what each step does.

    copd          K branches, taught by their neighbours' live weights in Phase II
    independent   K branches, the same steps, nobody teaches   (`expert`: the same, not merged)
    mixed         one branch that owns all domains, taken in turn
    mopd          one student without rewards, taught by frozen experts in turn

Left out or read differently against the paper: no reference KL (its equation has none); a step is one rollout batch and
`rlvr.updates_per_batch` (1) optimiser steps on it; the native and the cross batch each average over themselves, and
their losses add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from copd import topology
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
    """what each step is: `rl` or `opd`"""
    teachers: dict[str, list[Branch]] = field(default_factory=dict)
    """of each branch, in Phase II"""
    native: bool = True
    """Phase II takes a native batch too"""
    in_turn: bool = False
    """one teacher a step, instead of all"""


def make_plan(
    cfg: Config,
    tasks: Mapping[str, Task],
    branch: Callable[..., Branch],
    expert: Callable[[str], PreTrainedModel | Weights],
) -> Plan:
    """The plan of `cfg.method`. `branch(name, tasks, model=base)` makes a branch, `expert(name)` a frozen teacher."""
    everything = list(tasks.values())
    if cfg.method == "mixed":
        return Plan([branch("mixed", everything)], ["rl"] * (cfg.mixed_steps or len(tasks) * cfg.steps))
    if cfg.method == "mopd":
        experts = [branch(name, [task], expert(name)) for name, task in tasks.items()]
        steps = cfg.mopd_steps or len(tasks) * cfg.cycles * cfg.opd_steps
        student = branch("student", everything)
        return Plan([student], ["opd"] * steps, {"student": experts}, native=False, in_turn=True)
    branches = {name: branch(name, [tasks[name]]) for name in topology.local(list(tasks))}
    if cfg.method in ("independent", "expert"):
        return Plan(list(branches.values()), ["rl"] * cfg.steps)
    phases = (["rl"] * cfg.rl_steps + ["opd"] * cfg.opd_steps) * cfg.cycles
    taught = {name: [branches[teacher] for teacher in who] for name, who in topology.teachers(cfg).items()}
    return Plan(list(branches.values()), phases, taught, native=cfg.opd.native)


def coevolve(plan: Plan, start: int = 0) -> Iterator[tuple[int, str, dict[str, dict[str, Any]]]]:
    """Runs the steps from `start`; yields (steps done, phase, metrics of each branch) after each."""
    for step, phase in list(enumerate(plan.phases))[start:]:
        if plan.branches[0].cfg.opd.teacher == "phase_start":
            mark_phase(plan, step)
        # everything is sampled and scored with the weights of this step ...
        batches = {branch.name: gather(plan, branch, phase, step) for branch in plan.branches}
        # ... before any branch moves
        yield step + 1, phase, {branch.name: branch.learn(batches[branch.name]) for branch in plan.branches}


def gather(plan: Plan, student: Branch, phase: str, step: int) -> list[Batch]:
    """Phase I: a native batch. Phase II: a native batch, and rollouts of the student that each teacher scores."""
    batches = [student.native_batch(step)] if phase == "rl" or plan.native else []
    if phase == "opd":
        teachers = plan.teachers[student.name]
        if plan.in_turn:
            teachers = [teachers[step % len(teachers)]]
        for teacher in teachers:
            batches.append(student.cross_batch(teacher, step, shared_by=len(teachers)))
    return batches


def mark_phase(plan: Plan, step: int) -> None:
    """Freezes all teachers where a Phase II begins, and lets them go where it ends."""
    before = plan.phases[step - 1] if step else "rl"
    if plan.phases[step] != before:
        for branch in plan.branches:
            branch.freeze() if plan.phases[step] == "opd" else branch.thaw()
