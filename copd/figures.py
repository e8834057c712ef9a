"""The report's figures, as SVG text: final accuracies, accuracy over steps, distance between branches over steps.

A branch has one colour in every figure (Okabe and Ito's palette, safe for colour-blind readers); CoPD is drawn solid,
the independent control dashed. Means over seeds, with one standard error as a whisker or band.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BRANCH_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
COLOURS = {"base": "#BBBBBB", "averaged": "#777777", "mixed": "#56B4E9", "mopd": "#8C6D31", "merged": "#222222"}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "copd",
}
WIDTH = 10.4  # inches; the page is as many hundred pixels wide

Series = dict[int, list[float]]
"""step -> one value for each seed"""
Phases = list[tuple[str, int, int]]
"""(rl or opd, first step, end)"""


def colour(index: int) -> str:
    """Of the branch at `index`; they repeat from the sixth on."""
    return BRANCH_COLOURS[index % len(BRANCH_COLOURS)]


def mean_error(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and standard error; no error for fewer than two values."""
    values = np.asarray(list(values), dtype=float)
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def bars(models: list[tuple[str, str, bool]], columns: dict[str, list[list[float]]]) -> str:
    """Accuracy of every model, one panel a column.

    `models`: (label, colour, hatched); `columns`: title -> for each model one accuracy in [0, 1] for each seed.
    """
    with _figure(len(columns), 1, 0.27 * len(models) + 0.8, sharey=True) as (figure, axes):
        for axis, (title, rows) in zip(axes[0], columns.items(), strict=True):
            for y, ((_, shade, hatched), values) in enumerate(zip(models, rows, strict=True)):
                mean, error = (100 * x if x is not None else None for x in mean_error(values))
                style = {"facecolor": "white", "edgecolor": shade, "hatch": "////"} if hatched else {"color": shade}
                axis.barh(y, mean, height=0.72, xerr=error, ecolor="#444444", error_kw={"lw": 1, "capsize": 2}, **style)
                axis.text(mean + (error or 0) + 2, y, f"{mean:.1f}", va="center", fontsize=8.5, color="#333333")
            axis.set(title=title, xlim=(0, 118), xticks=range(0, 101, 25), xlabel="accuracy (%)")
            axis.grid(visible=False, axis="y")
        axes[0, 0].set_yticks(range(len(models)), [label for label, _, _ in models])
        axes[0, 0].invert_yaxis()
        return _svg(figure)


def curves(rows: dict[str, dict[str, list[tuple[str, str, bool, Series]]]], phases: dict[str, Phases]) -> str:
    """Accuracy over steps: row title -> domain -> lines (label, colour, emphasised, accuracies in [0, 1])."""
    with _figure(max(map(len, rows.values())), len(rows), 2.3 * len(rows) + 0.3, sharey=True) as (figure, axes):
        for row, (title, panels) in zip(axes, rows.items(), strict=True):
            for axis, (domain, lines) in zip(row, panels.items(), strict=True):
                _shade(axis, phases.get(title, []))
                for label, shade, strong, series in lines:
                    _line(axis, series, shade, label, width=2.4 if strong else 1.3, scale=100)
                axis.set(title=f"{title}: {domain}", ylim=(0, 103), xlabel="updates of a model")
            row[0].set_ylabel("accuracy (%)")
            row[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)


def divergence(measures: dict[str, dict[str, Series]], phases: Phases) -> str:
    """Distance between branches over steps: measure -> method -> values. KL has a logarithmic axis."""
    with _figure(len(measures), 1, 2.9, sharex=True) as (figure, axes):
        for axis, (measure, methods) in zip(axes[0], measures.items(), strict=True):
            _shade(axis, phases)
            for method, series in methods.items():
                solid = method == "CoPD"
                if "KL" in measure:  # equal branches have none, which a logarithm cannot show
                    series = {step: values for step, values in series.items() if min(values) > 0}
                _line(axis, series, COLOURS["merged" if solid else "averaged"], method, 2.0, dashed=not solid)
            if "KL" in measure:
                axis.set_yscale("log")
            axis.set(title=measure, xlabel="updates of a model")
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return _svg(figure)


@contextmanager
def _figure(columns: int, rows: int, height: float, **options: bool):
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08)
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def _line(
    axis: Axes, series: Series, shade: str, label: str, width: float, scale: float = 1, dashed: bool = False
) -> None:
    steps = sorted(series)
    mean, error = zip(*(mean_error(series[step]) for step in steps), strict=True)
    mean, error = scale * np.array(mean), scale * np.array([e or 0.0 for e in error])
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.plot(steps, mean, color=shade, label=label, linewidth=width, linestyle="--" if dashed else "-")
    axis.fill_between(steps, mean - error, mean + error, color=shade, alpha=0.15, linewidth=0)


def _shade(axis: Axes, phases: Phases) -> None:
    for phase, first, end in phases:
        if phase == "opd":
            axis.axvspan(first, end, color="#F3E9D2", linewidth=0, zorder=0)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
