"""Which way imports point, and that what the documents name is there."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest

from copd.config import Config
from copd.lab.config import LabConfig

ROOT = Path(__file__).parents[1]
FILES = [path.relative_to(ROOT) for folder in ("copd_kernels", "copd") for path in (ROOT / folder).rglob("*.py")]
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of this repository that `module` imports anywhere in its text, for types too."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*outer, *([node.module] if node.module else [])])
            whole = {f"{source}.{alias.name}" for alias in node.names}
            found |= whole & MODULES.keys() or ({source} if node.module else set())
    return frozenset(found & MODULES.keys())


def reached(module: str) -> set[str]:
    found, front = set(), [module]
    while front:
        new = imports(front.pop()) - found
        found |= new
        front += new
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_over_others(module):
    assert module not in reached(module)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("copd_kernels")])
def test_the_kernels_import_no_loop(module):
    assert not [name for name in reached(module) if name.split(".")[0] == "copd"]


COMMANDS = {"copd.cli", "copd.__main__", "copd.train.__main__"}
LOOP = [name for name in MODULES if name.startswith("copd.") and not name.startswith("copd.lab")]


@pytest.mark.parametrize("module", sorted({*LOOP} - COMMANDS))
def test_the_loop_imports_nothing_of_the_lab(module):
    assert not [name for name in reached(module) if name.startswith("copd.lab")]


@pytest.mark.parametrize("path", sorted(FILES), ids=str)
def test_a_file_stays_short(path):
    limit = 450 if path.parts[0] == "copd_kernels" else 350
    assert len((ROOT / path).read_text().splitlines()) <= limit


METHOD = (ROOT / "docs" / "method.md").read_text()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:copd|copd_kernels)(?:\.\w+)+)`", METHOD))))
def test_every_function_that_the_method_names_exists(name):
    owner, _, function = name.rpartition(".")
    assert callable(getattr(resolve_name(owner), function))


GROUPS = {f.name: f.default_factory for f in fields(Config) if f.name in ("model", "rollout", "rlvr", "opd")}
GROUPS |= {f.name: f.default_factory for f in fields(Config) if f.name in ("merge", "optim", "eval")}


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`((?:{'|'.join(GROUPS)})\.[a-z_]+)`", METHOD))))
def test_every_option_that_the_method_names_exists(name):
    group, option = name.split(".")
    assert option in {f.name for f in fields(GROUPS[group])}


def test_the_lab_adds_to_the_settings_of_the_loop_and_takes_none_away():
    assert {f.name for f in fields(LabConfig)} - {f.name for f in fields(Config)} == {"warmstart"}
