"""Registers and shared memory of every CUDA kernel in the built library, as csrc/RESOURCES.md has them.

python csrc/resources.py > csrc/RESOURCES.md
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = """# What the CUDA kernels take

Registers a thread and shared memory a block (bytes; clusters add their ring of segments at launch), 512 threads a
block. No kernel has stack or local memory: the build fails otherwise. Made by `python csrc/resources.py` from the
library that CUDA {cuda} built; a test compares it with a fresh build.

| kernel | divergence | logits | dlogits | {architectures} | shared |
|---|---|---|---|{rules}---|
"""
DIVERGENCES = ("reverse", "forward", "symmetric", "jsd")
TYPES = {"float": "fp32", "double": "fp64", "__half": "fp16", "__nv_bfloat16": "bf16"}


def library() -> Path | None:
    return next((ROOT / "copd_kernels").glob("_C.*.so"), None)


def cuobjdump() -> str | None:
    """The tool on PATH, or the one that Triton carries."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ModuleNotFoundError:
        return None
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


def cuda_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def usage(path: Path) -> dict[tuple[str, str, str, str], dict[str, tuple[int, int]]]:
    """(kernel, divergence, logits, dlogits) -> architecture -> (registers, shared bytes)."""
    dump = subprocess.run([cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    table: dict[tuple[str, str, str, str], dict[str, tuple[int, int]]] = {}
    architecture = kernel = ""
    for line in names.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"::(\w+_from_\w+)<(.*?)>\(", line):
            kernel = found[1], found[2]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            if kernel[0].endswith("cluster") and architecture == "sm_80":
                continue  # empty there
            registers, stack, shared, local = map(int, found.groups())
            if stack or local:
                raise RuntimeError(f"{kernel} on {architecture} must not use stack or local memory; got {line.strip()}")
            table.setdefault(key(*kernel), {})[architecture] = registers, shared
    return table


def key(name: str, arguments: str) -> tuple[str, str, str, str]:
    divergence = re.search(r"Divergence\)(\d)", arguments)
    types = [TYPES[t.strip()] for t in arguments.split(",") if t.strip() in TYPES]
    logits = "fp32" if name.endswith("cluster") else types[0]
    return name, DIVERGENCES[int(divergence[1])] if divergence else "", logits, types[-1]


def markdown(table: dict[tuple[str, str, str, str], dict[str, tuple[int, int]]], cuda: str) -> str:
    architectures = sorted({a for row in table.values() for a in row}, key=lambda a: int(re.sub(r"\D", "", a)))
    text = HEADER.format(cuda=cuda, architectures=" | ".join(architectures), rules="---|" * len(architectures))
    for names, row in sorted(table.items()):
        registers = [str(row[a][0]) if a in row else "" for a in architectures]
        shared = max(row[a][1] for a in row)
        text += f"| {' | '.join([*names, *registers, str(shared)])} |\n"
    return text


if __name__ == "__main__":
    sys.stdout.write(markdown(usage(library()), cuda_version()))
