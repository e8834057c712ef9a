"""What came out of one run or of a study, computed from `results.json` alone: tables, statements, one web page.

`results.md` and `report.html` render one document; the page adds sample rollouts and the resolved configs. Nothing in
it is edited by hand, and an ordering is reported whichever way it goes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from copd import figures, page
from copd.figures import COLOURS, Series, colour, mean_error
from copd.page import Block, Card, Cards, Heading, Picture, Sources, Table

Result = dict[str, Any]
Accuracies = dict[int, dict[str, float]]
"""seed -> domain -> accuracy in [0, 1]"""
METHODS = {"copd": "CoPD", "independent": "Independent", "expert": "Experts", "mixed": "Mixed RLVR", "mopd": "MOPD"}


@dataclass(frozen=True)
class Model:
    """One row of the final table."""

    label: str
    shade: str
    hatched: bool
    accuracy: Accuracies
    rollouts: dict[int, float]
    """seed -> completions sampled to make it, its teachers' included"""

    def overall(self) -> dict[int, float]:
        return {seed: sum(domains.values()) / len(domains) for seed, domains in self.accuracy.items()}


@dataclass
class Suite:
    """The runs of one variant."""

    variant: str
    runs: dict[str, dict[int, Result]] = field(default_factory=lambda: defaultdict(dict))
    """method -> seed -> results"""

    @property
    def first(self) -> Result:
        """The run that names the suite's domains and branches: CoPD's where there is one."""
        ordered = [self.runs[method] for method in METHODS if self.runs.get(method)]
        return ordered[0][min(ordered[0])]

    @property
    def control(self) -> dict[int, Result]:
        """Branches that trained alone."""
        return self.runs.get("independent") or self.runs.get("expert") or {}

    @property
    def steps(self) -> int:
        """Updates of one branch."""
        branched = self.runs.get("copd") or self.control
        return next(iter(branched.values()))["phases"][-1][2] if branched else 0


def write(directory: Path) -> None:
    """Writes results.md, report.html and figures/ for the runs below `directory`.

    Where `directory` is not itself a run, its runs are also collected in results.json, from which alone the report can
    be written again.
    """
    directory = Path(directory)
    runs = collect(directory)
    suites: dict[str, Suite] = {}
    for run in runs:
        suite = suites.setdefault(run["variant"], Suite(run["variant"]))
        suite.runs[run["method"]][run["seed"]] = run
    top = directory / "results.json"
    own = json.loads(top.read_text()) if top.exists() else {}
    if "method" not in own:
        shown = {(suite.variant, suite.first["seed"]) for suite in suites.values()}
        # samples carry images; the page shows those of one seed
        kept = [run if (run["variant"], run["seed"]) in shown else run | {"samples": []} for run in runs]
        top.write_text(json.dumps({"runs": kept}))
    sections = {suite.variant: document(suite) for suite in suites.values()}
    folder = directory / "figures"
    folder.mkdir(exist_ok=True)
    for picture in (block for blocks in sections.values() for block in blocks if isinstance(block, Picture)):
        (folder / f"{picture.name}.svg").write_text(picture.svg)
    title = own.get("name", directory.resolve().name)
    (directory / "results.md").write_text(page.markdown(title, _origin(runs), sections))
    appendix = {suite.variant: [samples(suite), configs(suite)] for suite in suites.values()}
    both = {variant: blocks + appendix[variant] for variant, blocks in sections.items()}
    (directory / "report.html").write_text(page.html_page(title, _origin(runs), both))


def collect(directory: Path) -> list[Result]:
    """Results of all runs below `directory`, or those that an earlier report collected there."""
    found = [json.loads(path.read_text()) for path in sorted(directory.glob("**/results.json"))]
    runs = [result for result in found if "method" in result]
    runs = runs or [run for result in found for run in result["runs"]]
    if not runs:
        raise ValueError(f"report: directory must hold a results.json; got none below {directory}")
    return sorted(runs, key=lambda run: (run["variant"], list(METHODS).index(run["method"]), run["seed"]))


