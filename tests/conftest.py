"""Backends and devices every kernel test runs on.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported.
`torch.empty` is filled with NaN, so that an output nobody wrote is seen.
"""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from ranks import Ranks

from copd_kernels.rows import BACKENDS, missing


def pytest_configure():
    # in the background or under nohup these are ignored, by the processes that tests start as well
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on several ranks: see `ranks.py`."""
    pool = Ranks()
    yield pool
    pool.stop()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            continue
        # without a compiler there are no native rows; beside a GPU, Triton has no interpreter for CPU tensors
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        if chosen.get("backend") in BACKENDS:
            reason = missing(chosen["backend"], torch.device(chosen.get("device", "cpu")))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
