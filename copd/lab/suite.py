"""The runs of one suite, side by side: what each arm made, what that cost, and which is ahead.

An arm is a method with settings of its own (`copd.lab.study`). Its headline is the one model that it ends with:
consolidated where it consolidates, else merged, or the only one it trains.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from copd.lab.figures import mean_error, shade

Result = dict[str, Any]
Seeds = dict[int, float]
"""seed -> value"""
METHODS = {"independent": "Experts", "expert": "Experts", "mopd": "MOPD", "mixed": "Mixed RLVR", "copd": "CoPD"}
SINGLE = {"mixed": "mixed", "mopd": "student"}
"""the only model of a method that trains one"""


def value(record: Result) -> float:
    """Mean reward of an evaluation; files of before rewards had their own name call it accuracy."""
    return float(record["reward"] if "reward" in record else record["accuracy"])


def arm_of(run: Result) -> str:
    """Files of before a method could stand in several arms name the method alone."""
    return str(run.get("arm") or run["method"])


@dataclass(frozen=True)
class Arm:
    name: str
    method: str
    colour: str
    runs: dict[int, Result]
    """seed -> run"""

    @property
    def label(self) -> str:
        if self.name == self.method:
            return METHODS[self.method]
        return f"{METHODS[self.method]}, {self.name.removeprefix(f'{self.method}-')}"

    @property
    def first(self) -> Result:
        return next(iter(self.runs.values()))

    @property
    def ends(self) -> list[str]:
        """What it ends with, the headline last."""
        names = [SINGLE[self.method]] if self.method in SINGLE else ["merged", "consolidated"]
        return [name for name in names if name in self.first["final"]]


@dataclass(frozen=True)
class Model:
    """One row of the final table."""

    label: str
    colour: str
    hatched: bool
    accuracy: dict[str, Seeds]
    """domain, or `overall`, their mean -> seed -> mean reward, an accuracy where rewards are 0 or 1"""
    rollouts: float
    """completions sampled to make it, its teachers' included"""
    depth: float
    """optimiser steps one after the other, its teachers' included: branches step side by side"""


@dataclass(frozen=True)
class Comparison:
    label: str
    first: list[float]
    """a value for each seed that both have"""
    second: list[float]

    @property
    def difference(self) -> list[float]:
        return [one - two for one, two in zip(self.first, self.second, strict=True)]

    @property
    def ahead(self) -> int:
        """seeds in which the first is higher"""
        return sum(difference > 0 for difference in self.difference)


