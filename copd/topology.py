"""Who teaches whom."""

from __future__ import annotations

from copd.config import Config


def teachers(cfg: Config) -> dict[str, list[str]]:
    """The teachers of each branch in Phase II: hub and spokes, or all pairs."""
    names = list(cfg.branches)
    if cfg.topology == "all":
        return {name: [other for other in names if other != name] for name in names}
    hub = cfg.hub or names[0]
    return {name: [other for other in names if other != hub] if name == hub else [hub] for name in names}


def cross_batches(cfg: Config) -> int:
    """Batches of `rollout.prompts` that a step of Phase II samples for distillation, all branches together."""
    return sum(1 if cfg.opd.batch == "split" else len(who) for who in teachers(cfg).values() if who)
