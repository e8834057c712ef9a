"""What a run leaves behind: its models in folders that `from_pretrained` loads, and `results.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers

from copd import files
from copd.branch import Branch
from copd.checkpoint import identity
from copd.coevolve import Plan
from copd.log import Log
from copd.ranks import KEEPERS
from copd_kernels.rows import resolve


def save(directory: Path, models: Iterable[Branch]) -> None:
    """Every model but the base, with its processor."""
    for branch in models:
        if branch.name != "base":
            folder = directory / (branch.name if branch.name in KEEPERS else f"branch-{branch.name}")
            with branch.peers.folder(folder) as scratch:
                branch.weights.save(scratch)
                if branch.peers.first:
                    branch.processor.save_pretrained(scratch)


def write(
    directory: Path,
    plan: Plan,
    domains: Iterable[str],
    log: Log,
    final: dict[str, dict[str, Any]],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    """Writes and returns `results.json`, from which alone the report is made."""
    cfg = plan.branches[0].cfg
    trained = log.of("train")
    results = {
        "name": cfg.name,
        "method": cfg.method,
        "variant": cfg.variant,
        "arm": cfg.arm or cfg.method,
        "seed": cfg.seed,
        "hub": cfg.hub or next(iter(cfg.branches)),
        "domains": list(domains),
        "branches": {name: plan.tasks[name].name for name in plan.place.owner if name in plan.tasks},
        "config": asdict(cfg),
        "identity": identity(cfg),
        "phases": spans(plan.phases),
        "final": final,
        "eval": log.of("eval"),
        "divergence": log.of("divergence"),
        "samples": samples,
        "cost": {
            "seconds": round(log.seconds(), 1),
            "rollouts": sum(record["rollouts"] for record in trained),
            "consolidation": sum(record["rollouts"] for record in trained if record["phase"] == "consolidate"),
            "updates": len(trained) * cfg.rlvr.updates_per_batch,
            "tokens": sum(record["tokens"] for record in trained),
            # so far, where models were evaluated: [step, rollouts]
            "curve": [
                [step, sum(record["rollouts"] for record in trained if record["step"] <= step)]
                for step in sorted({record["step"] for record in log.of("eval")})
            ],
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            # the backend's sums differ from another's in the last bits
            "rows": resolve("train", None, plan.branches[0].device),
        },
    }
    files.write(directory / "results.json", json.dumps(results, indent=1))
    return results


def spans(phases: list[str]) -> list[list[Any]]:
    """Runs of equal phases as [phase, first step, end]."""
    groups = [list(group) for _, group in groupby(enumerate(phases), lambda pair: pair[1])]
    return [[group[0][1], group[0][0], group[-1][0] + 1] for group in groups]
