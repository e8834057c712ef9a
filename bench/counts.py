"""What every GPU kernel's loops issue a logit pair, read from the machine code; no GPU is needed.

python -m bench.counts           writes bench/results/counts.md, with what `predict.py` makes of it

A pair is a column of one student's row and one teacher's: T of them a column, and one in an op without teachers. The
code is that of a model in bf16: fp32 logits, bf16 dlogits, and rows that start where `schedule.py` lets them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.compiled import ROOT, compile_all, cuobjdump
from bench.sass import FIGURES, Flow, Instruction, functions

FILE = ROOT / "bench" / "results" / "counts.md"
ARCHITECTURES = (80, 90, 100)
# of csrc/'s three architectures the one that its clusters are written for
CUDA_ARCHITECTURE = "sm_90a"
DIVERGENCES = {"reverse": "REVERSE", "forward": "FORWARD", "symmetric": "REVERSE-FORWARD", "jsd": ""}
TEACHERS = (1, 2, 4)
RULE = "|---|---|---|" + "---|" * len(FIGURES)
HEADER = """# What the GPU kernels issue, and what follows

Made by `python -m bench.counts`; tests compare it with a fresh count. **Predicted by count, not measured**: no GPU has
run these kernels.

## Counts

Of a thread a logit pair, on the way through a sweep's loop that ordinary rows take, in the machine code of Triton
{triton} and CUDA {cuda}. A pair is a column of a student's row and a teacher's; of an op without teachers, a logit.
`alu` are the instructions that half as many lanes take as multiplications: comparisons, choices, integers, moves of
bits. `special` are exponentials (one each), logarithms, reciprocals and conversions to integers. `shared` and `global`
are accesses. "cluster" and "memory" are the two ways in which the C++ rows read.
"""


@dataclass(frozen=True)
class Row:
    """One sweep. `figures` are a pair's, in the order of `sass.FIGURES`."""

    rows: str
    sweep: str
    T: int
    figures: tuple[float, ...]

    def __getattr__(self, name: str) -> float:
        if name in FIGURES:
            return self.figures[FIGURES.index(name)]
        raise AttributeError(name)

    def __str__(self) -> str:
        return f"| {self.rows} | {self.sweep} | {self.T} | {' | '.join(f'{x:g}' for x in self.figures)} |"

    @classmethod
    def of(cls, rows: str, sweep: str, T: int, counts: Iterable[int], pairs: float) -> Row:
        return cls(rows, sweep, T, tuple(round(x / pairs, 1 if x >= pairs else 2) for x in counts))

    @classmethod
    def read(cls, line: str) -> Row:
        rows, sweep, T, *figures = (cell.strip() for cell in line.strip("| \n").split("|"))
        return cls(rows, sweep, int(T), tuple(map(float, figures)))


def triton_kernels() -> Iterator[tuple[str, str, int]]:
    """(file of `compile_all`, sweep, teachers)"""
    for T in TEACHERS:
        yield f"_kl_stats_kernel-bf16-T{T}", "kl statistics", T
    for T in TEACHERS:
        yield f"_kl_stats_kernel-bf16-T{T}-LACKS7", "kl statistics, raw logits", T
    for T in TEACHERS:
        yield f"_jsd_sums_kernel-bf16-T{T}", "kl sums, jsd", T
    for divergence, switches in DIVERGENCES.items():
        for T in TEACHERS:
            yield f"_kl_grad_kernel-bf16-T{T}-{switches}".rstrip("-"), f"kl gradient, {divergence}", T
    yield "_kl_grad_kernel-bf16-T1-REVERSE-HAS_CAP", "kl gradient, reverse, softcap", 1
    yield "_logprob_stats_kernel-bf16-only", "logprob statistics", 1
    yield "_logprob_stats_kernel-bf16-LACKS7", "logprob statistics, raw logits", 1
    yield "_logprob_grad_kernel-bf16-only", "logprob gradient", 1
    yield "_logprob_grad_kernel-bf16-HAS_CAP", "logprob gradient, softcap", 1
    yield "_complete_kernel-bf16-LACKS2", "softcap", 1
    for T in (1, 4):
        yield f"_overlap_kernel-bf16-T{T}", "agreement, overlap", T


