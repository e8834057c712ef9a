"""Hugging Face's `kernels` loads the package from a folder, beside the installed one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import copd_kernels

kernels = pytest.importorskip("kernels", reason="needs `pip install kernels`")
PACKAGE = Path(copd_kernels.__file__).parent


@pytest.fixture
def repository(tmp_path):
    """A kernel repository with the package as its only, pure Python variant."""
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    metadata = {"id": "_copd_kernels_test", "name": "copd-kernels", "version": 1, "license": "Apache-2.0"}
    (variant / "metadata.json").write_text(json.dumps(metadata | {"python-depends": [], "backend": {"type": "cpu"}}))
    return tmp_path


def test_a_copy_under_another_name_has_operators_of_its_own_and_the_same_gradients(repository):
    copy = kernels.get_local_kernel(repository, trust_remote_code=True)
    assert copy is not copd_kernels
    assert copy.kl.__module__.startswith("_copd_kernels_test")
    hidden, lm_head, other = torch.randn(5, 8), torch.randn(37, 8), torch.randn(37, 8)
    results = []
    for package in (copd_kernels, copy, copd_kernels):
        x, w = hidden.clone().requires_grad_(), lm_head.clone().requires_grad_()
        loss = package.kl(package.Head(x, w), package.Head(hidden, other), backend="torch")
        results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
    for result in results[1:]:
        for one, same in zip(results[0], result, strict=True):
            assert torch.equal(one, same)
