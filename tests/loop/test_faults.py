"""What a run does when something goes wrong: its files, its rewards, its disk, a signal, another process."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from copd_cases import make_config, make_run, run
from safetensors import SafetensorError

from copd import checkpoint, evaluate, files, log
from copd.coevolve import coevolve
from copd.log import Log
from copd.train import health
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


def test_a_run_started_anew_leaves_the_old_one_aside(tmp_path, caplog):
    cfg = make_config(tmp_path)
    run(cfg)
    old = (cfg.run_dir / "results.json").read_text()
    run(make_config(tmp_path, "resume=false", "optim.lr=1e-4"))
    assert (tmp_path / "run.old-1" / "results.json").read_text() == old
    assert f"what was in {cfg.run_dir} is now in {tmp_path / 'run.old-1'}" in caplog.text
    assert run(make_config(tmp_path, "optim.lr=1e-4"))["config"]["optim"]["lr"] == 1e-4
    run(make_config(tmp_path, "resume=false"))
    assert (tmp_path / "run.old-2").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        "micro_batch_tokens=8",
        "offload=true",
        "rollout.cache_tokens=1",
        "model.activation_checkpointing=true",
        "eval.every=1",
        "eval.prompts=3",
        "merge.method=ties",
        "keep_checkpoints=1",
        "checkpoint_required=false",
    ],
)
def test_a_resumed_run_may_change_what_cannot_change_its_weights(tmp_path, change):
    cfg, changed = make_config(tmp_path), make_config(tmp_path, change)
    checkpoint.same(checkpoint.identity(cfg), changed, "here")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("optim.lr=2e-3", "optim.lr 0.002 after 0.001"),
        ("seed=1", "seed 1 after 0"),
        ("rl_steps=2", "rl_steps 2 after 1"),
        ("rlvr.clip_low=0.1", "rlvr.clip_low 0.1 after 0.2"),
        ("opd.branch_beta={text: 2}", "opd.branch_beta"),
        ("merge.scale=2", "merge.scale 2.0 after 1.0"),
        ("branches.video.task=motion", "branches.video.task 'motion' after None"),
    ],
)
def test_what_changes_the_weights_is_refused_by_name(tmp_path, change, named):
    saved = checkpoint.identity(make_config(tmp_path, "consolidate.steps=1"))
    with pytest.raises(ValueError, match=f"resume: config must be the one of here; got .*{named}"):
        checkpoint.same(saved, make_config(tmp_path, "consolidate.steps=1", change), "here")


def test_more_cycles_extend_a_finished_run(tmp_path):
    run(make_config(tmp_path, "name=longer"))
    extended = run(make_config(tmp_path, "name=longer", "cycles=2"))
    whole = run(make_config(tmp_path, "name=whole", "cycles=2"))
    assert extended["final"] == whole["final"]
    assert extended["phases"] == whole["phases"]
    with pytest.raises(ValueError, match="cycles and steps must give at least the 4 steps done; got 2"):
        run(make_config(tmp_path, "name=longer"))


def test_another_evaluation_of_a_finished_run_trains_nothing(tmp_path, monkeypatch):
    cfg = make_config(tmp_path)
    first = run(cfg)
    monkeypatch.setattr("copd.branch.Branch.learn", None)
    again = run(make_config(tmp_path, "eval.prompts=2"))
    assert again["final"]["base"]["text"]["samples"] == 2
    assert first["final"]["base"]["text"]["samples"] == 4


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.write_text("{}")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog):
    settings = ("cycles=2", "checkpoint_every=1")
    cfg = make_config(tmp_path, *settings)
    make_run(cfg).train()
    newest = cfg.run_dir / "checkpoint-4" / "state.pt"
    damage(newest)
    for foreign in ("checkpoint-best", "checkpoint-500"):
        (cfg.run_dir / foreign).mkdir()
    (cfg.run_dir / "checkpoint-12.bak").write_text("of somebody else")
    resumed = run(cfg)
    assert f"{newest.parent} cannot be read" in caplog.text
    assert resumed["final"] == run(make_config(tmp_path, *settings, "name=whole"))["final"]


def test_without_a_readable_checkpoint_a_run_does_not_silently_start_anew(tmp_path):
    cfg = make_config(tmp_path)
    make_run(cfg).train()
    flip(cfg.run_dir / "checkpoint-2" / "state.pt")
    with pytest.raises(ValueError, match="must be readable; got none; resume=false starts anew"):
        run(cfg)


@pytest.mark.parametrize("text", ['{"name": "r', "", "{}", "[1]"])
def test_a_half_written_results_file_is_made_again(tmp_path, text, caplog):
    cfg = make_config(tmp_path)
    first = run(cfg)
    (cfg.run_dir / "results.json").write_text(text)
    assert run(cfg)["final"] == first["final"]
    assert f"{cfg.run_dir / 'results.json'} must hold the results of a run" in caplog.text


def test_a_cut_off_line_of_metrics_is_left_out(tmp_path, caplog):
    cfg = make_config(tmp_path)
    make_run(cfg).train()
    path = cfg.run_dir / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"kind": "train", "st')
    run(cfg)
    assert path.read_text().startswith(before)
    assert "a line of" in caplog.text


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
def slow(self, step):
    print("step", step, flush=True); time.sleep(0.3)
    return gather(self, step)
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


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """A checkpoint, rows and a reward as a user has them: the reward fails on one row and gives NaN on another."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from copd.lab.tasks import vocabulary

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 256}
    special = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 2, "pad_token_id": 0}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **special)).save_pretrained(tmp_path / "model")
    vocabulary.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{i % 9} + {i % 7} = {i}", "number": i} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_reward.py").write_text(
        "def score(prompts, completions, number, **_):\n"
        "    assert 3 not in number\n"
        "    return [float('nan') if n == 5 else len(text) / 10 for n, text in zip(number, completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    data = {"path": tmp_path / "rows.jsonl", "test_rows": 4, "rewards": "[own_reward:score]"}
    return [
        f"model.path={tmp_path / 'model'}",
        "method=expert",
        "rollout.prompts=4",
        "opd_steps=0",
        "branches.text.task=data",
        *(f"branches.text.data.{name}={value}" for name, value in data.items()),
    ]


def test_rows_that_fail_their_reward_do_not_end_the_run_and_changed_rows_are_noticed(tmp_path, own_files, caplog):
    settings = (*own_files, "cycles=4")  # every row once
    results = run(make_config(tmp_path, *settings, domains=("text",)))
    for row, why in ((3, "score raised AssertionError"), (5, "score must return finite numbers or None; got nan")):
        assert f"text: row {row} of {tmp_path / 'rows.jsonl'}: reward: {why}" in caplog.text
    assert "accuracy" not in results["final"]["text"]["text"]
    trained = [r for r in log.read(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert sum(r["rewards/failed_ratio"] for r in trained) == 2 / 4
    assert all(r["rewards/score/mean"] == pytest.approx(r["reward"], rel=1e-5) for r in trained)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "1 + 1", "number": 20}) + "\n")
    with pytest.raises(ValueError, match=r"config must be the one of the finished run .*rows.jsonl '.*' after '"):
        run(make_config(tmp_path, *settings, domains=("text",)))