def final_models(suite: Suite) -> dict[str, Model]:
    """Every model of the suite, by a key such as `base`, `expert/text`, `copd/merged`."""
    first, control, models = suite.first, suite.control, {}

    def add(key: str, label: str, shade: str, name: str, runs: dict[int, Result], hatched=False, cost=None) -> None:
        final = {s: {d: r["accuracy"] for d, r in run["final"][name].items()} for s, run in runs.items()}
        rollouts = {seed: cost(run) if cost else run["cost"]["rollouts"] for seed, run in runs.items()}
        models[key] = Model(label, shade, hatched, final, rollouts)

    anyone = {seed: run for method in reversed(METHODS) for seed, run in suite.runs.get(method, {}).items()}
    add("base", "base", COLOURS["base"], "base", anyone, cost=lambda run: 0)
    for i, branch in enumerate(first["branches"]):
        if control:
            share = len(first["branches"])
            cost = lambda run: run["cost"]["rollouts"] / share  # noqa: E731, B023
            add(f"expert/{branch}", f"{branch} expert", colour(i), branch, control, hatched=True, cost=cost)
    if suite.runs.get("independent"):
        add("averaged", "experts averaged", COLOURS["averaged"], "merged", control)
    mixed = suite.runs.get("mixed", {})
    early = {seed: _at_step(run, "mixed", suite.steps) for seed, run in mixed.items()}
    if mixed and all(early.values()) and any(run["phases"][-1][2] > suite.steps for run in mixed.values()):
        share = {seed: suite.steps / run["phases"][-1][2] for seed, run in mixed.items()}
        rollouts = {seed: run["cost"]["rollouts"] * share[seed] for seed, run in mixed.items()}
        models["mixed/early"] = Model(f"mixed, {suite.steps} steps", COLOURS["mixed"], True, early, rollouts)
    if mixed:
        add("mixed", f"mixed, {next(iter(mixed.values()))['phases'][-1][2]} steps", COLOURS["mixed"], "mixed", mixed)
    if suite.runs.get("mopd"):
        teachers = {seed: run["cost"]["rollouts"] for seed, run in control.items()}
        cost = lambda run: run["cost"]["rollouts"] + teachers.get(run["seed"], 0)  # noqa: E731
        add("mopd", "MOPD", COLOURS["mopd"], "student", suite.runs["mopd"], cost=cost)
    if copd := suite.runs.get("copd"):
        for i, branch in enumerate(first["branches"]):
            hub = " (hub)" if branch == first["hub"] and len(first["branches"]) > 2 else ""
            add(f"copd/{branch}", f"CoPD {branch}{hub}", colour(i), branch, copd)
        add("copd/merged", "CoPD merged", COLOURS["merged"], "merged", copd)
    return models


def document(suite: Suite) -> list[Block]:
    """Tables and figures of one variant."""
    models, domains = final_models(suite), suite.first["domains"]
    prefix = f"{suite.variant}-" if suite.variant else ""
    blocks: list[Block] = []
    seeds = max(len(model.accuracy) for model in models.values())
    spread = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed, hence without standard error"
    columns = {
        domain: [[a[domain] for a in model.accuracy.values()] for model in models.values()] for domain in domains
    }
    columns["overall"] = [list(model.overall().values()) for model in models.values()]
    best = {title: max(mean_error(values)[0] for values in rows) for title, rows in columns.items()}
    table = []
    for i, model in enumerate(models.values()):
        cells = [_percent(rows[i], mean_error(rows[i])[0] == best[title]) for title, rows in columns.items()]
        table.append([model.label, *cells, f"{mean_error(model.rollouts.values())[0]:,.0f}"])
    completions = next(iter(suite.first["final"]["base"].values()))["samples"]
    note = (
        f"Accuracy on held-out prompts in %, sampled at the training temperature, {completions} completions a model "
        f"and domain; {spread}. Overall is the mean of the domains; bold is the best of a column. Rollouts: "
        "completions sampled to make the model, those of its teachers included."
    )
    if "mixed/early" in models:
        note += f" Mixed RLVR at {suite.steps} steps, as many as one branch takes, is measured on fewer prompts."
    order = sorted(zip(columns["overall"], models.values(), strict=True), key=lambda pair: -mean_error(pair[0])[0])
    ranked = " > ".join(f"{model.label} {100 * mean_error(values)[0]:.1f}" for values, model in order)
    note += f" Overall, in order: {ranked}."
    blocks += [Heading("Final accuracy"), Table(["model", *columns, "rollouts"], table, note)]
    rows = [(model.label, model.shade, model.hatched) for model in models.values()]
    caption = f"Final accuracy; {spread}. Hatched: experts, and mixed RLVR before its last step."
    blocks.append(Picture(f"{prefix}final", figures.bars(rows, columns), caption))
    if statements := compare(suite, models):
        note = (
            "Differences of accuracy in points, paired by seed. Ahead: seeds in which the first is the more accurate."
        )
        blocks.append(Heading("Comparisons"))
        blocks.append(Table(["comparison", "first", "second", "difference", "ahead"], statements, note))
    lines, phases = _curves(suite)
    if lines:
        caption = (
            "Accuracy during training, on fewer prompts than the final one. Thick: the branch that owns the domain. "
            "Shaded: Phase II, mutual distillation. Bands: one standard error over seeds."
        )
        blocks += [Heading("Accuracy over steps"), Picture(f"{prefix}accuracy", figures.curves(lines, phases), caption)]
    blocks += _divergence(suite, prefix)
    return blocks


