"""What a run does when something goes wrong: an exception, a full disk, a signal, another process."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from copd_cases import make_config, make_run, run
from safetensors import SafetensorError

from copd import checkpoint, evaluate, files
from copd.coevolve import coevolve
from copd.train.interrupts import Interrupts

ROOT = Path(__file__).parents[2]


ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def kills(folder, *points):
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(folder), *map(str, points)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_killed_at_whatever_file_it_writes_goes_on_to_the_same_results(tmp_path):
    kills(tmp_path, 9)


@pytest.mark.slow
def test_a_run_killed_at_every_file_it_writes_goes_on_to_the_same_results(tmp_path):
    kills(tmp_path)


def broken_after(step, error):
    """A loop in which `error` is raised once so many steps are done."""

    def loop(plan, start=0):
        for done, *rest in coevolve(plan, start):
            yield done, *rest
            if done == step:
                raise error

    return loop


@pytest.mark.parametrize("error", [ZeroDivisionError("1/0"), MemoryError(), KeyboardInterrupt(), SystemExit(3)])
def test_any_exception_leaves_a_checkpoint_of_the_last_whole_step(tmp_path, monkeypatch, error, caplog):
    cfg = make_config(tmp_path, "cycles=2", "name=broken")
    monkeypatch.setattr("copd.train.coevolve", broken_after(3, error))
    with pytest.raises(type(error)):
        run(cfg)
    assert [path.name for path in checkpoint.found(cfg.run_dir)] == ["checkpoint-3"]
    assert "the same command continues from checkpoint-3" in caplog.text
    monkeypatch.undo()
    assert run(cfg)["final"] == run(make_config(tmp_path, "cycles=2", "name=whole"))["final"]


def test_an_exception_between_two_branches_is_no_state_to_resume(tmp_path, caplog):
    cfg = make_config(tmp_path, "cycles=2")
    trainer = make_run(cfg)
    learn, steps = trainer.plan.branches[1].learn, []

    def fails_in_the_second_step(batches):
        steps.append(batches)
        if len(steps) == 2:
            raise MemoryError
        return learn(batches)

    trainer.plan.branches[1].learn = fails_in_the_second_step
    with pytest.raises(MemoryError):
        trainer.train()
    assert not checkpoint.found(cfg.run_dir)
    assert "stopped within step 2, when some branches had moved" in caplog.text


def test_a_failing_evaluation_leaves_the_weights_of_its_step(tmp_path, monkeypatch):
    """Of the middle, of the last step, and of the end, whose models are saved first."""
    whole = run(make_config(tmp_path, "cycles=2", "eval.every=2", "name=whole"))
    for call, left in ((5, "checkpoint-2"), (9, "checkpoint-4"), (14, "checkpoint-4")):
        cfg = make_config(tmp_path, "cycles=2", "eval.every=2", f"name=broken-{call}")
        calls, accuracy = [], evaluate.accuracy

        def fails_once(*arguments, calls=calls, call=call, accuracy=accuracy):
            calls.append(arguments)
            if len(calls) == call:
                raise ZeroDivisionError
            return accuracy(*arguments)

        monkeypatch.setattr(evaluate, "accuracy", fails_once)
        with pytest.raises(ZeroDivisionError):
            run(cfg)
        assert checkpoint.found(cfg.run_dir)[-1].name == left
        assert call < 14 or (cfg.run_dir / "merged" / "model.safetensors").exists()
        before = len(calls)
        resumed = run(cfg)
        monkeypatch.undo()
        for part in ("final", "samples"):
            assert resumed[part] == whole[part]
        untimed = [[r | {"time": 0} for r in results["eval"]] for results in (resumed, whole)]
        assert untimed[0] == untimed[1]
        # what was measured before is not measured again
        assert len(calls) - before == 4 * 3 + 8 - (call - 1)


def put(target, kind, text, error=None):
    with files.whole(target) as scratch:
        if kind == "folder":
            scratch.mkdir()
        (scratch / "x" if kind == "folder" else scratch).write_text(text)
        if error:
            raise error


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_what_was_there(tmp_path, kind, error):
    target = tmp_path / "it"
    put(target, kind, "first")
    put(target, kind, "second")
    with pytest.raises(type(error)):
        put(target, kind, "third", error)
    assert (target / "x" if kind == "folder" else target).read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.fixture
def small_disk():
    """Files beyond 100 kB cannot be written, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_ends_the_run_in_words_or_is_gone_past(tmp_path, small_disk, caplog):
    cfg = make_config(tmp_path, "cycles=2", "checkpoint_every=1")
    trainer = make_run(cfg)
    with pytest.raises(OSError, match=r"checkpoint: step 1 must fit in .*; the last good one is none"):
        trainer.train()
    assert not list(cfg.run_dir.glob(".*"))
    caplog.clear()
    make_run(make_config(tmp_path, "cycles=2", "checkpoint_every=1", "checkpoint_required=false")).train()
    assert caplog.text.count("must fit in") == 4
    small_disk()
    run(cfg)