def test_rewards_that_fail_too_often_stop_the_run_with_a_checkpoint(tmp_path, own_files):
    settings = (*own_files, "cycles=4", "branches.text.data.max_failed_rewards=0")
    cfg = make_config(tmp_path, *settings, domains=("text",))
    rule = r"row \d of .*: at most 0% of a batch may fail its reward; got \d of 12; score"
    with pytest.raises(ValueError, match=rule):
        run(cfg)
    done = max((r["step"] for r in log.read(cfg.run_dir / "metrics.jsonl") if r["kind"] == "train"), default=0)
    assert [path.name for path in checkpoint.found(cfg.run_dir)] == [f"checkpoint-{done}"] * bool(done)


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


def empty(name, step, ratio=0.0, **more):
    return {"branch": name, "step": step, "completions/weighed_ratio": ratio, "completions/clipped_ratio": 1.0} | more


def test_steps_without_any_weight_warn_and_then_stop_the_run(tmp_path, caplog):
    cfg = make_config(tmp_path, "cycles=20", "rollout.mask_truncated=true", "rollout.max_new_tokens=1")
    with pytest.raises(health.Unhealthy, match=r"step \d+: .* 100% cut off at 1 tokens, 10 steps in a row; raise") as e:
        run(cfg)
    assert caplog.text.count("must leave something to learn from") == 1
    step = str(e.value).removeprefix("step ").split(":")[0]
    assert checkpoint.found(cfg.run_dir)[-1].name == f"checkpoint-{step}"


@pytest.mark.parametrize(("difference", "warnings"), [(0.02, 0), (0.3, 1)])
def test_a_sampler_that_strays_from_the_loss_warns_once(tmp_path, difference, warnings, caplog):
    cfg = make_config(tmp_path)
    numbers = Log(tmp_path, cfg, 2, 0)
    for step in (1, 2):
        record = empty("text", step, 1.0, sampling_logp_difference=difference)
        numbers.write("train", step, record)
        health.check(record, numbers, cfg)
    assert caplog.text.count("must agree on log-probs") == warnings


