"""Rows that a run finds it cannot use once it is under way: their rewards fail, or their media cannot be read."""

import json
import sys

import pytest
import torch
from copd_cases import make_config, make_run, run, same
from safetensors.torch import load_file
from test_data import checkpoint as save_model
from test_media import film

from copd import checkpoint, log, media, schema, train
from copd.config import Config


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


@pytest.fixture
def films(tmp_path, processor, monkeypatch):
    """Settings of a run on rows of films, as a user has them: two steps of two rows, two more held out."""
    save_model(tmp_path / "model", processor)
    for i in range(6):
        film(tmp_path / f"{i}.mp4", 4, rate=2)
    code = "def letters(prompts, completions, **_):\n    return [float(sum(map(ord, text))) for text in completions]\n"
    (tmp_path / "sum_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sum_reward", raising=False)
    rows = ({"prompt": f"{i}?", "videos": [f"{i}.mp4"]} for i in range(6))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def settings(name, decode_ahead=16):
        data = f"path: {tmp_path / 'rows.jsonl'}, test_rows: 2, rewards: [sum_reward:letters]"
        data += f", decode_ahead: {decode_ahead}"
        options = [
            f"name={name}",
            f"output_dir={tmp_path}",
            f"branches={{film: {{task: data, data: {{{data}}}}}}}",
            f"model={{path: {tmp_path / 'model'}, dtype: float32}}",
            "method=expert",
            "cycles=2",
            "rl_steps=1",
            "opd_steps=0",
            "rollout={prompts: 2, samples: 4, max_new_tokens: 4, mask_truncated: false}",
            "eval={prompts: 2, samples: 1, shown: 0}",
        ]
        return schema.load(Config, None, options)

    return settings


def test_a_broken_film_of_the_second_step_is_named_and_the_run_goes_on_from_the_first(tmp_path, films, monkeypatch):
    asked, read = [], media.read_video
    monkeypatch.setattr(media, "read_video", lambda item, *how: (asked.append(item), read(item, *how))[1])
    train.run(films("whole", decode_ahead=0))
    broken = tmp_path / asked[2]  # two a step
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    cfg = films("broken")
    where = f"film: row {broken.stem} of {tmp_path / 'rows.jsonl'}"
    with pytest.raises(ValueError, match=f"{where}: video must be .*; got no video that .* from {broken.name}"):
        train.run(cfg)
    assert [path.name for path in checkpoint.found(cfg.run_dir)] == ["checkpoint-1"]
    broken.write_bytes(content)
    train.run(cfg)
    trained = [record for record in log.read(cfg.run_dir / "metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [1, 2]
    assert all(record["grad_norm"] > 0 for record in trained)
    resumed, uninterrupted = (
        load_file(tmp_path / run / "branch-film" / "model.safetensors") for run in ("broken", "whole")
    )
    assert same(resumed, uninterrupted)
