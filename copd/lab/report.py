"""What came out of one run or of a study, computed from `results.json` alone: tables, figures, one web page.

`templates/results.md.j2` is the document; the page is that document with its figures, sample rollouts and configs.
Nothing in it is edited by hand, and an ordering is reported whichever way it goes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from copd import files
from copd.lab import figures
from copd.lab.figures import COLOURS, Line, Panel, Series, colour, mean_error, series

Result = dict[str, Any]
Seeds = dict[int, float]
"""seed -> value"""
METHODS = {"copd": "CoPD", "independent": "Independent", "expert": "Experts", "mixed": "Mixed RLVR", "mopd": "MOPD"}
# what the report reads of the records of a run; a collected study keeps no more
RECORD = ("step", "branch", "domain", "accuracy", "reward", "student", "teacher", "overlap", "symmetric_kl")


def write(directory: Path, output: Path | None = None) -> None:
    """Writes results.md, report.html and figures/ of the runs below `directory` to `output` (the same folder if None).

    Unless `output` is itself a run, the runs' numbers are also collected in its results.json, from which alone the
    report can be written again.
    """
    directory, output = Path(directory), Path(output or directory)
    name, runs = collect(directory)
    top = output / "results.json"
    if not (top.exists() and "method" in _read(top)):
        files.write(top, json.dumps({"name": name, "runs": runs}, separators=(",", ":")))
    suites = [Suite(v, [r for r in runs if r["variant"] == v]) for v in dict.fromkeys(run["variant"] for run in runs)]
    pictures = {f"{suite.prefix}{kind}": svg for suite in suites for kind, svg in suite.pictures().items()}
    for picture, svg in pictures.items():
        files.write(output / "figures" / f"{picture}.svg", svg)
    environment = Environment(
        loader=PackageLoader("copd.lab"),
        undefined=StrictUndefined,
        autoescape=lambda template: template is not None and template.endswith("html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    document = environment.get_template("results.md.j2").render(
        name=name,
        suites=suites,
        pictures=pictures,
        methods=[label for method, label in METHODS.items() if any(run["method"] == method for run in runs)],
        seeds=len({run["seed"] for run in runs}),
        runs=runs,
    )
    files.write(output / "results.md", document)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(document)
    body = re.sub(r'<img src="figures/(.+?)\.svg"[^>]*>', lambda found: pictures[found[1]], body)
    body = re.sub(r"<h2>(.+?)</h2>", r'<h2 id="\1">\1</h2>', body)
    page = environment.get_template("report.html.j2").render(name=name, body=body, suites=suites)
    files.write(output / "report.html", page)


def collect(directory: Path) -> tuple[str, list[Result]]:
    """Name and runs of a folder: those below it, or those that an earlier report collected in it."""
    found = {path: _read(path) for path in sorted(directory.glob("**/results.json")) if not files.is_aside(path)}
    top = found.get(directory / "results.json", {})
    runs = [result for result in found.values() if "method" in result] or top.get("runs", [])
    if not runs:
        raise ValueError(f"report: directory must hold a results.json; got none below {directory}")
    for run in runs:
        if unknown := {"variant", "method", "seed", "final", "eval"} - run.keys() or {run["method"]} - METHODS.keys():
            raise ValueError(f"report: results of {run.get('name')!r} must be a run's; got {sorted(unknown)}")
    runs = sorted(runs, key=lambda run: (run["variant"], list(METHODS).index(run["method"]), run["seed"]))
    first = {run["variant"]: run["seed"] for run in sorted(runs, key=lambda run: -run["seed"])}
    shown: set[tuple[str, str, int]] = set()
    for run in runs:
        # samples of one seed, and every image once
        run["samples"] = run["samples"] if run["seed"] == first[run["variant"]] else []
        for sample in run["samples"]:
            key = (run["variant"], sample["domain"], sample["index"])
            sample["images"] = [] if key in shown else sample["images"]
            shown.add(key)
        for kind in ("eval", "divergence"):
            run[kind] = [{name: record[name] for name in RECORD if name in record} for record in run[kind]]
    return top.get("name", directory.resolve().name), runs


def _read(path: Path) -> Result:
    try:
        return json.loads(path.read_text(), parse_float=lambda digits: round(float(digits), 6))
    except json.JSONDecodeError as error:
        raise ValueError(f"report: {path} must be JSON; got {error}") from error


def value(record: Result) -> float:
    """Mean reward of an evaluation; files of before rewards had their own name call it accuracy."""
    return record["reward"] if "reward" in record else record["accuracy"]


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


class Suite:
    """The runs of one variant."""

    def __init__(self, variant: str, runs: list[Result]) -> None:
        self.variant, self.prefix = variant, f"{variant}-" if variant else ""
        for record in (record for run in runs for record in run["eval"]):
            record.setdefault("reward", value(record))
        self.runs = {method: {r["seed"]: r for r in runs if r["method"] == method} for method in METHODS}
        # the run that names domains and branches: CoPD's where there is one
        self.first = runs[0]
        self.own: dict[str, str] = self.first["branches"]
        self.control = self.runs["independent"] or self.runs["expert"]
        branched = self.runs["copd"] or self.control
        # updates of one branch
        self.steps = next(iter(branched.values()))["phases"][-1][2] if branched else 0
        self.phases: list[tuple[str, int, int]] = next(iter(self.runs["copd"].values()), {"phases": []})["phases"]
        self.seeds = max(len(runs) for runs in self.runs.values())
        measured = [
            record for run in runs for record in (*run["eval"], *(r for d in run["final"].values() for r in d.values()))
        ]
        self.right_or_wrong = all("accuracy" in record for record in measured)
        """every reward is 0 or 1, so that a mean is an accuracy and shown in %"""
        self.scale = 100 if self.right_or_wrong else 1
        self.measure = "accuracy" if self.right_or_wrong else "reward"
        self.models = self._models()
        self.columns = [*self.first["domains"], "overall"]

    def _models(self) -> dict[str, Model]:
        """Every model, by a key such as `base`, `expert/text`, `copd/merged`."""
        mixed, control, models = self.runs["mixed"], self.control, {}

        def add(key: str, label: str, shade: str, runs: dict[int, Result], share: float = 1.0, at: int = 0) -> None:
            name = "mixed" if at else key.rpartition("/")[2]
            accuracy: dict[str, Seeds] = {domain: {} for domain in [*self.first["domains"], "overall"]}
            rollouts = []
            for seed, run in runs.items():
                curve = {r["domain"]: r for r in run["eval"] if r["branch"] == name and r["step"] == at}
                domains = {d: value(r) for d, r in (curve if at else run["final"][name]).items()}
                for domain, mean in (domains | {"overall": fmean(domains.values())}).items():
                    accuracy[domain][seed] = mean
                taught_by = control.get(seed) if key == "mopd/student" else None
                # what came after the merge was not spent on what was merged
                later = 0 if name == "consolidated" else run["cost"].get("consolidation", 0)
                rollouts.append((sum(r["cost"]["rollouts"] for r in (run, taught_by) if r) - later) * share)
            if runs:
                hatched = (key.startswith("expert/") and name not in ("merged", "consolidated")) or bool(at)
                models[key] = Model(label, shade, hatched, accuracy, fmean(rollouts))

        add("base", "base", COLOURS["base"], {s: r for runs in self.runs.values() for s, r in runs.items()}, share=0)
        for i, branch in enumerate(self.own):
            add(f"expert/{branch}", f"{branch} expert", colour(i), control, 1 / len(self.own))
        merged = {seed: run for seed, run in control.items() if "merged" in run["final"]}
        add("expert/merged", "experts averaged", COLOURS["averaged"], merged)
        total = next(iter(mixed.values()))["phases"][-1][2] if mixed else 0
        if 0 < self.steps < total and all(any(r["step"] == self.steps for r in run["eval"]) for run in mixed.values()):
            label = f"mixed, {self.steps} steps"
            add("mixed/early", label, COLOURS["mixed"], mixed, self.steps / total, at=self.steps)
        add("mixed/mixed", f"mixed, {total} steps", COLOURS["mixed"], mixed)
        add("mopd/student", "MOPD", COLOURS["mopd"], self.runs["mopd"])
        for i, branch in enumerate(self.own):
            hub = " (hub)" if branch == self.first["hub"] and len(self.own) > 2 else ""
            add(f"copd/{branch}", f"CoPD {branch}{hub}", colour(i), self.runs["copd"])
        add("copd/merged", "CoPD merged", COLOURS["merged"], self.runs["copd"])
        for key, label, runs in (
            ("copd/consolidated", "CoPD consolidated", self.runs["copd"]),
            ("expert/consolidated", "experts consolidated", control),
        ):
            ended = {seed: run for seed, run in runs.items() if "consolidated" in run["final"]}
            add(key, label, COLOURS["consolidated"], ended)
        return models

    def number(self, values: Iterable[float], sign: bool = False) -> str:
        mean, error = mean_error(values)
        form, scale = ".1f" if self.right_or_wrong else ".4g", self.scale
        return f"{scale * mean:{'+' if sign else ''}{form}}" + (
            f" ± {scale * error:{form}}" if error is not None else ""
        )

    def final(self) -> list[list[str]]:
        """Rows (model, accuracy in every column, rollouts), the best of a column in bold."""
        best = {c: max(fmean(model.accuracy[c].values()) for model in self.models.values()) for c in self.columns}

        def cell(model: Model, column: str) -> str:
            values = model.accuracy[column].values()
            return f"**{self.number(values)}**" if fmean(values) == best[column] else self.number(values)

        return [
            [model.label, *(cell(model, column) for column in self.columns), f"{model.rollouts:,.0f}"]
            for model in self.models.values()
        ]

    def truncated(self) -> float:
        """The largest share, in %, of a model's final completions on a domain that reached the length limit."""
        finals = [run["final"] for runs in self.runs.values() for run in runs.values()]
        return 100 * max(r["clipped_ratio"] for final in finals for domains in final.values() for r in domains.values())

    def ranking(self) -> str:
        overall = [(fmean(model.accuracy["overall"].values()), model.label) for model in self.models.values()]
        return " > ".join(
            f"{label} {self.number([mean])}" for mean, label in sorted(overall, key=lambda pair: -pair[0])
        )

    def comparisons(self) -> list[list[str]]:
        """Rows (comparison, first, second, difference, seeds ahead), whichever way they go."""
        rows, models = [], self.models

        def add(label: str, one: Seeds, two: Seeds) -> None:
            seeds = sorted(set(one) & set(two))
            difference = [one[seed] - two[seed] for seed in seeds]
            if seeds:
                pair = [self.number(side[seed] for seed in seeds) for side in (one, two)]
                ahead = f"{sum(d > 0 for d in difference)} of {len(seeds)}"
                rows.append([label, *pair, self.number(difference, sign=True), ahead])

        def on(key: str, column: str) -> Seeds:
            return models[key].accuracy[column] if key in models else {}

        for branch, own in self.own.items():
            add(f"{branch} expert over base, on its own {own}", on(f"expert/{branch}", own), on("base", own))
        hub = self.first["hub"] if self.first["config"].get("topology", "hub") == "hub" else None
        for kind in ("{} (taught)", "{} (not taught)", "its own {}"):
            for branch in self.own:
                for teacher, domain in self.own.items():
                    taught = "{} (taught)" if hub in (None, branch, teacher) else "{} (not taught)"
                    if kind == ("its own {}" if branch == teacher else taught):
                        label = f"CoPD {branch} over {branch} expert, on {kind.format(domain)}"
                        add(label, on(f"copd/{branch}", domain), on(f"expert/{branch}", domain))
        merged, experts = on("copd/merged", "overall"), [on(f"expert/{branch}", "overall") for branch in self.own]
        add("CoPD merged over base, overall", merged, on("base", "overall"))
        add("CoPD merged over the best expert, overall", merged, {s: max(e[s] for e in experts) for s in self.control})
        others = ["expert/merged", "mixed/early", "mixed/mixed", "mopd/student", *(f"copd/{b}" for b in self.own)]
        for key in filter(models.get, ("copd/merged", "copd/consolidated")):
            for other in filter(models.get, others if key == "copd/merged" else [*others, "copd/merged"]):
                first, second = models[key].label, models[other].label
                add(f"{first} over {second}, overall", on(key, "overall"), on(other, "overall"))
        return rows

    def measures(self) -> dict[str, dict[str, Series]]:
        """Distance between branches: measure -> method -> values over steps."""
        top_k = self.first["config"].get("eval", {}).get("top_k", 10)
        names = {f"top-{top_k} overlap": "overlap", "symmetric KL (nats a token)": "symmetric_kl"}
        methods = {"CoPD": self.runs["copd"], "independent": self.control}
        trained = {
            method: runs
            for method, runs in methods.items()
            if any(record["step"] > 0 for run in runs.values() for record in run["divergence"])
        }
        return {
            name: {method: series(runs, "divergence", key) for method, runs in trained.items()}
            for name, key in (names.items() if trained else ())
        }

    def distances(self) -> list[list[str]]:
        """Rows (measure and method, at the end, lowest, highest) of `measures`."""
        rows = []
        for name, methods in self.measures().items():
            for method, line in methods.items():
                trained = [values for step, values in line.items() if step > 0]
                mean, error = mean_error(trained[-1])
                last = f"{mean:.3f}" + (f" ± {error:.3f}" if error is not None else "")
                means = [fmean(values) for values in trained]
                rows.append([f"{name}, {method}", last, f"{min(means):.3f}", f"{max(means):.3f}"])
        return rows

    def pairs(self) -> list[tuple[str, str]]:
        return sorted({(record["student"], record["teacher"]) for record in self.first["divergence"]})

    def pictures(self) -> dict[str, str]:
        rows = [(model.label, model.colour, model.hatched) for model in self.models.values()]
        columns = {c: [list(m.accuracy[c].values()) for m in self.models.values()] for c in self.columns}
        found = {"final": figures.bars(rows, columns, self.right_or_wrong)}
        if curves := self._curves():
            found["accuracy"] = figures.lines(curves, 2.3)
        looks, panels = {"CoPD": (COLOURS["merged"], "-"), "independent": (COLOURS["averaged"], "--")}, []
        for name, methods in self.measures().items():
            log = "KL" in name  # of equal branches it is 0, which a logarithm cannot show
            shown = {m: {step: v for step, v in line.items() if min(v) > 0 or not log} for m, line in methods.items()}
            lines = [Line(method, looks[method][0], line, looks[method][1]) for method, line in shown.items()]
            panels.append(Panel(name, lines, self.phases, log=log))
        return found | ({"divergence": figures.lines([panels], 2.9)} if panels else {})

    def _curves(self) -> list[list[Panel]]:
        branches = [(branch, f"{branch} branch", colour(i)) for i, branch in enumerate(self.own)]
        members = {
            "CoPD": [(self.runs["copd"], *look) for look in branches],
            "Independent": [(self.control, *look) for look in branches],
            "One model": [
                (self.runs["mixed"], "mixed", "mixed RLVR", COLOURS["mixed"]),
                (self.runs["mopd"], "student", "MOPD", COLOURS["mopd"]),
            ],
        }

        def panel(title: str, domain: str) -> Panel:
            lines = [
                Line(label, shade, line, width=2.4 if self.own.get(name) == domain else 1.3)
                for runs, name, label, shade in members[title]
                if (line := series(runs, "eval", "reward", self.scale, branch=name, domain=domain))
            ]
            return Panel(
                f"{title}: {domain}", lines, self.phases if title == "CoPD" else [], percent=self.right_or_wrong
            )

        rows = [[panel(title, domain) for domain in self.first["domains"]] for title in members]
        return [row for row in rows if row[0].lines]

    def cards(self) -> dict[str, list[Result]]:
        """Domain -> held-out prompts of the first seed, each with what every model answered."""
        cards: dict[str, dict[int, Result]] = defaultdict(dict)
        for method, runs in self.runs.items():
            for sample in (sample for run in runs.values() for sample in run["samples"]):
                card = cards[sample["domain"]].setdefault(sample["index"], sample | {"answers": {}})
                # a processor repeats the placeholder for every visual token
                card["prompt"] = re.sub(r"(<\|(image|video)_pad\|>\s*)+", r"[\2] ", card["prompt"])
                group = "expert" if method == "independent" else method
                key = "base" if sample["branch"] == "base" else f"{group}/{sample['branch']}"
                # every run evaluates the base
                card["answers"].setdefault(self.models[key].label, (sample["completion"], sample["reward"]))
        return {domain: list(found.values()) for domain, found in cards.items()}

    def configs(self) -> dict[str, str]:
        firsts = [next(iter(runs.values())) for runs in self.runs.values() if runs]
        return {f"{METHODS[r['method']]}, seed {r['seed']}": OmegaConf.to_yaml(r["config"]) for r in firsts}
