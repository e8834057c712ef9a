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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from copd import schedule, topology
from copd.batch import Batch
from copd.branch import Branch
from copd.config import Config
from copd.distill import TeacherScore, Told
from copd.ranks import Place
from copd.rollout import Rollout
from copd.task import Task
from copd.weights import Weights

Edge = tuple[str, str, int, int]


@dataclass
class Plan:
    branches: list[Branch]
    """those that learn, of the ones that live here"""
    phases: list[str]
    """what each step is: `rl`, `opd` or `consolidate`; with `govern` those decided so far"""
    teachers: dict[str, list[str]] = field(default_factory=dict)
    """of each branch, in Phase II"""
    native: bool = True
    """Phase II takes a native batch too"""
    in_turn: bool = False
    """one teacher a step, instead of all"""
    steps: int = 0
    """phases in all; 0 for those listed"""
    govern: Callable[[list[str]], str] | None = None
    """from the phases so far to the next one; None takes those listed"""
    merge: Callable[[str, bool], Branch | None] | None = None
    """the merge of the branches as they are now, under a name, to learn or only to be measured; None where it does not
    live"""
    student: list[Branch] | None = None
    """the merge that learns in `consolidate`, if it lives here; None before that begins"""
    experts: list[Branch] = field(default_factory=list)
    """teachers that do not learn"""
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """what each teacher owns; empty for those that live here"""
    place: Place = None  # type: ignore[assignment]
    """where all live that learn; None for here"""

    def __post_init__(self) -> None:
        self.steps = self.steps or len(self.phases)
        self.place = self.place or Place([branch.name for branch in self.branches])
        self.tasks = self.tasks or {branch.name: branch.tasks[0] for branch in (*self.branches, *self.experts)}

    def phase(self, step: int) -> str:
        """What step `step` does; with `govern` every step is asked for once, in order."""
        if step == len(self.phases) and self.govern is not None:
            self.phases.append(self.govern(self.phases))
        return self.phases[step]

    def end(self, step: int, *phases: str) -> int:
        """The next step that is known to be none of these phases, or that there is none."""
        known = enumerate(self.phases[step + 1 :], step + 1)
        return next((later for later, phase in known if phase not in phases), self.steps)

    def names(self, step: int) -> list[str]:
        """Of all, wherever they live, that have learnt anything when `step` steps are done, or will in the next."""
        merged = self.merge is not None and "consolidate" in self.phases[: step + 1]
        return [*self.place.owner, "consolidated"] if merged else [*self.place.owner]

    def models(self, step: int) -> list[Branch]:
        """Those of `names` that live here."""
        if self.student is None and self.merge is not None and "consolidated" in self.names(step):
            made = self.merge("consolidated", True)
            self.student = [] if made is None else [made]
        return [*self.branches, *(self.student or [])]


