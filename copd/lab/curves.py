"""How the arms of a suite went: accuracy over steps and over what they cost, and the distance between branches."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

from copd.lab import figures
from copd.lab.figures import Line, Panel, Series, mean_error, series, shade
from copd.lab.suite import SINGLE, Arm, Result, Suite


def pictures(suite: Suite) -> dict[str, str]:
    """Every figure of a suite, as SVG text."""
    rows = [(model.label, model.colour, model.hatched) for model in suite.models.values()]
    columns = {c: [list(m.accuracy[c].values()) for m in suite.models.values()] for c in suite.columns}
    found = {"final": figures.bars(rows, columns, suite.right_or_wrong)}
    if panels := cost(suite):
        found["cost"] = figures.lines([panels], 3.6)
    if grid := over_steps(suite):
        found["accuracy"] = figures.lines(grid, 2.3)
    looks, panels = {"CoPD": ("#222222", "-"), "independent": ("#777777", "--")}, []
    for name, methods in measures(suite).items():
        log = "KL" in name  # of equal branches it is 0, which a logarithm cannot show
        shown = {m: {step: v for step, v in line.items() if min(v) > 0 or not log} for m, line in methods.items()}
        lines = [Line(method, looks[method][0], line, looks[method][1]) for method, line in shown.items()]
        panels.append(Panel(name, lines, phases(suite), log=log))
    return found | ({"divergence": figures.lines([panels], 2.9)} if panels else {})


def phases(suite: Suite) -> list[tuple[str, int, int]]:
    return [tuple(span) for span in suite.main.first["phases"]] if suite.main else []


def cost(suite: Suite) -> list[Panel]:
    """Overall accuracy over rollouts, and over steps in sequence, a line an arm."""
    titles = ("thousands of rollouts sampled", "optimiser steps in sequence")
    rows = [(arm, grown(suite, arm)) for arm in suite.arms.values()]
    return [
        Panel(
            "over rollouts" if i == 0 else "over steps in sequence",
            [Line(arm.label, arm.colour, lines[i]) for arm, lines in rows if lines[i]],
            percent=suite.right_or_wrong,
            over=title,
        )
        for i, title in enumerate(titles)
        if any(lines[i] for _, lines in rows)
    ]


def grown(suite: Suite, arm: Arm) -> tuple[Series, Series]:
    """Overall accuracy, over thousands of rollouts and over steps, of what the arm would end with if it stopped there.

    That is the merge of the branches as they are, and from the merge on the model that consolidates.
    """
    points: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    names = [SINGLE[arm.method]] if arm.method in SINGLE else ["consolidated", "merged"]
    for seed, run in arm.runs.items():
        sampled = dict(run["cost"].get("curve", []))
        rollouts, steps = suite.before(arm, seed)
        for step, overall in overalls(run, names, suite.domains).items():
            if step in sampled:
                points[step].append(((rollouts + sampled[step]) / 1000, steps + step, suite.scale * overall))
    # of a governed schedule the rollouts at a step differ from seed to seed
    found = [(fmean(p[0] for p in at), fmean(p[1] for p in at), [p[2] for p in at]) for _, at in sorted(points.items())]
    return {x: values for x, _, values in found}, {x: values for _, x, values in found}


def overalls(run: Result, names: list[str], domains: list[str]) -> dict[int, float]:
    """step -> mean over the domains, of the first of the models `names` that was measured there."""
    found: dict[int, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in run["eval"]:
        found[record["step"]][record["branch"]][record["domain"]] = record["reward"]
    whole = {
        step: [fmean(models[name].values()) for name in names if models[name].keys() == set(domains)]
        for step, models in found.items()
    }
    return {step: values[0] for step, values in whole.items() if values}


def over_steps(suite: Suite) -> list[list[Panel]]:
    """A panel a domain; rows: CoPD's branches, independent ones, one model for all."""
    branches = [(branch, f"{branch} branch", shade("branch", i)) for i, branch in enumerate(suite.own)]
    members = {
        "CoPD": [(suite.main.runs, *look) for look in branches] if suite.main else [],
        "Independent": [(suite.control.runs, *look) for look in branches] if suite.control else [],
        "One model": [
            (arm.runs, SINGLE[arm.method], arm.label, arm.colour) for arm in suite.arms.values() if arm.method in SINGLE
        ],
    }

    def panel(title: str, domain: str) -> Panel:
        lines = [
            Line(label, colour, line, width=2.4 if suite.own.get(name) == domain else 1.3)
            for runs, name, label, colour in members[title]
            if (line := series(runs, "eval", "reward", suite.scale, branch=name, domain=domain))
        ]
        shaded = phases(suite) if title == "CoPD" else []
        return Panel(f"{title}: {domain}", lines, shaded, percent=suite.right_or_wrong)

    rows = [[panel(title, domain) for domain in suite.domains] for title in members]
    return [row for row in rows if row[0].lines]


def measures(suite: Suite) -> dict[str, dict[str, Series]]:
    """Distance between branches: measure -> method -> values over steps."""
    top_k = suite.first["config"].get("eval", {}).get("top_k", 10)
    names = {f"top-{top_k} overlap": "overlap", "symmetric KL (nats a token)": "symmetric_kl"}
    trained = {
        method: arm.runs
        for method, arm in (("CoPD", suite.main), ("independent", suite.control))
        if arm and any(record["step"] > 0 for run in arm.runs.values() for record in run["divergence"])
    }
    return {
        name: {method: series(runs, "divergence", key) for method, runs in trained.items()}
        for name, key in (names.items() if trained else ())
    }


def distances(suite: Suite) -> list[list[str]]:
    """Rows (measure and method, at the end, lowest, highest) of `measures`."""
    rows = []
    for name, methods in measures(suite).items():
        for method, line in methods.items():
            trained = [values for step, values in line.items() if step > 0]
            mean, error = mean_error(trained[-1])
            last = f"{mean:.3f}" + (f" ± {error:.3f}" if error is not None else "")
            means = [fmean(values) for values in trained]
            rows.append([f"{name}, {method}", last, f"{min(means):.3f}", f"{max(means):.3f}"])
    return rows