def test_models_that_do_not_fit_leave_the_trained_state(tmp_path, small_disk):
    small_disk()
    cfg = make_config(tmp_path)
    trainer = make_run(cfg)
    numbers = trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises((OSError, SafetensorError), match="File too large"):
        trainer.finish(numbers)
    assert {path.name for path in cfg.run_dir.iterdir()} == {"metrics.jsonl", "checkpoint-2", "run-id", "config.yaml"}
    small_disk()
    assert run(cfg)["final"]


def test_two_processes_cannot_work_on_one_folder(tmp_path):
    cfg = make_config(tmp_path)
    rule = f"run: .*/run must have one process at a time; got process {os.getpid()}"
    with files.lock(cfg.run_dir), pytest.raises(BlockingIOError, match=rule):
        run(cfg)
    run(cfg)


SCRIPT = """
import logging, pathlib, time
from copd_cases import make_config, run
logging.basicConfig(level=logging.INFO)
from copd.branch import Branch
gather = Branch.native_batch
def slow(self, step, **rest):
    print("step", step, flush=True); time.sleep(0.3)
    return gather(self, step, **rest)
Branch.native_batch = slow
run(make_config(pathlib.Path({folder!r}), "cycles=200", "name=stopped"))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_last_step_and_says_so(tmp_path, number):
    command = [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert child.stdout.readline() == "step 0\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert f"{signal.Signals(number).name}: stopping after this step" in said
    assert "the same command continues from checkpoint-1" in said
    assert [path.name for path in checkpoint.found(tmp_path / "stopped")] == ["checkpoint-1"]


def test_ctrl_c_in_the_final_evaluation_says_what_is_kept(tmp_path):
    waits = 'from copd import evaluate; evaluate.final = lambda *_: (print("final", flush=True), time.sleep(60))'
    script = SCRIPT.replace("Branch.native_batch = slow", waits).replace("cycles=200", "cycles=1")
    command = [sys.executable, "-c", script.format(folder=str(tmp_path))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert child.stdout.readline() == "final\n"
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert f"stopped after training: the same command goes on with what {tmp_path / 'stopped'} has" in said
    assert (tmp_path / "stopped" / "merged" / "model.safetensors").exists()
    assert checkpoint.found(tmp_path / "stopped")[-1].name == "checkpoint-2"
    assert run(make_config(tmp_path, "name=stopped"))["final"]


def told_to_stop(then, times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        then.append("went on")


def test_a_signal_outside_a_step_stops_at_once():
    reached = []
    with Interrupts(), pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        told_to_stop(reached)
    assert reached == []


def test_a_signal_within_a_step_waits_for_its_end_and_a_second_one_does_not():
    reached = []
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.hold():
        told_to_stop(reached)
    assert reached == ["went on"]
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.hold():
        told_to_stop(reached, times=2)
    assert reached == ["went on"] * 2
