"""From bench/results/*.json: README's table, a full table a device, and the plots. No figure is typed by hand.

python -m bench.report            # writes them
python -m bench.report --print    # README's part alone, to the terminal; a folder of JSONs may follow
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)

OURS, ROOF = "copd_kernels", "bare GEMMs"
PYTORCH = ("eager", "eager, fp32 logits", "torch.compile")
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
USUAL = {"op": "kl", "T": 1, "divergence": "reverse", "backward": True, "frozen": False, "model": "qwen3-8b"}
HEADLINES: dict[str, dict[str, Any]] = {
    "`kl`": {},
    "`kl`, JSD": {"divergence": "jsd"},
    "`kl`, bf16 inputs": {"dtype": "bfloat16"},
    "`kl`, frozen `lm_head`": {"frozen": True},
    "`kl`, 4 teachers": {"T": 4},
    "`kl`, routed to 4": {"op": "routed_kl", "T": 4},
    "`kl`, soft-capped": {"model": "gemma"},
    "`mutual_kl`, 3 heads": {"op": "mutual_kl", "T": 2},
    "`logprob`": {"op": "logprob"},
    "`agreement`, forward": {"op": "agreement", "T": 1, "backward": False},
}


def load(folder: Path = FOLDER) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(folder.glob("*.json"))]


def entry(row: Row, name: str) -> Row | None:
    """A contender's entry, if it was timed and right."""
    found = next((e for e in row["entries"] if e["name"] == name), None)
    return found if found and found.get("ms") and not found.get("why") else None


def ms(found: Row | None) -> float:
    return statistics.median(found["ms"]) if found else float("nan")


def spread(found: Row) -> str:
    return "–".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (min(found["ms"]), max(found["ms"])))


def ratio(row: Row, name: str) -> float:
    """A rival's time over this library's."""
    return ms(entry(row, name)) / ms(entry(row, OURS))


def best(row: Row, names: Iterable[str]) -> str:
    """The fastest of `names` with its ratio."""
    ratios = {name: ratio(row, name) for name in names if entry(row, name)}
    if not ratios:
        return "–"
    name = min(ratios, key=ratios.__getitem__)
    return f"{name} {ratios[name]:.2f}×"


def libraries(row: Row) -> list[str]:
    return [e["name"] for e in row["entries"] if not e["name"].startswith(OURS) and e["name"] not in (*PYTORCH, ROOF)]


def share(row: Row, name: str = OURS) -> float:
    return ms(entry(row, ROOF)) / ms(entry(row, name))


def cost(row: Row) -> float:
    """This library's time in GEMM passes, timed in the same run."""
    return row["passes"] / share(row)


def number(x: float | None, form: str) -> str:
    return "–" if x is None or x != x else form.format(x)


def timed(data: dict[str, Any]) -> list[Row]:
    return [row for row in data["rows"] if row["op"] not in ("accuracy", "step")]


def select(data: dict[str, Any], **wanted: Any) -> list[Row]:
    return [row for row in timed(data) if all(row[name] == value for name, value in wanted.items())]


def usual(data: dict[str, Any], **changes: Any) -> Row | None:
    """The row of the device's usual dtype and N, but for `changes`."""
    first = next(iter(select(data, **USUAL)), None)
    if first is None:
        return None
    return next(iter(select(data, **{**USUAL, "dtype": first["dtype"], "N": first["N"], **changes})), None)


