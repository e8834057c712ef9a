"""What came out of one run or of a study, computed from `results.json` alone: tables, figures, one web page.

`templates/results.md.j2` is the document; the page is that document with its figures, sample rollouts and configs.
Nothing in it is edited by hand, and an ordering is reported whichever way it goes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt

from copd import files
from copd.lab import curves
from copd.lab.suite import METHODS, SINGLE, Result, Suite, arm_of

# what the report reads of the records of a run; a collected study keeps no more
RECORD = ("step", "branch", "domain", "accuracy", "reward", "overlap", "symmetric_kl")
BLOCK = re.compile(r"(?<=<!-- study -->\n).*?(?=<!-- /study -->)", re.DOTALL)
"""README's part of it"""


def write(directories: Path | list[Path], output: Path | None = None, readme: Path | None = None) -> None:
    """Writes results.md, report.html and figures/ of the runs below `directories` to `output` (the first if None).

    Of a run that lies below several, the last counts. Unless `output` is itself a run, the runs' numbers are also
    collected in its results.json, from which alone the report can be written again. `readme` is a file whose part
    between the marks of a study is replaced by the summary; `ValueError` where it has none.
    """
    directories = [
        Path(directory) for directory in ([directories] if isinstance(directories, str | Path) else directories)
    ]
    output = Path(output or directories[0])
    name, runs = collect(directories)
    top = output / "results.json"
    if not (top.exists() and "method" in _read(top)):
        files.write(top, json.dumps({"name": name, "runs": runs}, separators=(",", ":")))
    suites = [Suite(v, [r for r in runs if r["variant"] == v]) for v in dict.fromkeys(run["variant"] for run in runs)]
    pictures = {f"{suite.prefix}{kind}": svg for suite in suites for kind, svg in curves.pictures(suite).items()}
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
        distances=curves.distances,
        methods=list(dict.fromkeys(METHODS[run["method"]] for run in runs)),
        seeds=len({run["seed"] for run in runs}),
        runs=runs,
    )
    files.write(output / "results.md", document)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(document)
    body = re.sub(r'<img src="figures/(.+?)\.svg"[^>]*>', lambda found: pictures[found[1]], body)
    body = re.sub(r"<h2>(.+?)</h2>", r'<h2 id="\1">\1</h2>', body)
    page = environment.get_template("report.html.j2").render(name=name, body=body, suites=suites)
    files.write(output / "report.html", page)
    if readme is not None:
        summary = environment.get_template("summary.md.j2").render(suites=suites)
        text, marks = BLOCK.subn(lambda _: summary, readme.read_text())
        if not marks:
            raise ValueError(f"report: readme must have the marks of a study; got none in {readme}")
        files.write(readme, text)


def collect(directories: list[Path]) -> tuple[str, list[Result]]:
    """Name and runs of some folders: those below them, or those that an earlier report collected there."""
    found: dict[tuple[str, str, int], Result] = {}
    name = directories[0].resolve().name
    for directory in directories:
        read = {path: _read(path) for path in sorted(directory.glob("**/results.json")) if not files.is_aside(path)}
        top = read.get(directory / "results.json", {})
        name = top.get("name", name)
        below = [result for result in read.values() if "method" in result] or top.get("runs", [])
        if not below:
            raise ValueError(f"report: directory must hold a results.json; got none below {directory}")
        for run in below:
            if (
                unknown := {"variant", "method", "seed", "final", "eval"} - run.keys()
                or {run["method"]} - METHODS.keys()
            ):
                raise ValueError(f"report: results of {run.get('name')!r} must be a run's; got {sorted(unknown)}")
            found[run["variant"], arm_of(run), run["seed"]] = run
    order = list(METHODS)
    runs = sorted(
        found.values(),
        key=lambda r: (r["variant"], order.index(r["method"]), arm_of(r) != r["method"], arm_of(r), r["seed"]),
    )
    shorten(runs)
    return name, runs


def shorten(runs: list[Result]) -> None:
    """Leaves in sorted runs what the report reads: branches of one arm a method, samples of one seed of it."""
    shown: set[tuple[str, str, int]] = set()
    seed: dict[str, int] = {}
    arm: dict[tuple[str, str], str] = {}
    for run in runs:
        variant = run["variant"]
        seed[variant] = min(seed.get(variant, run["seed"]), run["seed"])
        arm.setdefault((variant, run["method"]), arm_of(run))
    for run in runs:
        variant = run["variant"]
        whole = arm[variant, run["method"]] == arm_of(run)
        run["samples"] = run["samples"] if whole and run["seed"] == seed[variant] else []
        for sample in run["samples"]:
            key = (variant, sample["domain"], sample["index"])  # every image once
            sample["images"] = [] if key in shown else sample["images"]
            shown.add(key)
        ends = {"merged", "consolidated", *SINGLE.values()}
        run["eval"] = [
            {name: record[name] for name in RECORD if name in record}
            for record in run["eval"]
            if whole or record["branch"] in ends
        ]
        if "pairs" not in run:
            edges = {(record["student"], record["teacher"]) for record in run["divergence"]}
            run["pairs"] = sorted(edges)
            run["divergence"] = _means(run["divergence"]) if whole else []


def _means(records: list[Result]) -> list[Result]:
    """Distances, a record a step: the mean over the pairs."""
    steps: dict[int, list[Result]] = defaultdict(list)
    for record in records:
        steps[record["step"]].append(record)
    measures = ("overlap", "symmetric_kl")
    return [
        {"step": step} | {name: round(fmean(record[name] for record in found), 6) for name in measures}
        for step, found in sorted(steps.items())
    ]


def _read(path: Path) -> Result:
    try:
        found: Any = json.loads(path.read_text(), parse_float=lambda digits: round(float(digits), 6))
    except json.JSONDecodeError as error:
        raise ValueError(f"report: {path} must be JSON; got {error}") from error
    return dict(found)
