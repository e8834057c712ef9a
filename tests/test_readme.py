"""The README's code runs as printed, and its two losses agree."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_before_and_after_give_the_same_loss_and_gradient():
    before, after = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    N, D, V = 32, 16, 101
    shared = {"torch": torch, "teacher_hidden": torch.randn(N, D), "mask": (torch.rand(N) > 0.3).float()}
    shared |= {"teacher_lm_head": torch.randn(V, D), "hidden": torch.randn(N, D, requires_grad=True)}
    shared |= {"lm_head": torch.randn(V, D, requires_grad=True)}
    results = []
    for code in (before, after):
        scope = dict(shared)
        exec(code, scope)
        grads = torch.autograd.grad(scope["loss"], (scope["hidden"], scope["lm_head"]))
        results.append((scope["loss"], *grads))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def tree():
    """Folder -> the names that the README's tree gives it, folders with a slash at their end."""
    found, folder = {}, ""
    for line in README.split("## Files")[1].split("```")[1].splitlines():
        place, rest = re.match(r"(\S+/)?\s+(.*)|$", line).groups()
        folder = place or folder
        if rest:
            found.setdefault(folder, set()).update(re.findall(r"(?<!\S)\w+(?:\.\w+|/)(?![^\s,;])", rest))
    return found


@pytest.mark.parametrize("folder", tree())
def test_every_file_in_the_tree_exists(folder):
    assert all((ROOT / folder / name).exists() for name in tree()[folder])


@pytest.mark.parametrize("folder", ["copd_kernels/", "copd_kernels/rows/", "csrc/", "copd/", "copd/lab/", "configs/"])
def test_every_file_that_exists_is_in_the_tree(folder):
    real = {path.name + "/" * path.is_dir() for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
    unnamed = {name for name in real if name.startswith(("__", "_C", ".")) or name == "py.typed"}
    assert real - unnamed - {f"{other.removeprefix(folder)}" for other in tree()} == tree()[folder]
