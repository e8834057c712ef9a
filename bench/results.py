"""Where rows go: one JSON a device, with what is needed to repeat the run; written after every row."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "orda-kernel", "cut-cross-entropy", "flash-attn")
RESULTS = ("entries", "date", "passes", "flops", "bytes", "outputs_mib", "value")


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
    """Rows of one machine. Benches run one by one add to the same file; another machine or version starts afresh."""

    def __init__(self, folder: Path) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
        self.path = folder / ("cpu.json" if slug.startswith("cpu") else f"{slug}.json")
        self.data: dict[str, Any] = {"machine": machine(), "rows": []}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found["machine"] == self.data["machine"]:
                self.data = found

    def add(self, row: dict[str, Any]) -> None:
        row = rounded(row | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()})
        self.data["rows"] = [old for old in self.data["rows"] if key(old) != key(row)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def key(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in RESULTS}


def rounded(x: Any) -> Any:
    """Four significant digits are more than any clock here has."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    return [rounded(value) for value in x] if isinstance(x, list) else x
