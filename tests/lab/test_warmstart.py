"""The warm start: it learns, it is cached, and it needs worked answers."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from copd_cases import make_config, same

from copd.lab.tasks import vocabulary
from copd.lab.tasks.arithmetic import Arithmetic
from copd.lab.tiny import build_tiny
from copd.lab.warmstart import WARM, warm_start
from copd.rollout import generate, rewards, special_tokens

# one addition modulo 3: learnt in seconds
EASY = ["warmstart.clean_steps=150", "warmstart.slip_steps=0", "warmstart.check_every=50", "warmstart.batch=32"]
TASK = ["branches.text.options.steps=1", "branches.text.options.modulus=3", "branches.text.options.operand=2"]


def make(tmp_path, *overrides):
    cfg = make_config(tmp_path, *EASY, *TASK, "model.hidden_size=64", *overrides, domains=("text",))
    model, processor = build_tiny(cfg.model, cfg.seed), vocabulary.tokenizer()
    return cfg, model, processor, Arithmetic("text", **cfg.branches["text"].options)


def test_it_teaches_the_task_and_is_made_once(tmp_path, caplog):
    cfg, model, processor, task = make(tmp_path)
    caplog.set_level("INFO", "copd")
    made = warm_start(model, processor, [task], cfg)
    (folder,) = (tmp_path / "warmstart").iterdir()
    assert [check["step"] for check in json.loads((folder / "accuracy.json").read_text())] == [50, 100, 150]
    said = [line for line in caplog.messages if line.startswith(WARM)]
    assert [re.sub(r"[01]\.\d\d", "x", line) for line in said] == [
        *(f"warm start: step {step} of at most 150, text x" for step in (50, 100, 150)),
        "warm start: 0 steps with slips",
    ]
    rows = [task.prompt(i) for i in range(64)]
    learnt = generate(made, rows, 1, cfg.rollout, special_tokens(made, processor), 0, greedy=True)
    assert rewards(task, learnt).mean() >= 0.9
    _, fresh, _, _ = make(tmp_path)
    untouched = {name: value.clone() for name, value in fresh.state_dict().items()}
    cached = warm_start(fresh, processor, [task], cfg)
    assert same(cached.state_dict(), made.state_dict())
    assert same(fresh.state_dict(), untouched)


def test_the_cache_knows_seed_task_and_settings(tmp_path):
    folders = tmp_path / "warmstart"
    for changed in ("seed=0", "seed=1", "branches.text.options.steps=2", "warmstart.batch=2"):
        cfg, model, processor, task = make(tmp_path, "warmstart.clean_steps=1", changed)
        warm_start(model, processor, [task], cfg)
    assert len(list(folders.iterdir())) == 4


def test_a_cache_that_was_moved_is_found(tmp_path, monkeypatch):
    cfg, model, processor, task = make(tmp_path, "warmstart.clean_steps=1")
    made = warm_start(model, processor, [task], cfg)
    (tmp_path / "warmstart").rename(tmp_path / "moved")
    monkeypatch.setattr("copd.lab.warmstart._train", None)
    cfg, model, processor, task = make(tmp_path, "warmstart.clean_steps=1", f"warmstart.cache_dir={tmp_path}/moved")
    assert same(warm_start(model, processor, [task], cfg).state_dict(), made.state_dict())


def test_without_steps_the_base_is_the_model_itself(tmp_path):
    cfg, model, processor, task = make(tmp_path, "warmstart.clean_steps=0")
    assert warm_start(model, processor, [task], cfg) is model


def test_a_task_without_worked_answers_is_an_error(tmp_path):
    cfg, model, processor, task = make(tmp_path)
    files = SimpleNamespace(name="files")
    with pytest.raises(ValueError, match=r"warm start: tasks must offer worked solutions, .*; got 'files'"):
        warm_start(model, processor, [task, files], cfg)


def test_a_domain_may_have_a_batch_of_its_own(tmp_path, monkeypatch):
    sizes = []

    def loss(model, task, size, *rest):
        sizes.append(size)
        return model.lm_head.weight.sum() * torch.zeros(())

    monkeypatch.setattr("copd.lab.warmstart._imitation_loss", loss)
    cfg, model, processor, task = make(tmp_path, "warmstart.clean_steps=1", "warmstart.domain_batch.text=5")
    warm_start(model, processor, [task], cfg)
    assert sizes == [5]
