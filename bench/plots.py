"""The plots of one device: time and memory over N, gradient error over KL."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.results import OURS, ROOF, SHORT, Data, entry, ms, sweep


def draw(data: Data, folder: Path) -> None:
    """Writes <device>-scale.png and <device>-accuracy.png, of what was measured."""
    figures = {"scale": scale(data), "accuracy": accuracy(data)}
    for name, figure in figures.items():
        if figure:
            figure.savefig(folder / f"{data['name']}-{name}.png", dpi=110, metadata={"Software": None})
            plt.close(figure)


def panels(count: int, **options: Any) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, 3.4), layout="constrained", squeeze=False, **options)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def scale(data: Data) -> Any:
    rows = sweep(data)
    if not rows:
        return None
    figure, (time, memory) = panels(2)
    for name in (OURS, "eager", "TRL", ROOF):
        measured = [(row["N"], entry(row, name)) for row in rows if entry(row, name)]
        N = [n for n, _ in measured]
        time.loglog(N, [ms(e) for _, e in measured], marker="o", label=name, ls=":" if name == ROOF else "-")
        if name != ROOF:
            memory.loglog(N, [e["peak_mib"] or float("nan") for _, e in measured], marker="o")
    first = rows[0]
    shape = f"D={first['D']:,}, V={first['V']:,}, {SHORT[first['dtype']]}"
    time.set(xlabel="tokens", ylabel="ms", title=f"kl, forward + backward, {shape}")
    memory.set(xlabel="tokens", ylabel="MiB", title="peak memory beyond the inputs")
    time.legend(fontsize=8)
    return figure


def accuracy(data: Data) -> Any:
    rows = [row for row in data["rows"] if row["op"] == "accuracy" and row["divergence"] == "reverse"]
    if not rows:
        return None
    figure, axes = panels(len(rows), sharey=True)
    for axis, row in zip(axes, rows, strict=True):
        for found, style in zip(row["entries"], itertools.cycle(("-", "--", ":", "-."))):
            points = [(kl, error) for kl, error in zip(row["value"], found["gradient_error"], strict=True) if error]
            if points:
                width = 2.5 if found["name"] == OURS else 1.2
                axis.loglog(*zip(*points, strict=True), ls=style, marker="o", ms=3, lw=width, label=found["name"])
        axis.set(xlabel="KL(student ‖ teacher), nats", title=SHORT[row["dtype"]])
    axes[0].set(ylabel="relative gradient error")
    axes[0].legend(fontsize=8)
    return figure
