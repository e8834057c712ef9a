"""The report's figures, as SVG text.

A branch has one colour in every figure (Okabe and Ito's palette, safe for colour-blind readers). Means over seeds, with
one standard error as a whisker or band.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

BRANCH_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
ARM_COLOURS = {
    "base": ["#BBBBBB"],
    "branch": BRANCH_COLOURS,
    "copd": ["#B22222", "#222222", "#E69F00", "#CC79A7", "#7B3FA0", "#F08080"],
    "independent": ["#777777", "#AAAAAA"],
    "expert": ["#777777"],
    "mixed": ["#56B4E9", "#0072B2", "#00458B"],
    "mopd": ["#8C6D31", "#C9A95B", "#4F7942"],
}
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "copd",
}
WIDTH = 10.4  # inches; the page is as many hundred pixels wide

Series = dict[float, list[float]]
"""step, or cost -> one value for each seed"""


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    series: Series
    style: str = "-"
    width: float = 1.8


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line]
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    """(rl or opd, first step, end); Phase II is shaded"""
    percent: bool = False
    """0 to 100, an accuracy"""
    log: bool = False
    over: str = "updates of a model"
    """what the horizontal axis counts"""


def shade(kind: str, index: int = 0) -> str:
    """The colour of the arm of a method, or branch, at `index`; they repeat."""
    return ARM_COLOURS[kind][index % len(ARM_COLOURS[kind])]


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard error; no error for fewer than two values."""
    values = np.asarray(list(values), dtype=float)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def series(runs: dict[int, dict[str, Any]], kind: str, value: str, scale: float = 1, **where: str) -> Series:
    """step -> for each run the mean of its records of that kind, times `scale`."""
    found: Series = defaultdict(list)
    for run in runs.values():
        steps: Series = defaultdict(list)
        for record in run[kind]:
            if where.items() <= record.items():
                steps[record["step"]].append(scale * record[value])
        for step, values in steps.items():
            found[step].append(fmean(values))
    return dict(sorted(found.items()))


def bars(models: list[tuple[str, str, bool]], columns: dict[str, list[list[float]]], percent: bool = True) -> str:
    """Mean reward of every model, one panel a column.

    `models`: (label, colour, hatched); `columns`: title -> for each model one value for each seed, an accuracy in
    [0, 1] if `percent`.
    """
    with _figure(1, len(columns), 0.27 * len(models) + 0.8, sharey=True) as (figure, axes):
        for axis, (title, rows) in zip(axes[0], columns.items(), strict=True):
            gap = 2 if percent else 0.02 * max(abs(value) for values in rows for value in values)
            for y, ((_, shade, hatched), values) in enumerate(zip(models, rows, strict=True)):
                share, spread = mean_error(values)
                scale = 100 if percent else 1
                mean, error = scale * share, None if spread is None else scale * spread
                style = {"facecolor": "white", "edgecolor": shade, "hatch": "////"} if hatched else {"color": shade}
                axis.barh(y, mean, height=0.72, xerr=error, error_kw={"lw": 1, "capsize": 2}, **style)
                beside = max(mean, 0) + (error or 0) + gap
                axis.text(beside, y, f"{mean:.1f}" if percent else f"{mean:.3g}", va="center", fontsize=8.5)
            axis.set(title=title, xlabel="accuracy (%)" if percent else "reward")
            if percent:
                axis.set(xlim=(0, 118), xticks=range(0, 101, 25))
            else:
                axis.margins(x=0.25)
            axis.grid(visible=False, axis="y")
        axes[0, 0].set_yticks(range(len(models)), [label for label, _, _ in models])
        axes[0, 0].invert_yaxis()
        return _svg(figure)


def lines(rows: list[list[Panel]], height: float) -> str:
    """Values over the updates of a model, a grid of panels; each row has its legend at the right."""
    with _figure(len(rows), max(map(len, rows)), height * len(rows) + 0.3) as (figure, axes):
        for row, panels in zip(axes, rows, strict=True):
            for axis, panel in zip(row, panels, strict=True):
                for phase, first, end in panel.phases:
                    if phase == "opd":
                        axis.axvspan(first, end, color="#F3E9D2", linewidth=0, zorder=0)
                axis.set_yscale("log" if panel.log else "linear")
                for line in panel.lines:
                    steps, values = list(line.series), list(map(mean_error, line.series.values()))
                    mean, error = (np.array([v[i] or 0.0 for v in values]) for i in (0, 1))
                    axis.plot(steps, mean, line.style, color=line.colour, label=line.label, linewidth=line.width)
                    # an error as large as the mean has no lower end on a logarithmic axis: as far down as up
                    low = mean**2 / (mean + error) if panel.log else mean - error
                    axis.fill_between(steps, low, mean + error, color=line.colour, alpha=0.15, linewidth=0)
                axis.set(title=panel.title, xlabel=panel.over)
                axis.set_xlim(left=0)
                axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                if panel.percent:
                    axis.set(ylim=(0, 103), ylabel="accuracy (%)")
            legend = row[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            for handle in legend.legend_handles:  # widths differ from panel to panel
                handle.set_linewidth(1.8)
        return _svg(figure)


@contextmanager
def _figure(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(h_pad=0.08))
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