def of_triton(folder: Path) -> list[Row]:
    """Of what `compile_all` left there."""
    found = []
    for name, sweep, T in triton_kernels():
        ((_, code),) = functions(folder / f"{name}.cubin").items()
        overlap = "overlap" in sweep
        flow = Flow(code, width=4 if overlap else 8, masked=overlap)
        (loop,) = flow.sweeps()
        read, cost = max(flow.ways(loop, 1024).items())
        # beside raw logits as many biases are read
        rows = heads(sweep, T) * (2 if "raw" in sweep else 1)
        found.append(Row.of("Triton", sweep, T, cost.counts, read / 4 / rows * T))
    return found


def heads(sweep: str, T: int) -> int:
    """Whose rows it reads."""
    return 1 if sweep.startswith(("logprob", "softcap")) else T + 1


def of_cuda(library: Path) -> list[Row]:
    """Of the CUDA part of `_C`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [cuobjdump(), "-xelf", CUDA_ARCHITECTURE, library.resolve()]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        (cubin,) = Path(folder).glob("*.cubin")
        codes = functions(cubin, r"(kl|logprob)_from_(cluster|memory)I.*nv_bfloat16|complete_from_memoryIf")
    rows = [row for name, code in codes.items() for row in of_function(name, code)]
    return sorted(rows, key=lambda row: (row.rows, row.sweep, row.T))


def of_function(name: str, code: list[Instruction]) -> Iterator[Row]:
    """Where a loop takes a teacher at a time its figures are those of any T; the gradient's knows all of them."""
    op, memory = re.search(r"(kl|logprob|complete)_from_(cluster|memory)", name).groups()
    # columns a thread and tile, as csrc/ says, and bytes a load
    columns, width = {"cluster": (4, 16), "memory": (8, 16)}[memory] if op != "complete" else (4, 4)
    divergence = re.search(r"DivergenceE(\d)", name)
    suffix = f", {[*DIVERGENCES][int(divergence[1])]}" if divergence else ""
    flow = Flow(code, {"cluster": "LDS", "memory": "LDG"}[memory], width)
    kinds = iter(("statistics", "sums"))
    sweeps = flow.sweeps()
    if op == "complete":
        # a loop for each thing that raw logits may lack, unrolled, and another for what is left: the softcap's
        ways = {x: flow.ways(x, 1024).get(4 * columns) for x in sweeps}
        sweeps = [min((x for x in sweeps if ways[x]), key=lambda x: ways[x].order)]
    for loop in sweeps:
        own = 4 * columns * heads(op, 1)
        ways = flow.ways(loop, own)
        if op != "complete" and (own not in ways or flow.written(loop) >= 4 * columns):
            continue  # completes raw logits
        kind = "gradient" if flow.stores(loop) else next(kinds)
        for T in TEACHERS if kind == "gradient" and op == "kl" else (1,):
            sweep = "softcap" if op == "complete" else f"{op} {kind}{suffix}"
            read = 4 * columns * heads(sweep, T)
            yield Row.of(f"C++, {memory}", sweep, T, flow.ways(loop, read)[read].counts, columns * T)


def section(capability: int, rows: Iterable[Row]) -> str:
    lines = "".join(f"{row}\n" for row in rows)
    names = " | ".join(FIGURES).replace("_", " ")
    return f"### sm_{capability}\n\n| rows | sweep | T | {names} |\n{RULE}\n{lines}"


def committed(capability: int, text: str | None = None) -> list[Row]:
    """The rows of the file, or of its text."""
    text = text or FILE.read_text()
    part = text.split(f"### sm_{capability}\n")[1].split("\n#")[0]
    return [Row.read(line) for line in part.splitlines() if line.startswith(("| Triton", "| C++"))]


def cuda_version() -> str:
    """To the patch: another compiler makes other code."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def consequences(text: str) -> str:
    """What the rest of the file makes of its counts."""
    from bench import choices, goals, predict

    rows = committed(90, text)
    (jsd,) = [row for row in committed(100, text) if (row.sweep, row.T) == ("kl sums, jsd", 1)]
    return predict.render(rows) + goals.render(rows, jsd.instructions) + choices.render(rows)


def main() -> None:
    # what launches are counted with; the kernels are compiled in a process of their own
    os.environ["TRITON_INTERPRET"] = "1"
    from csrc import resources

    text = HEADER.format(triton=version("triton"), cuda=cuda_version())
    for capability in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            compile_all(capability, Path(folder))
            rows = of_triton(Path(folder)) + (of_cuda(resources.library()) if capability == 90 else [])
        text += "\n" + section(capability, rows)
    FILE.write_text(text + consequences(text))


if __name__ == "__main__":
    main()
