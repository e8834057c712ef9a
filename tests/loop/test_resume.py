"""What a run goes on from, what it may change meanwhile, and what it does with files that are damaged."""

import json

import pytest
import torch
from copd_cases import make_config, make_run, run
from test_faults import broken_after

from copd import checkpoint, log


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
    file = cfg.run_dir / "checkpoint-2" / "state.pt"
    whole = checkpoint.read(file)
    older = {key: whole[key] for key in ("step", "identity")}
    for saved, number in ((older | {"branches": {}}, 1), (older | {"phases": []}, 2), (whole | {"format": 9}, 9)):
        torch.save(saved, file)
        with pytest.raises(
            ValueError, match=rf"{file.parent} must be a checkpoint of format 3; got format {number}, of"
        ):
            run(cfg)
    torch.save(whole, file)
    flip(file)
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
