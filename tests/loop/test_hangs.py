"""What would leave ranks waiting for each other, and how each ends instead."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from copd_cases import CPU, make_config
from test_place import THREE, assert_same_runs, begin, whole_run

from copd import checkpoint, train
from copd.train.interrupts import Stopped

ROOT = Path(__file__).parents[2]
SETTINGS = ("cycles=2", "eval.every=2")


def signalled(folder, number):
    """A run in which one rank alone gets a signal in the middle of its second step."""
    torch.use_deterministic_algorithms(False)
    cfg, calls = make_config(folder, *SETTINGS, domains=THREE), []

    def start(cfg, device):
        base, processor, tasks = begin(cfg, device)
        reward = tasks["image"].reward

        def signals(prompts, completions):
            calls.append(prompts)
            # evaluations have fewer prompts
            if dist.get_rank() == 1 and len(prompts) == 6 and sum(len(p) == 6 for p in calls) == 2:
                os.kill(os.getpid(), number)
            return reward(prompts, completions)

        tasks["image"].reward = signals
        return base, processor, tasks

    with pytest.raises(Stopped):
        train.run(cfg, start)
    return [path.name for path in checkpoint.found(cfg.run_dir)]


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_any_ranks_go_on(tmp_path, ranks):
    assert ranks(2, signalled, tmp_path / "stopped", signal.SIGTERM) == [["checkpoint-2"]] * 2
    (resumed,) = ranks(1, whole_run, tmp_path / "stopped", SETTINGS, THREE)
    (whole,) = ranks(1, whole_run, tmp_path / "whole", SETTINGS, THREE)
    assert resumed == whole
    assert_same_runs(tmp_path / "stopped" / "run", tmp_path / "whole" / "run", kept="checkpoint-2")


def gone_on(folder):
    cfg = make_config(folder, *SETTINGS, domains=THREE)
    return checkpoint.resume(cfg.run_dir, train.Run(cfg, *begin(cfg, CPU)).plan, cfg)


def test_a_file_that_one_rank_cannot_read_is_read_by_none(tmp_path, ranks):
    ranks(1, whole_run, tmp_path, (*SETTINGS, "checkpoint_every=1"), THREE)
    (file,) = (tmp_path / "run" / "checkpoint-4" / "branch-image").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    assert ranks(2, gone_on, tmp_path) == [3, 3]


def not_a_number(folder):
    trainer = train.Run(cfg := make_config(folder, "method=mixed"), *begin(cfg, CPU))
    if dist.get_rank() == 1:
        learn = trainer.plan.branches[0].learn
        trainer.plan.branches[0].learn = lambda batches: learn([spoilt(batch) for batch in batches])
    trainer.train()


def spoilt(batch):
    batch.weight[:] = torch.nan
    return batch


def test_a_rank_whose_loss_is_no_number_does_not_wait_for_those_that_share_its_model(tmp_path, ranks):
    with pytest.raises(AssertionError, match=r"must be finite.*step 1, batch and weights saved"):
        ranks(2, not_a_number, tmp_path, seconds=90)
    assert [path.name for path in (tmp_path / "run" / "failed-1").iterdir()] == ["rank-1.pt"]


ONE_RANK_ENDS = """
import sys, time
from pathlib import Path
from copd_cases import make_config
from copd import ranks, train
from test_place import begin

def wrong(prompts, completions):
    {how}

def start(cfg, device):
    base, processor, tasks = begin(cfg, device)
    if ranks.number() == 1:
        tasks["image"].reward = wrong
    return base, processor, tasks

train.run(make_config(Path(sys.argv[1]), "timeout=8", "eval.every=1"), start)
"""


@pytest.mark.parametrize(
    ("how", "told"), [("1 / 0", "ZeroDivisionError"), ("time.sleep(600)", "answer within timeout=8 s; got")]
)
def test_a_rank_that_raises_or_sleeps_ends_the_job(how, told, tmp_path):
    script = tmp_path / "case.py"
    script.write_text(ONE_RANK_ENDS.format(how=how))
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/loop'}", "OMP_NUM_THREADS": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "2"  # of a rank that does not heed SIGTERM; 30 s before torch 2.13
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    start = time.perf_counter()
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode != 0
    assert told in done.stderr
    assert time.perf_counter() - start < 200
