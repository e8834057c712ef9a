"""What a run says as it goes: its lines, its numbers, and what is so wrong that it warns of it or stops."""

import logging
import sys

import pytest
from copd_cases import make_config, run
from test_faults import broken_after

from copd import checkpoint, files, log
from copd.coevolve import coevolve
from copd.log import Log
from copd.train import health


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
