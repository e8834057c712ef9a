"""Rows that a run finds it cannot use once it is under way: their rewards fail, or their media cannot be read."""

import json
import sys

import pytest
from copd_cases import same
from safetensors.torch import load_file
from test_data import checkpoint as save_model
from test_data import processor  # noqa: F401  (a fixture)
from test_media import film

from copd import checkpoint, log, media, schema, train
from copd.config import Config


@pytest.fixture
def films(tmp_path, processor, monkeypatch):  # noqa: F811
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
