"""Settings as dataclasses: rules, YAML files and `key=value` overrides laid over defaults, digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Schema = TypeVar("Schema")


def require(holds: bool, rule: str, got: object) -> None:
    """What every rule about a setting goes through."""
    if not holds:
        raise ValueError(f"config: {rule}; got {got}")


def at_least(settings: object, prefix: str = "", **least: float) -> None:
    """The rule most numbers have."""
    for name, low in least.items():
        value = getattr(settings, name)
        require(value is None or value >= low, f"{prefix}{name} must be at least {low}", value)


def load(schema: type[Schema], source: str | Path | dict[str, Any] | None, overrides: Sequence[str] = ()) -> Schema:
    """A `schema` from a YAML file (or its tree; None for the defaults) with `key=value` overrides laid over it.

    Raises `ValueError` naming the key for an unknown key, a wrong type or a value that is not one of the options.
    """
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"config: an override must have the form key=value; got {override!r}")
    tree = OmegaConf.structured(schema)
    OmegaConf.set_readonly(tree, False)
    try:
        layer = OmegaConf.load(source) if isinstance(source, str | Path) else source or {}
        built: Any = OmegaConf.to_object(OmegaConf.merge(tree, layer, OmegaConf.from_dotlist(list(overrides))))
        return built
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {str(error).splitlines()[0]}; at {getattr(error, 'full_key', '?')}") from error


def agree(saved: Any, now: Any) -> bool:
    """Whether two trees have equal values wherever both have one: a setting of later on is no difference."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return all(agree(saved[name], now[name]) for name in saved.keys() & now.keys())
    return bool(saved == now)


def dump(cfg: Any) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def digest(*parts: Any) -> str:
    """Twelve hex digits that name any JSON-like or dataclass values."""
    text = json.dumps(
        [asdict(part) if is_dataclass(part) and not isinstance(part, type) else part for part in parts], sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