def make_plan(
    cfg: Config,
    tasks: Mapping[str, Task],
    branch: Callable[..., Branch],
    expert: Callable[[str], PreTrainedModel | Weights],
    merged: Callable[[str, bool], Branch | None],
    overlap: Callable[[], float],
    place: Place | None = None,
) -> Plan:
    """The plan of `cfg.method`.

    `branch(name, tasks, model=base)` makes a branch, `expert(name)` a frozen teacher, `merged(name, learns)` the
    branches' merge where it lives; `overlap()` measures how close they are.
    """
    place, everything = place or Place.of(cfg), list(tasks.values())
    where: dict[str, Any] = {"tasks": tasks, "place": place}
    # batches on which `copd` distils
    taught = topology.cross_batches(cfg) * cfg.cycles * cfg.opd_steps + cfg.consolidate.steps
    in_turn = cfg.mixed_batch == "in_turn"
    a_step = 1 if in_turn else len(tasks)  # batches of a model that learns every domain
    if cfg.method == "mixed":
        batches = cfg.steps * len(tasks) + (taught if cfg.mixed_rollouts == "all" else 0)
        return Plan([branch("mixed", everything)], ["rl"] * (cfg.mixed_steps or math.ceil(batches / a_step)), **where)
    if cfg.method == "mopd":
        experts = [branch(name, [task], expert(name)) for name, task in tasks.items()]
        student, teachers = branch("student", everything), {"student": list(tasks)}
        a_step = 1 if cfg.opd.batch == "split" else a_step  # all teachers share one
        phases = ["opd"] * (cfg.mopd_steps or math.ceil(taught / a_step))
        return Plan([student], phases, teachers, native=False, in_turn=in_turn, experts=experts, **where)
    learners = [branch(name, [task]) for name, task in tasks.items() if place.holds(name)]
    after = ["consolidate"] * cfg.consolidate.steps

    if cfg.method == "expert":
        return Plan(learners, ["rl"] * cfg.steps, **where)
    if cfg.method == "independent":
        return Plan(learners, ["rl"] * cfg.steps + after, merge=merged, **where)
    plan = Plan(
        learners,
        schedule.fixed(cfg.cycles, cfg.rl_steps, cfg.opd_steps) + after,
        topology.teachers(cfg),
        native=cfg.opd.native,
        merge=merged,
        **where,
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
        # everything is sampled and scored with the weights of this step ...
        batches = gather(plan, phase, step)
        # ... before any branch moves
        metrics = {b.name: b.learn(batches.pop(b.name)) for b in plan.models(step) if b.name in batches}
        plan.place.settle()
        yield step + 1, phase, plan.place.union(metrics, plan.names(step))


def scorers(plan: Plan, student: str, phase: str, step: int) -> list[list[str]]:
    """The teachers of each batch that is not native, the owner of its prompts first; or the owners of its parts."""
    if phase == "rl":
        return []
    everyone = list(plan.place.owner)
    if phase == "consolidate":
        return [everyone]
    owners = plan.teachers[student]
    if plan.in_turn:
        owners = [owners[step % len(owners)]]
    others = everyone if plan.branches[0].cfg.opd.teachers == "all" else []
    return [[owner, *(name for name in others if name not in (student, owner))] for owner in owners]


def gather(plan: Plan, phase: str, step: int) -> dict[str, list[Batch]]:
    """What each branch that lives here learns from in this step.

    Phase I: a native batch. Phase II: a native batch, and rollouts of the student that each teacher scores.
    Consolidation: rollouts on everybody's prompts, each scored by its owner.
    """
    here, cfg = {branch.name: branch for branch in (*plan.models(step), *plan.experts)}, plan.branches[0].cfg
    learners = ["consolidated"] if phase == "consolidate" else list(plan.place.owner)
    taught = {name: scorers(plan, name, phase, step) for name in learners}  # the same on all ranks
    signal = cfg.consolidate.signal if phase == "consolidate" else cfg.opd.signal
    rewarded = ("rl", "opd") if plan.native else ("rl",)
    end, native_end = plan.end(step, phase), plan.end(step, *rewarded)
    batches: dict[str, list[Batch]] = {}
    for name in learners:
        if student := here.get(name):
            batches[name] = student.native_batches(step, native_end) if phase in rewarded else []
            for who in taught[name]:
                tasks = {owner: plan.tasks[owner] for owner in who}
                batches[name].append(
                    student.routed_batch(tasks, step, end)
                    if phase == "consolidate"
                    else student.cross_batch(tasks[who[0]], who, step, len(taught[name]), end)
                )
    # (student, teacher, batch from the end, the teacher's place in its lesson)
    edges = [
        (name, teacher, batch - len(lessons), place)
        for name, lessons in taught.items()
        for batch, who in enumerate(lessons)
        for place, teacher in enumerate(who)
    ]

    def scores(edge: Edge) -> list[TeacherScore]:
        lesson = batches[edge[0]][edge[2]].lesson
        assert lesson is not None
        return lesson.teachers

    def ask(edge: Edge) -> tuple[Rollout, slice | None]:
        return batches[edge[0]][edge[2]].rollout, scores(edge)[edge[3]].rows

    def answer(edge: Edge, asked: tuple[Rollout, slice | None], keep: torch.device) -> Told:
        # the sampled signal needs no more of the teacher than its log-probs
        teacher, heads, opd = here[edge[1]], signal != "sampled", cfg.opd
        return teacher.score(*asked, heads, opd.overlap_tokens, opd.teacher_top_k, keep).apart()

    updates, device = cfg.rlvr.updates_per_batch, plan.branches[0].device
    for edge, (score, states) in plan.place.exchange(edges, ask, answer, device, updates):
        scores(edge)[edge[3]] = replace(score, states=states)
    return batches


def mark_phase(plan: Plan, step: int) -> None:
    """Freezes all teachers where a Phase II begins, and lets them go where it ends."""
    before = plan.phases[step - 1] if step else "rl"
    if "opd" in (before, plan.phases[step]) and plan.phases[step] != before:
        for branch in plan.branches:
            branch.freeze() if plan.phases[step] == "opd" else branch.thaw()
