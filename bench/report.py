"""From bench/results/*.json: README's table, a full table a device, and the plots. No figure is typed by hand.

python -m bench.report                  # writes them all
python -m bench.report FOLDER           # those of another folder, README left alone
python -m bench.report FOLDER --print   # README's part, to the terminal
"""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

from bench.results import FOLDER, OURS, ROOF, SHORT, Data, Row, entry, load, ms, ratio, share, sweep, timed

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
USUAL: dict[str, Any] = {"op": "kl", "model": "qwen3-8b", "T": 1, "divergence": "reverse"}
# a rival whose gradient error is no more than this many times ours does the same work
SAME_ACCURACY = 10
USUAL |= {"backward": True, "frozen": False, "recompute": False}
HEADLINES: dict[str, dict[str, Any]] = {
    "`kl`": {},
    "`kl`, JSD": {"divergence": "jsd"},
    "`kl`, bf16 inputs": {"dtype": "bfloat16"},
    "`kl`, fp16 inputs": {"dtype": "float16"},
    "`kl`, frozen `lm_head`": {"frozen": True},
    "`kl`, 4 teachers": {"T": 4},
    "`kl`, routed to 4": {"op": "routed_kl", "T": 4},
    "`kl`, soft-capped": {"model": "gemma"},
    "`mutual_kl`, 3 heads": {"op": "mutual_kl", "T": 2},
    "`logprob`": {"op": "logprob"},
    "`logprob`, logits made again": {"op": "logprob", "recompute": True},
    "`agreement`, forward": {"op": "agreement", "backward": False},
}
PYTORCH = ("eager", "eager, fp32 logits", "torch.compile")


def form(pattern: str, x: float | None) -> str:
    return "–" if x is None or x != x else pattern.format(x)


def spread(found: Row) -> str:
    return "–".join(f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (min(found["ms"]), max(found["ms"])))


def usual(data: Data, **changes: Any) -> Row | None:
    """The row of the device's usual model, dtype and N, but for `changes`."""

    def find(wanted: dict[str, Any]) -> Row | None:
        return next((row for row in timed(data) if all(row[name] == wanted[name] for name in wanted)), None)

    first = find(USUAL)
    return first and find(USUAL | {"dtype": first["dtype"], "N": first["N"]} | changes)


