"""Rewards in processes of their own: one that hangs, dies or raises costs its row."""

import math
import time

import pytest
from test_data import config

from copd import rewards
from copd.apart import Apart
from copd.data import FileTask

CODE = """
import os, time

def moody(prompts, completions, answer, **columns):
    for text in completions:
        if text == "hang":
            time.sleep(600)
        if text == "die":
            os._exit(1)
        if text == "raise":
            raise KeyError("oops")
    return [float(text == want) for text, want in zip(completions, answer)]

async def later(prompts, completions, **columns):
    print("said aloud")
    return [float(len(text)) for text in completions]

def wrong(completions, **columns):
    return [1.0]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "moods.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return "moods"


def combined(function, *completions):
    columns = {"answer": ["ok"] * len(completions)}
    return rewards.combine([function], None, ["p"] * len(completions), list(completions), columns)


def test_a_completion_that_hangs_dies_or_raises_is_the_only_one_without_a_reward(module):
    function = Apart(f"{module}:moody", 2.0)
    score = combined(function, "ok", "hang", "no", "die", "raise")
    assert score.total[0] == 1.0
    assert score.total[2] == 0.0
    assert all(math.isnan(score.total[i]) for i in (1, 3, 4))
    assert score.problems[1] == "moody raised TimeoutError: no answer within 2.0 s"
    assert score.problems[3] == "moody raised ChildProcessError: its process has died"
    assert "moody raised RuntimeError: KeyError: 'oops'" in score.problems[4]
    assert combined(function, "ok", "ok").total == [1.0, 1.0]


def test_it_is_the_function_it_stands_for(module):
    assert rewards.needed(Apart(f"{module}:moody", 1.0)) == {"answer"}
    assert combined(Apart(f"{module}:later", 60.0), "a", "bcd").total == [1.0, 3.0]
    assert combined(Apart("exact_match", 60.0), "ok", "no").total == [1.0, 0.0]
    with pytest.raises(ValueError, match="wrong must return one reward for each of the 2 completions; got 1"):
        combined(Apart(f"{module}:wrong", 60.0), "a", "b")
    with pytest.raises(ValueError, match="rewards: 'moods:gone' must be importable"):
        Apart(f"{module}:gone", 1.0)


def test_its_process_ends_with_it(module):
    function = Apart(f"{module}:later", 60.0)
    combined(function, "a")
    process = function.process
    del function
    end = time.time() + 30
    while process.poll() is None and time.time() < end:
        time.sleep(0.01)
    assert process.poll() is not None


def test_a_task_gives_its_rewards_a_limit(processor, write, module, caplog):
    rows = [{"prompt": f"{i}?", "answer": "ok"} for i in range(5)]
    cfg = config(write(*rows), rewards=[f"{module}:moody"], reward_timeout=2.0)
    task = FileTask("text", cfg, processor)
    found = task.reward([task.prompt(i) for i in range(4)], ["ok", "hang", "no", "ok"])
    assert [value for value in found if not math.isnan(value)] == [1.0, 0.0, 1.0]
    assert "text: row 1 of" in caplog.text
    assert "moody raised TimeoutError" in caplog.text
    with pytest.raises(ValueError, match=r"data\.reward_timeout must be above 0, or null; got 0"):
        config("x", reward_timeout=0)