def test_a_sampler_of_another_policy_stops_the_run(tmp_path, monkeypatch):
    from copd import rollout

    logits = rollout.reference.logits
    monkeypatch.setattr(rollout.reference, "logits", lambda head: 40 * logits(head))
    with pytest.raises(health.Unhealthy, match=r"got a mean difference of .* nats: the rollouts are another policy's"):
        run(make_config(tmp_path, "model.init_std=0.3"))


def test_a_failing_reward_is_left_out_of_the_loss(tmp_path):
    trainer = make_run(make_config(tmp_path))
    branch = trainer.plan.branches[0]
    branch.tasks[0].reward = lambda prompts, texts: [float("nan"), 0.0, 1.0, 1.0, 0.0, 0.0][: len(texts)]
    batch = branch.native_batch(0)
    assert batch.weight.any(1).tolist() == [False, True, True, True, True, True]
    assert batch.advantage[0] == 0
    assert batch.advantage[2] == -batch.advantage[1] > 0
    assert batch.stats["reward"] == pytest.approx(0.4)
    assert torch.isfinite(torch.tensor(branch.learn([batch])["loss"]))


def test_without_a_terminal_there_is_a_line_a_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "LINE_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="copd"):
        run(make_config(tmp_path))
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1 of 2", "step 2 of 2"]
    assert "reward" in lines[0]


def test_lines_are_no_faster_than_one_in_a_while(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="copd"):
        run(make_config(tmp_path, "cycles=2"))
    assert sum(message.startswith("step ") for message in caplog.messages) <= 3


def test_the_cost_of_a_resumed_run_is_that_of_all_its_processes(tmp_path, monkeypatch):
    cfg = make_config(tmp_path, "cycles=2", "checkpoint_every=1")
    monkeypatch.setattr("copd.train.coevolve", broken_after(3, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(cfg)
    monkeypatch.undo()
    records = log.read(cfg.run_dir / "metrics.jsonl")
    records[-1]["time"] = 1000.0
    (cfg.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cost = run(cfg)["cost"]
    assert cost["seconds"] >= 1000
    assert cost["updates"] == 8


def test_the_log_has_the_names_trl_gives(tmp_path):
    run(make_config(tmp_path))
    records = log.read(tmp_path / "run" / "metrics.jsonl")
    first, second = (r for r in records if r["kind"] == "train" and r["branch"] == "text")
    assert first["learning_rate"] == 1e-3
    assert second["num_tokens"] > first["num_tokens"] > first["tokens"]
    for kind in ("", "terminated_"):
        low, mean, high = (first[f"completions/{name}_{kind}length"] for name in ("min", "mean", "max"))
        assert low <= mean <= high
    assert first["completions/max_length"] == 4


def send(sent, name):
    """A stand-in for wandb or trackio, that keeps what it is sent.

    The packages themselves, offline: one run of 46 records, with its steps, after the same interruption.
    """

    class Package:
        def init(self, **options):
            sent.append((name, "init", options))

        def log(self, numbers, step=None):
            sent.append((name, "log", {"step": step} | numbers))

        def finish(self):
            sent.append((name, "finish", None))

    return Package()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_every_number_once_in_one_run(tmp_path, monkeypatch, name):
    sent = []
    monkeypatch.setitem(sys.modules, name, send(sent, name))
    settings = ("cycles=2", "checkpoint_every=2", "eval.every=1", f"report_to=[{name}]")
    cfg = make_config(tmp_path, *settings, domains=("text", "image", "video"))
    monkeypatch.setattr("copd.train.coevolve", broken_after(3, MemoryError()))
    with pytest.raises(MemoryError):
        run(cfg)
    files.discard(cfg.run_dir / "checkpoint-3")
    monkeypatch.setattr("copd.train.coevolve", coevolve)
    run(cfg)
    opened = [options for _, what, options in sent if what == "init"]
    assert len(opened) == 2
    assert opened[0] == opened[1]
    assert opened[0]["config"]["optim"]["lr"] == 1e-3
    logged = [(key, numbers["step"]) for _, what, numbers in sent if what == "log" for key in numbers if key != "step"]
    assert len(logged) == len(set(logged))
    keys = {key for key, _ in logged}
    assert {"final/merged/text/accuracy", "train/text/text/tokens", "train/text/text/rollouts"} <= keys
    assert {f"divergence/text/{teacher}/text/overlap" for teacher in ("image", "video")} <= keys
    assert {step for key, step in logged if key.startswith("train")} == {1, 2, 3, 4}
    assert [what for _, what, _ in sent].count("finish") == 2
