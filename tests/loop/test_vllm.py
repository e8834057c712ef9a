"""vLLM is tested in a process of its own: it takes over thread counts, the environment and the process group."""

import os
import subprocess
from pathlib import Path

import pytest

from copd import engine
from copd.settings import RolloutConfig

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-vllm"
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# its small compiled functions would take longer than all else
FAST = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CACHE_ROOT": str(VENV / "cache")}


def missing():
    """Why there is no vLLM to test, or None."""
    if not list(VENV.glob("lib/python3*/site-packages/vllm/version.py")):
        log = VENV / "log.txt"
        return (log.read_text().splitlines() or ["no vLLM"])[-1] if log.exists() else "make test installs vLLM"
    return None


def run_beside(cases):
    """Tests that need vLLM or torchvision, in the environment that has them."""
    if reason := missing():
        pytest.skip(reason)
    file = Path(__file__).with_name(cases)
    command = [str(VENV / "bin" / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(
        command, cwd=ROOT, env=environment | QUIET | FAST, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


def test_a_real_engine_samples_what_the_trainer_would():
    run_beside("vllm_cases.py")


def test_an_engine_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rollout: engine vllm must be installed.* pip install 'copd\[vllm\]'"):
        engine.check(RolloutConfig(engine="vllm"))
    engine.check(RolloutConfig())