def compare(suite: Suite, models: dict[str, Model]) -> list[list[str]]:
    """Rows (comparison, first, second, difference, seeds ahead), whichever way they go."""
    rows: list[list[str]] = []

    def add(label: str, one: dict[int, float] | None, two: dict[int, float] | None) -> None:
        seeds = sorted(set(one or {}) & set(two or {}))
        if seeds:
            difference = [one[s] - two[s] for s in seeds]
            ahead = f"{sum(d > 0 for d in difference)} of {len(seeds)}"
            signed = _percent(difference, sign=True)
            rows.append([label, _percent(one[s] for s in seeds), _percent(two[s] for s in seeds), signed, ahead])

    def on(key: str, domain: str) -> dict[int, float] | None:
        return {seed: a[domain] for seed, a in models[key].accuracy.items()} if key in models else None

    def overall(key: str) -> dict[int, float] | None:
        return models[key].overall() if key in models else None

    own, hub = suite.first["branches"], suite.first["hub"]
    for branch, domain in own.items():
        add(f"{branch} expert over base, on its own {domain}", on(f"expert/{branch}", domain), on("base", domain))
    hub_only = suite.first["config"].get("topology", "hub") == "hub"
    for wanted in (True, False):
        for branch in own:
            for teacher, domain in own.items():
                taught = not hub_only or hub in (branch, teacher)
                if branch != teacher and taught == wanted:
                    label = f"CoPD {branch} over {branch} expert, on {domain} ({'' if taught else 'not '}taught)"
                    add(label, on(f"copd/{branch}", domain), on(f"expert/{branch}", domain))
    for branch, domain in own.items():
        label = f"CoPD {branch} over {branch} expert, on its own {domain}"
        add(label, on(f"copd/{branch}", domain), on(f"expert/{branch}", domain))
    experts = [models[f"expert/{branch}"].overall() for branch in own if f"expert/{branch}" in models]
    best = {seed: max(expert[seed] for expert in experts) for seed in experts[0]} if experts else None
    add("CoPD merged over base, overall", overall("copd/merged"), overall("base"))
    add("CoPD merged over the best expert, overall", overall("copd/merged"), best)
    others = ["averaged", "mixed/early", "mixed", "mopd", *(f"copd/{branch}" for branch in own)]
    for other in others:
        if other in models:
            add(f"CoPD merged over {models[other].label}, overall", overall("copd/merged"), overall(other))
    return rows


def _at_step(run: Result, branch: str, step: int) -> dict[str, float]:
    return {r["domain"]: r["accuracy"] for r in run["eval"] if r["branch"] == branch and r["step"] == step}


