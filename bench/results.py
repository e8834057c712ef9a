"""Where rows go and how they are read: one JSON a device, with what is needed to repeat the run."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Data = dict[str, Any]
FOLDER = Path(__file__).parent / "results"
OURS, ROOF = "copd_kernels", "bare GEMMs"
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "orda-kernel", "cut-cross-entropy", "flash-attn")
# of a row's keys, those that do not say which case it is
MEASURED = ("entries", "date", "passes", "flops", "bytes", "outputs_mib", "value")


def machine() -> dict[str, Any]:
    """Device, driver and versions; nothing that names the host."""
    info: dict[str, Any] = {"device": device_name()}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        info |= {"driver": found.stdout.strip().split("\n")[0], "cuda": torch.version.cuda}
    else:
        info |= {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    info["python"] = platform.python_version()
    return info | {name: version(name) for name in PACKAGES}


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Results:
    """One machine's rows, written as they come. Benches run one by one share a file; another version starts afresh."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        self.path = folder / ("cpu.json" if slug.startswith("cpu") else f"{slug}.json")
        self.data: dict[str, Any] = {"machine": machine(), "rows": []}
        if self.path.exists() and not fresh:
            found = json.loads(self.path.read_text())
            if found["machine"] == self.data["machine"]:
                self.data = found

    def add(self, row: dict[str, Any]) -> None:
        row = rounded(row | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()})
        rows = self.data["rows"]
        known = [key(old) for old in rows]
        if key(row) in known:
            rows[known.index(key(row))] = row
        else:
            rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in MEASURED}


def rounded(x: Any) -> Any:
    """Four significant digits are more than any clock here has."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    # as JSON has it: a row that is measured again must equal the one that was read
    return [rounded(value) for value in x] if isinstance(x, list | tuple) else x


def load(folder: Path = FOLDER) -> list[Data]:
    return [json.loads(path.read_text()) | {"name": path.stem} for path in sorted(folder.glob("*.json"))]


def timed(data: Data) -> list[Row]:
    others = ("accuracy", "rows", "workspace", "step", "trainer", "loop")
    return [row for row in data["rows"] if row["op"] not in others]


def sweep(data: Data) -> list[Row]:
    """The rows over N, ascending."""
    rows = [row for row in timed(data) if row["op"] == "kl" and row["model"] == "qwen3-vl-4b"]
    longest = max(rows, key=lambda row: row["N"], default=None)
    return sorted((row for row in rows if row["shrink"] == longest["shrink"]), key=lambda row: row["N"])


def entry(row: Row, name: str) -> Row | None:
    """A contender's entry, if it was timed and right."""
    found = next((e for e in row["entries"] if e["name"] == name), None)
    return found if found and found["ms"] and not found.get("why") else None


def ms(found: Row | None) -> float:
    return statistics.median(found["ms"]) if found else float("nan")


def ratio(one: Row, other: Row) -> float:
    """Of two times, round by round, since what slows one contender in a round slows the other."""
    return statistics.median(a / b for a, b in zip(one["ms"], other["ms"], strict=True))


def share(row: Row, found: Row) -> float:
    """Of the roof: the time of the op's bare GEMMs over a contender's."""
    return ratio(entry(row, ROOF), found)