class Suite:
    """The runs of one variant."""

    def __init__(self, variant: str, runs: list[Result]) -> None:
        self.variant, self.prefix = variant, f"{variant}-" if variant else ""
        for record in (record for run in runs for record in run["eval"]):
            record.setdefault("reward", value(record))
        self.arms: dict[str, Arm] = {}
        kin: dict[str, int] = defaultdict(int)
        for run in runs:
            name, method = arm_of(run), run["method"]
            if name not in self.arms:
                self.arms[name] = Arm(name, method, shade(method, kin[method]), {})
                kin[method] += 1
            self.arms[name].runs[run["seed"]] = run
        # what is compared with the others: `copd` where an arm has that name
        self.main = self.arms.get("copd") or self._first("copd")
        self.control = self._first("independent") or self._first("expert")
        # the run that names domains and branches
        self.first = (self.main or self.control or next(iter(self.arms.values()))).first
        self.domains: list[str] = self.first["domains"]
        self.own: dict[str, str] = self.first["branches"]
        self.seeds = max(len(arm.runs) for arm in self.arms.values())
        finals = [record for run in runs for found in run["final"].values() for record in found.values()]
        self.right_or_wrong = all(
            "accuracy" in record for record in [*finals, *(r for run in runs for r in run["eval"])]
        )
        """every reward is 0 or 1, so that a mean is an accuracy and shown in %"""
        self.scale = 100 if self.right_or_wrong else 1
        self.measure = "accuracy" if self.right_or_wrong else "reward"
        self.columns = [*self.domains, "overall"]
        self.models = self._models()

    def _first(self, method: str) -> Arm | None:
        return next((arm for arm in self.arms.values() if arm.method == method), None)

    def finals(self, runs: dict[int, Result], name: str) -> dict[str, Seeds]:
        """Of the model `name` in each run: domain, or overall -> seed -> mean reward."""
        found: dict[str, Seeds] = {column: {} for column in self.columns}
        for seed, run in runs.items():
            if name in run["final"]:
                means = {domain: value(record) for domain, record in run["final"][name].items()}
                for column, mean in (means | {"overall": fmean(means.values())}).items():
                    found[column][seed] = mean
        return found

    def before(self, arm: Arm, seed: int) -> tuple[int, int]:
        """Rollouts and steps that went into the teachers of a run."""
        taught = self.control.runs.get(seed) if arm.method == "mopd" and self.control else None
        return (0, 0) if taught is None else spent(taught, "merged")

    def _models(self) -> dict[str, Model]:
        """Every row of the table, by a key such as `base`, `experts`, `copd/merged`."""
        models: dict[str, Model] = {}
        everything = {seed: run for arm in self.arms.values() for seed, run in arm.runs.items()}
        models["base"] = Model("base", shade("base"), False, self.finals(everything, "base"), 0, 0)

        def add(key: str, label: str, colour: str, arm: Arm, name: str, hatched: bool = False, share: int = 1) -> None:
            costs = []
            for seed, run in arm.runs.items():
                costs.append([a + b for a, b in zip(spent(run, name), self.before(arm, seed), strict=True)])
            rollouts, depth = (fmean(column) for column in zip(*costs, strict=True))
            accuracy = self.finals(arm.runs, name)
            models[key] = Model(label, colour, hatched, accuracy, rollouts / share, depth)

        if self.control and len(self.own) > 1:
            home: dict[str, Seeds] = {d: self.finals(self.control.runs, b)[d] for b, d in self.own.items()}
            home["overall"] = {s: fmean(home[d][s] for d in home) for s in self.control.runs}
            rollouts, depth = (
                fmean(c) for c in zip(*(spent(r, "merged") for r in self.control.runs.values()), strict=True)
            )
            models["experts"] = Model("experts, each at home", shade("independent"), True, home, rollouts, depth)
        for arm in self.arms.values():
            if len(self.arms) == 1:  # nothing else to look at
                for i, branch in enumerate(self.own):
                    hub = " (hub)" if branch == self.first["hub"] and len(self.own) > 2 else ""
                    label = f"CoPD {branch}{hub}" if arm.method == "copd" else f"{branch} expert"
                    share = 1 if arm.method == "copd" else len(self.own)
                    add(f"{arm.name}/{branch}", label, shade("branch", i), arm, branch, arm.method != "copd", share)
            for name in arm.ends if arm in (self.main, self.control) else arm.ends[-1:]:
                add(f"{arm.name}/{name}", row(arm, name), arm.colour, arm, name, name != arm.ends[-1])
        return models

    def headline(self, arm: Arm) -> Model | None:
        return self.models[f"{arm.name}/{arm.ends[-1]}"] if arm.ends else None

    def number(self, values: Iterable[float], sign: bool = False) -> str:
        mean, error = mean_error(values)
        form, scale = ".1f" if self.right_or_wrong else ".4g", self.scale
        return f"{scale * mean:{'+' if sign else ''}{form}}" + (
            f" ± {scale * error:{form}}" if error is not None else ""
        )

    def final(self) -> list[list[str]]:
        """Rows (model, accuracy in every column, seeds, rollouts, steps), the best of a column in bold."""
        best = {c: max(fmean(model.accuracy[c].values()) for model in self.models.values()) for c in self.columns}

        def cell(model: Model, column: str) -> str:
            values = model.accuracy[column].values()
            return f"**{self.number(values)}**" if fmean(values) == best[column] else self.number(values)

        return [
            [
                model.label,
                *(cell(model, column) for column in self.columns),
                str(len(model.accuracy["overall"])),
                f"{model.rollouts:,.0f}",
                f"{model.depth:,.0f}",
            ]
            for model in self.models.values()
        ]

    def truncated(self) -> float:
        """The largest share, in %, of a model's final completions on a domain that reached the length limit."""
        finals = [run["final"] for arm in self.arms.values() for run in arm.runs.values()]
        return 100 * max(r["clipped_ratio"] for final in finals for domains in final.values() for r in domains.values())

    def ranking(self) -> str:
        overall = [(fmean(model.accuracy["overall"].values()), model.label) for model in self.models.values()]
        return " > ".join(
            f"{label} {self.number([mean])}" for mean, label in sorted(overall, key=lambda pair: -pair[0])
        )

    def comparisons(self) -> list[Comparison]:
        """CoPD's headline over the other arms'; CoPD over the MOPD of its signal and as many rollouts; branches over
        experts at home."""
        found: list[Comparison] = []

        def add(label: str, one: Seeds, two: Seeds) -> None:
            if seeds := sorted(set(one) & set(two)):
                found.append(Comparison(label, [one[s] for s in seeds], [two[s] for s in seeds]))

        def over(first: Arm, second: Arm) -> None:
            one, two = self.headline(first), self.headline(second)
            if one and two:
                add(f"{one.label} over {two.label}", one.accuracy["overall"], two.accuracy["overall"])

        if self.main is None or len(self.arms) == 1:
            return found
        for arm in self.arms.values():
            if arm is not self.main:
                over(self.main, arm)
        for one in self.arms.values():
            for two in self.arms.values():
                if one is not self.main and self.matched(one, two):
                    over(one, two)
        if "experts" in self.models:
            branches = [self.finals(self.main.runs, branch)[domain] for branch, domain in self.own.items()]
            home = {seed: fmean(branch[seed] for branch in branches) for seed in self.main.runs}
            add("CoPD branches over experts, each at home", home, self.models["experts"].accuracy["overall"])
        return found

    def matched(self, one: Arm, two: Arm) -> bool:
        """CoPD and the MOPD that was given its signal and its number of rollouts."""

        def given(arm: Arm) -> list[Any]:
            model = self.headline(arm)
            signal = OmegaConf.select(OmegaConf.create(arm.first["config"]), "opd.signal")
            return [signal, round(model.rollouts) if model else None]

        return (one.method, two.method) == ("copd", "mopd") and given(one) == given(two)

    def rows(self) -> list[list[str]]:
        """Rows (comparison, first, second, difference, seeds ahead), whichever way they go."""
        return [
            [
                c.label,
                self.number(c.first),
                self.number(c.second),
                self.number(c.difference, sign=True),
                f"{c.ahead} of {len(c.first)}",
            ]
            for c in self.comparisons()
        ]

    def findings(self) -> dict[str, list[str]]:
        """What is ahead in every seed, in none, or in some, and by how much; of arms that most seeds have."""
        found: dict[str, list[str]] = {"ahead in every seed": [], "in none": [], "in some": []}
        for c in self.comparisons():
            seeds = len(c.first)
            if self.main is not None and 2 * seeds <= len(self.main.runs):
                continue
            kind = {seeds: "ahead in every seed", 0: "in none"}.get(c.ahead, "in some")
            how = f"{c.ahead} of {seeds}" if kind == "in some" else f"{seeds} seed{'s' if seeds > 1 else ''}"
            # the headline has been named before
            label = c.label.removeprefix(self.head).strip()
            same = kind != "in some" and self.main is not None and seeds == len(self.main.runs)
            found[kind].append(f"{label} {self.number(c.difference, sign=True)}" + ("" if same else f" ({how})"))
        return {kind: texts for kind, texts in found.items() if texts}

    @property
    def head(self) -> str:
        """What the table calls the main arm's headline."""
        model = self.headline(self.main) if self.main else None
        return model.label if model else ""

    def cards(self) -> dict[str, list[Result]]:
        """Domain -> held-out prompts of the first seed, each with what every model answered."""
        cards: dict[str, dict[int, Result]] = defaultdict(dict)
        for arm in self.arms.values():
            for sample in (sample for run in arm.runs.values() for sample in run["samples"]):
                card = cards[sample["domain"]].setdefault(sample["index"], sample | {"answers": {}})
                # a processor repeats the placeholder for every visual token
                card["prompt"] = re.sub(r"(<\|(image|video)_pad\|>\s*)+", r"[\2] ", card["prompt"])
                name = sample["branch"]
                branch = f"CoPD {name}" if arm.method == "copd" else f"{name} expert"
                label = "base" if name == "base" else branch if name in self.own else row(arm, name)
                # every run evaluates the base
                card["answers"].setdefault(label, (sample["completion"], sample["reward"]))
        return {domain: list(found.values()) for domain, found in cards.items()}

    def configs(self) -> dict[str, str]:
        firsts = [(arm.label, arm.first) for arm in self.arms.values()]
        return {f"{label}, seed {run['seed']}": OmegaConf.to_yaml(run["config"]) for label, run in firsts}


def row(arm: Arm, name: str) -> str:
    """What the table calls the model `name` of an arm."""
    if arm.method in SINGLE:
        return f"{arm.label}, {arm.first['phases'][-1][2]} steps"
    averaged = {"merged": "averaged" if arm.method != "copd" else "merged"}.get(name, name)
    return f"{arm.label} {averaged}" if arm.name == arm.method else f"{arm.label} ({averaged})"


def spent(run: Result, name: str) -> tuple[int, int]:
    """Rollouts sampled and steps taken for the model `name`: what came after the merge is not spent on what merged."""
    after = {"rollouts": run["cost"].get("consolidation", 0), "steps": 0}
    after["steps"] = sum(end - first for phase, first, end in run["phases"] if phase == "consolidate")
    if name == "consolidated":
        after = {"rollouts": 0, "steps": 0}
    return run["cost"]["rollouts"] - after["rollouts"], run["phases"][-1][2] - after["steps"]
