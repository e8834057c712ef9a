"""Who teaches whom, and who lives where."""

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


def local(names: list[str]) -> list[str]:
    """The branches this process holds: all of them, one process being all there is.

    The one place that knows: a distributed run returns its ranks' share here and exchanges rollouts and scores.
    """
    return names