def _curves(suite: Suite) -> tuple[dict[str, Any], dict[str, figures.Phases]]:
    """Lines of `figures.curves`, and the phases of CoPD's row."""
    rows: dict[str, Any] = {}
    phases: dict[str, figures.Phases] = {}
    own = suite.first["branches"]
    single = {"mixed": ("mixed RLVR", COLOURS["mixed"]), "student": ("MOPD", COLOURS["mopd"])}
    groups = {"CoPD": ["copd"], "Independent": ["independent", "expert"], "One model": ["mixed", "mopd"]}
    for title, methods in groups.items():
        runs = [run for method in methods for run in suite.runs.get(method, {}).values()]
        series: dict[str, dict[str, Series]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for run in runs:
            for record in run["eval"]:
                series[record["domain"]][record["branch"]][record["step"]].append(record["accuracy"])
        if not series:
            continue
        if title == "CoPD":
            phases[title] = runs[0]["phases"]
        looks = {b: (f"{b} branch", colour(i), own[b]) for i, b in enumerate(own)}
        looks |= {name: (label, shade, None) for name, (label, shade) in single.items()}
        rows[title] = {
            domain: [
                (looks[name][0], looks[name][1], looks[name][2] == domain, line)
                for name, line in series[domain].items()
                if name in looks
            ]
            for domain in suite.first["domains"]
        }
    return rows, phases


def _divergence(suite: Suite, prefix: str) -> list[Block]:
    top_k = suite.first["config"].get("eval", {}).get("top_k", 10)
    names = {"overlap": f"top-{top_k} overlap", "symmetric_kl": "symmetric KL (nats a token)"}
    measures: dict[str, dict[str, Series]] = {}
    rows = []
    for key, name in names.items():
        measures[name] = {}
        for method, runs in (("CoPD", suite.runs.get("copd", {})), ("independent", suite.control)):
            series: Series = defaultdict(list)
            for run in runs.values():
                steps: dict[int, list[float]] = defaultdict(list)
                for record in run["divergence"]:
                    steps[record["step"]].append(record[key])
                for step, values in steps.items():
                    series[step].append(sum(values) / len(values))
            trained = {step: values for step, values in series.items() if step > 0}
            if trained:
                measures[name][method] = dict(series)
                middle = {step: mean_error(values)[0] for step, values in trained.items()}
                cells = [_number(trained[max(trained)]), f"{min(middle.values()):.3f}", f"{max(middle.values()):.3f}"]
                rows.append([f"{name}, {method}", *cells])
    if not rows:
        return []
    copd, phases = suite.runs.get("copd", {}), []
    if copd:
        phases = next(iter(copd.values()))["phases"]
    seen = {(r["student"], r["teacher"]) for r in suite.first["divergence"]}
    pairs = ", ".join(f"{student} from {teacher}" for student, teacher in sorted(seen))
    note = (
        f"Mean over the pairs that teach each other ({pairs}), at the tokens the student samples on its own held-out "
        "prompts. Symmetric KL is the sum of both directions. Lowest and highest: of the measurements after step 0."
    )
    caption = (
        "Distance between branches during training. Shaded: CoPD's Phase II. Bands: one standard error over seeds."
    )
    return [
        Heading("Distance between branches"),
        Table(["measure", "at the end", "lowest", "highest"], rows, note),
        Picture(f"{prefix}divergence", figures.divergence(measures, phases), caption),
    ]


def samples(suite: Suite) -> Cards:
    """Held-out prompts of the first seed, with what each model answered."""
    found: dict[tuple[str, int], Card] = {}
    for method in METHODS:
        for run in list(suite.runs.get(method, {}).values())[:1]:
            for sample in run["samples"]:
                names = {"base": "base", "merged": "experts averaged", "mixed": "mixed RLVR", "student": "MOPD"}
                name = names.get(sample["branch"], f"{sample['branch']} expert")
                if method == "copd" and sample["branch"] != "base":
                    name = f"CoPD {sample['branch']}"
                new = Card(sample["domain"], sample["prompt"], sample["images"], sample["answer"])
                card = found.setdefault((sample["domain"], sample["index"]), new)
                # every run evaluates the base
                card.answers.setdefault(name, (sample["completion"], sample["reward"]))
    caption = (
        "Held-out prompts of one seed, with one sampled completion of each model. Frames of a video from left to right."
    )
    return Cards("Sample rollouts", caption, list(found.values()))


def configs(suite: Suite) -> Sources:
    runs = [next(iter(suite.runs[method].values())) for method in METHODS if suite.runs.get(method)]
    texts = {
        f"{METHODS[run['method']]}, seed {run['seed']}": OmegaConf.to_yaml(OmegaConf.create(run["config"]))
        for run in runs
    }
    return Sources("Resolved config", texts)


def _origin(runs: list[Result]) -> str:
    seconds = sum(run["cost"]["seconds"] for run in runs)
    methods = ", ".join(name for method, name in METHODS.items() if any(run["method"] == method for run in runs))
    versions = ", ".join(f"{name} {version}" for name, version in runs[0]["versions"].items())
    seeds = len({run["seed"] for run in runs})
    counts = f"{len(runs)} run{'s' * (len(runs) > 1)} ({methods}), {seeds} seed{'s' * (seeds > 1)}"
    return f"{counts}, {seconds / 60:.1f} minutes of training and evaluation in all; {versions}."


def _percent(values: Any, bold: bool = False, sign: bool = False) -> str:
    mean, error = mean_error(values)
    text = f"{100 * mean:{'+' if sign else ''}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
    return f"**{text}**" if bold else text


def _number(values: list[float]) -> str:
    mean, error = mean_error(values)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if error is not None else "")
