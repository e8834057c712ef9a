"""The README's code runs as printed, and its two losses agree."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


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


def test_every_file_in_the_tree_exists():
    tree = README.split("## Files")[1].split("```")[1]
    for folder, names in re.findall(r"^(\S+/)\s+(.*)$", tree, re.MULTILINE):
        for name in re.findall(r"[\w/]+\.\w+", names):
            assert (Path(__file__).parent.parent / folder / name).exists(), f"{folder}{name}"