def headline(data: Data) -> str:
    """README's table of one device."""
    first = usual(data)
    if first is None:
        return "Not measured.\n"
    info = data["machine"]
    device = info["device"] + (f", {info['threads']} threads" if "threads" in info else "")
    shape = f"{first['model']}'s head"
    if max(first["shrink"]) > 1:
        shape += " at 1/{} of D and 1/{} of V".format(*first["shrink"])
    lines = [
        f"{device}: {shape}, N={first['N']:,}, D={first['D']:,}, V={first['V']:,}, {SHORT[first['dtype']]}, "
        f"{entry(first, OURS)['backend']} rows, KL {first['kl']}. Forward and backward; the last four columns are a "
        "rival's time over ours: eager, compiled, the fastest library, and the fastest of all with a gradient error of "
        f"at most {SAME_ACCURACY} times ours; `of its GEMMs` is the time of the bare GEMM passes over ours, in the "
        "same rounds.",
        "",
        "| | ms (min–max) | of its GEMMs | MiB (eager) | gradient error (eager) | eager | torch.compile | library "
        "| as accurate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, changes in HEADLINES.items():
        row = usual(data, **changes)
        if row and (row is not first or not changes):
            title += f", {row['products']} products" * (row["products"] != "none")
            lines.append("| " + " | ".join([title, *summary(row)]) + " |")
    return "\n".join([*lines, "", *sentences(data)]) + "\n"


def summary(row: Row) -> list[str]:
    mine, eager = entry(row, OURS), entry(row, "eager") or {}
    both = [
        f"{form(pattern, mine[key])} ({form(pattern, eager.get(key))})"
        for key, pattern in (("peak_mib", "{:,.0f}"), ("gradient_error", "{:.0e}"))
    ]
    ratios = {e["name"]: ratio(e, mine) for e in row["entries"] if entry(row, e["name"])}
    everyone = [name for name in ratios if not name.startswith(OURS) and name != ROOF]
    # a rival that rounds first is not doing the same work
    errors = {name: entry(row, name)["gradient_error"] or 0 for name in everyone}
    loose = {name for name in everyone if errors[name] > SAME_ACCURACY * (mine["gradient_error"] or 0)}
    library = min((name for name in everyone if name not in PYTORCH), key=ratios.__getitem__, default=None)
    accurate = min((name for name in everyone if name not in loose), key=ratios.__getitem__, default=None)
    rivals = [form("{:.2f}×", ratios.get(name)) for name in ("eager", "torch.compile", library, accurate)]
    rivals[2] += f" {library}" * (library is not None)
    rivals[3] += f" {accurate}" * (accurate is not None)
    shown = ("eager", "torch.compile", library)
    marks = [f" (error {errors[name]:.0e})" if name in loose else "" for name in shown]
    rivals[:3] = [cell + mark for cell, mark in zip(rivals, marks, strict=False)]
    return [f"{ms(mine):,.0f} ({spread(mine)})", f"{share(row, mine):.0%}", *both, *rivals]


def sentences(data: Data) -> list[str]:
    """What the table cannot show: growth with teachers and tokens, and how it was measured."""
    lines = []
    one, four, routed = usual(data), usual(data, T=4), usual(data, op="routed_kl", T=4)
    if four and routed:
        # in GEMM passes of the same run, so that two runs compare
        costs = [row["passes"] / share(row, entry(row, OURS)) for row in (one, four)]
        lines.append(
            f"A teacher more costs the time of {(costs[1] - costs[0]) / 3:.2f} GEMM passes; four routed teachers take "
            f"{ms(entry(routed, OURS)) / ms(entry(one, OURS)):.2f} times the time of one."
        )
    rows = sweep(data)
    both = [row for row in rows if entry(row, "eager")]
    if both and entry(rows[-1], OURS)["peak_mib"]:
        mine, eager, last = entry(both[-1], OURS), entry(both[-1], "eager"), entry(rows[-1], OURS)
        lines.append(
            f"With V={rows[-1]['V']:,} and N={both[-1]['N']:,}, eager takes {ratio(eager, mine):.2f} times as long and "
            f"{eager['peak_mib']:,.0f} MiB to our {mine['peak_mib']:,.0f}; at N={rows[-1]['N']:,} ours are "
            f"{last['peak_mib']:,.0f}, of which gradients {rows[-1]['outputs_mib']:,.0f}."
        )
    info = data["machine"]
    names = ("driver", "cuda", "torch", "triton", "trl", "liger-kernel")
    dates = sorted({row["date"] for row in data["rows"]})
    lines.append(
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; "
        f"{', '.join(f'{name} {info[name]}' for name in names if info.get(name))}; `make bench`; every contender in "
        f"`bench/results/{data['name']}.md`."
    )
    return lines


def block(everything: list[Data]) -> str:
    """README's part: each device, then its plots."""
    parts = [headline(data) for data in everything]
    if not any("driver" in data["machine"] for data in everything):
        counts = "[counts of the kernels' machine code](bench/results/counts.md)"
        parts.append(f"No GPU has been measured yet; {counts} predict what one can reach.\n")
    for data in everything:
        images = sorted(FOLDER.glob(f"{data['name']}-*.png"))
        parts += [f"![{image.stem}](bench/results/{image.name})\n" for image in images]
    return "\n".join(parts)


def table(rows: list[Row]) -> str:
    """Every contender of every row, as Markdown that reads well in a terminal."""
    kinds = {
        "accuracy": accuracy,
        "rows": row_math,
        "step": step,
        "trainer": trainer,
        "loop": loop,
        "workspace": workspace,
    }
    return "\n".join(kinds.get(row["op"], contenders)(row) for row in rows)


def contenders(row: Row) -> str:
    header = ["", "ms", "min–max", "TFLOP/s", "GB/s", "of its GEMMs", "MiB", "loss error", "gradient error", "/ ours"]
    cells = []
    for e in row["entries"]:
        name = e["name"] + (f" ({e['backend']} rows)" if e["backend"] else "")
        if not e["ms"]:
            cells.append([name, e["why"], *[""] * (len(header) - 2)])
            continue
        # of the work needed; the roof repeats what the op repeats
        flops = row["passes"] * 2 * row["N"] * row["V"] * row["D"] if e["name"] == ROOF else row["flops"]
        cells.append(
            [
                name + (f": {e['why']}" if e["why"] else ""),
                f"{ms(e):,.1f}",
                spread(e),
                f"{flops / ms(e) / 1e9:,.3g}",
                f"{row['bytes'] / ms(e) / 1e6:,.3g}",
                f"{share(row, e):.0%}",
                form("{:,.0f}", e["peak_mib"]),
                form("{:.0e}", e["loss_error"]),
                form("{:.0e}", e["gradient_error"]),
                f"{ratio(e, entry(row, OURS)):.2f}",
            ]
        )
    words = [title(row), *([f"T={row['T']}", row["divergence"]] if row["op"] != "logprob" else [])]
    words += ["forward + backward" if row["backward"] else "forward", *["frozen lm_head"] * row["frozen"]]
    words += ["logits made again"] * row["recompute"] + [f"{row['products']} products"] * (row["products"] != "none")
    return markdown(", ".join(words), header, cells)


def title(row: Row) -> str:
    return f"{row['op']}, {row['model']}, {SHORT[row['dtype']]}, N={row['N']:,} D={row['D']:,} V={row['V']:,}"


def accuracy(row: Row) -> str:
    header = ["at a loss of", *(f"{value:.0e}" for value in row["value"])]
    cells = [[e["name"], *(form("{:.1e}", x) for x in e["gradient_error"])] for e in row["entries"]]
    return markdown(f"gradient error, kl, {SHORT[row['dtype']]}, {row['divergence']}", header, cells)


def row_math(row: Row) -> str:
    copy = entry(row, "copy")
    cells = [
        [e["name"], f"{ms(e):,.2f}", spread(e), f"{row['bytes'] / ms(e) / 1e6:,.0f}", f"{ratio(copy, e):.0%}"]
        for e in row["entries"]
    ]
    where = f"{row['model']}, R={row['R']:,} V={row['V']:,} T={row['T']}"
    return markdown(f"the rows of kl alone, {where}", ["", "ms", "min–max", "GB/s", "of a copy"], cells)


def workspace(row: Row) -> str:
    cells = [[e["name"], f"{ms(e):,.1f}", spread(e), form("{:,.0f}", e["peak_mib"])] for e in row["entries"]]
    where = f"{title(row).removeprefix('workspace, ')}, T={row['T']}"
    return markdown(f"kl by workspace, {where}", ["", "ms", "min–max", "MiB"], cells)


def step(row: Row) -> str:
    stages = list(row["entries"][0]["stages"])
    cells = []
    for e in row["entries"]:
        times = [statistics.median(e["stages"][stage]) for stage in stages]
        cells.append([e["name"], *(f"{x:,.1f}" for x in (*times, ms(e))), form("{:,.0f}", e["peak_mib"])])
    return markdown(f"training {title(row)}, {row['layers']} layers", ["ms", *stages, "sum", "MiB"], cells)


def trainer(row: Row) -> str:
    header = ["", "ms", "min–max", "MiB", "loss error", "gradient error", "/ ours", "CPU ms", "/ ours"]
    cells, least = [], min(entry(row, OURS)["cpu_ms"])
    for e in row["entries"]:
        if e["why"]:
            cells.append([e["name"], e["why"], *[""] * (len(header) - 2)])
            continue
        patterns = (("{:,.0f}", "peak_mib"), ("{:.0e}", "loss_error"), ("{:.0e}", "gradient_error"))
        errors = [form(pattern, e[key]) for pattern, key in patterns]
        cpu = min(e["cpu_ms"])
        times = f"{ratio(e, entry(row, OURS)):.2f}", f"{cpu:,.0f}", f"{cpu / least:.2f}"
        cells.append([e["name"], f"{ms(e):,.1f}", spread(e), *errors, *times])
    words = [f"a step of {row['trainer']}, {title(row).removeprefix('trainer, ')}"]
    words += [f"T={row['T']}, {row['divergence']}"] if "T" in row else ["log-probs and entropies"]
    return markdown(", ".join(words), header, cells)


def loop(row: Row) -> str:
    cells = [
        [e["name"], f"{ms(e):,.0f}", f"{statistics.median(e['tokens_per_s']):,.1f}", form("{:,.0f}", e["peak_mib"])]
        for e in row["entries"]
    ]
    what = f"{row['N']} completions of up to {row['limit']} tokens, {row['mean']} on average"
    return markdown(
        f"a step of GRPO, sampling included, {title(row).removeprefix('loop, ')}, {what}",
        ["", "ms", "tokens/s", "MiB"],
        cells,
    )


def markdown(caption: str, header: list[str], cells: list[list[str]]) -> str:
    # a reason is a sentence: it may run past its column
    widths = [max(len(line[i]) for line in (header, *cells) if "" not in line[1:]) for i in range(len(header))]
    widths[0] = max(len(line[0]) for line in (header, *cells))
    lines = [" | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) for line in (header, *cells)]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"**{caption}**", "", f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--print", action="store_true", help="README's part, nothing written")
    args = parser.parse_args()
    everything = load(args.folder)
    if args.print:
        print("\n".join(map(headline, everything)) or f"no results in {args.folder}")
        return

    from bench import plots

    for data in everything:
        (args.folder / f"{data['name']}.md").write_text(table(data["rows"]))
        plots.draw(data, args.folder)
    if args.folder == FOLDER:
        README.write_text(BLOCK.sub(lambda _: block(everything), README.read_text()))


if __name__ == "__main__":
    main()