def headline(data: dict[str, Any]) -> str:
    """README's table of one device."""
    first = usual(data)
    if first is None:
        return "Not measured.\n"
    info = data["machine"]
    shape = f"{first['model']}'s head"
    if max(first["shrink"]) > 1:
        shape += " at 1/{} of D and 1/{} of V".format(*first["shrink"])
    setting = [f"{info[key]} {key}" for key in ("threads",) if key in info]
    lines = [
        f"{', '.join([info['device'], *setting])}: {shape}, N={first['N']:,}, D={first['D']:,}, V={first['V']:,}, "
        f"{SHORT[first['dtype']]}, {entry(first, OURS)['backend']} rows, KL {first['kl']}. Forward and backward; "
        "the last three columns are a rival's time over ours, the fastest library named.",
        "",
        "| | ms (min–max) | of its GEMMs | MiB (eager) | gradient error (eager) | eager | torch.compile | library |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title, changes in HEADLINES.items():
        row = usual(data, **changes)
        if row is None or entry(row, OURS) is None:
            continue
        mine, eager = entry(row, OURS), entry(row, "eager") or {}
        pairs = [
            f"{number(mine.get(key), form)} ({number(eager.get(key), form)})"
            for key, form in (("peak_mib", "{:,.0f}"), ("gradient_error", "{:.0e}"))
        ]
        rivals = [number(ratio(row, name), "{:.2f}×") for name in ("eager", "torch.compile")]
        cells = [
            title,
            f"{ms(mine):,.0f} ({spread(mine)})",
            f"{share(row):.0%}",
            *pairs,
            *rivals,
            best(row, libraries(row)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *sentences(data)]
    return "\n".join(lines) + "\n"


def sentences(data: dict[str, Any]) -> list[str]:
    """What the table cannot show: growth with teachers and tokens, and how it was measured."""
    lines = []
    one, four, routed = usual(data), usual(data, T=4), usual(data, op="routed_kl", T=4)
    if four and routed:
        lines.append(
            f"A teacher more costs the time of {(cost(four) - cost(one)) / 3:.2f} GEMM passes; routing to four instead "
            f"of one costs {cost(routed) / cost(one) - 1:+.0%}."
        )
    both = [row for row in sweep(data) if entry(row, OURS) and entry(row, "eager")]
    if both and entry(both[-1], OURS)["peak_mib"]:
        mine, eager = (entry(both[-1], name)["peak_mib"] for name in (OURS, "eager"))
        last = sweep(data)[-1]
        lines.append(
            f"At N={both[-1]['N']:,} and V={last['V']:,}, `kl` peaks at {mine:,.0f} MiB, eager at {eager:,.0f}; at "
            f"N={last['N']:,}, `kl` at {entry(last, OURS)['peak_mib']:,.0f}, of which gradients "
            f"{last['outputs_mib']:,.0f}."
        )
    info = data["machine"]
    known = ", ".join(
        f"{n} {info[n]}" for n in ("driver", "cuda", "torch", "triton", "trl", "liger-kernel") if info.get(n)
    )
    dates = sorted({row["date"] for row in data["rows"]})
    lines.append(
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {known}; `make bench`; every contender in "
        f"`bench/results/{data['name']}.md`."
    )
    return lines


def sweep(data: dict[str, Any]) -> list[Row]:
    """The rows over N, ascending."""
    rows = select(data, op="kl", model="qwen3-vl-4b")
    longest = max(rows, key=lambda row: row["N"], default=None)
    return sorted((row for row in rows if row["shrink"] == longest["shrink"]), key=lambda row: row["N"])


def block(everything: list[dict[str, Any]]) -> str:
    """README's part: each device, then the plots."""
    parts = [headline(data) for data in everything]
    if not any("driver" in data["machine"] for data in everything):
        parts.append("No GPU has been measured yet.\n")
    for data in everything:
        parts += [f"![{what}](bench/results/{data['name']}-{what}.png)\n" for what in PLOTS]
    return "\n".join(parts)


def title(row: Row) -> str:
    words = [row["op"], row["model"], SHORT[row["dtype"]], f"N={row['N']:,} D={row['D']:,} V={row['V']:,}"]
    if row["op"] != "step":
        words += [f"T={row['T']}", row["divergence"]] if row["op"] != "logprob" else []
        words += [
            "forward + backward" if row["backward"] else "forward",
            *(["frozen lm_head"] if row["frozen"] else []),
        ]
    return ", ".join(words)


def table(rows: list[Row]) -> str:
    """Every contender of every row, as Markdown that also reads well in a terminal."""
    parts = []
    for row in rows:
        if row["op"] == "accuracy":
            kls = [number(x, "{:.0e}") for x in row["value"]]
            what = f"gradient error, kl, {SHORT[row['dtype']]}, {row['divergence']}"
            cells = [[e["name"], *(number(x, "{:.1e}") for x in e["gradient_error"])] for e in row["entries"]]
            parts.append(markdown(what, ["at a loss of", *kls], cells))
        elif row["op"] == "step":
            stages = list(row["entries"][0]["stages"])
            cells = [
                [e["name"], *(f"{statistics.median(e['stages'][s]):,.1f}" for s in stages), f"{ms(e):,.1f}"]
                + [number(e["peak_mib"], "{:,.0f}")]
                for e in row["entries"]
            ]
            parts.append(markdown(title(row), ["ms", *stages, "step", "MiB"], cells))
        else:
            parts.append(markdown(title(row), HEADER, [contender(row, e) for e in row["entries"]]))
    return "\n".join(parts)


HEADER = ["", "ms", "min–max", "TFLOP/s", "GB/s", "of its GEMMs", "MiB", "loss error", "gradient error", "time / ours"]


def contender(row: Row, found: Row) -> list[str]:
    name = found["name"] + (f" ({found['backend']} rows)" if found.get("backend") else "")
    if not found["ms"]:
        return [name, found["why"] or "–", *[""] * (len(HEADER) - 2)]
    middle = ms(found)
    # of the work needed; the roof repeats what the op repeats
    flops = row["passes"] * 2 * row["N"] * row["V"] * row["D"] if found["name"] == ROOF else row["flops"]
    return [
        name + (f": {found['why']}" if found["why"] else ""),
        f"{middle:,.1f}",
        spread(found),
        f"{flops / middle / 1e9:,.3g}",
        f"{row['bytes'] / middle / 1e6:,.3g}",
        f"{ms(entry(row, ROOF)) / middle:.0%}",
        number(found["peak_mib"], "{:,.0f}"),
        number(found["loss_error"], "{:.0e}"),
        number(found["gradient_error"], "{:.0e}"),
        number(middle / ms(entry(row, OURS)), "{:.2f}"),
    ]


def markdown(caption: str, header: list[str], cells: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    # a reason is a sentence: it may run past its column
    widths = [widths[0], *(min(width, 16) for width in widths[1:])]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in (header, *cells)
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([f"**{caption}**", "", lines[0], rule, *lines[1:], ""])


def draw_scale(data: dict[str, Any], path: Path) -> None:
    """Time and peak memory over N."""
    import matplotlib.pyplot as plt

    rows = sweep(data)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in (OURS, "eager", "TRL", ROOF):
        points = [(row["N"], ms(entry(row, name)), entry(row, name)["peak_mib"]) for row in rows if entry(row, name)]
        if points:
            N, times, peaks = zip(*points, strict=True)
            axes[0].loglog(N, times, marker="o", label=name, ls=":" if name == ROOF else "-")
            if name != ROOF and None not in peaks:
                axes[1].loglog(N, peaks, marker="o", label=name)
    shape = f"D={rows[0]['D']:,}, V={rows[0]['V']:,}, {SHORT[rows[0]['dtype']]}"
    axes[0].set(xlabel="tokens", ylabel="ms", title=f"kl, forward + backward, {shape}")
    axes[1].set(xlabel="tokens", ylabel="MiB", title="peak memory beyond the inputs")
    finish(figure, axes, path)


def draw_accuracy(data: dict[str, Any], path: Path) -> None:
    """Gradient error over KL, a panel a dtype."""
    import matplotlib.pyplot as plt

    rows = [row for row in data["rows"] if row["op"] == "accuracy" and row["divergence"] == "reverse"]
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3.4), layout="constrained", sharey=True)
    for axis, row in zip(axes, rows, strict=True):
        for found, style in zip(row["entries"], itertools.cycle(("-", "--", ":", "-."))):
            errors = [float("nan") if x is None else x for x in found["gradient_error"]]
            if any(x == x for x in errors):
                thick = 2.5 if found["name"] == OURS else 1.2
                axis.loglog(row["value"], errors, ls=style, marker="o", ms=3, lw=thick, label=found["name"])
        axis.set(xlabel="KL(student ‖ teacher), nats", title=SHORT[row["dtype"]])
    axes[0].set(ylabel="relative gradient error")
    finish(figure, axes[:1], path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"scale": draw_scale, "accuracy": draw_accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--print", action="store_true", help="README's part, nothing written")
    args = parser.parse_args()
    everything = load(args.folder)
    if args.print:
        print("\n".join(map(headline, everything)) or f"no results in {args.folder}")
        return
    for data in everything:
        (args.folder / f"{data['name']}.md").write_text(table(data["rows"]))
        for what, draw in PLOTS.items():
            draw(data, args.folder / f"{data['name']}-{what}.png")
    if args.folder == FOLDER:
        README.write_text(BLOCK.sub(lambda _: block(everything), README.read_text()))


if __name__ == "__main__":
    main()
