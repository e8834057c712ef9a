"""The command line, as a user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from copd_cases import make_config, run

from copd import cli
from copd.model import load_saved

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_dry_run_prints_the_resolved_config(capsys):
    cli.main(["train", "--config", str(CONFIGS / "smoke.yaml"), "--dry-run", "optim.lr=0.5"])
    assert "lr: 0.5" in capsys.readouterr().out


def test_an_unknown_key_on_the_command_line_ends_with_a_message(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(CONFIGS / "smoke.yaml"), "lr=0.5"])
    assert "Key 'lr' not in 'LabConfig'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "no.yaml"], "No such file or directory: .*no.yaml"),
        (["train", "--dryrun"], "an override must have the form key=value; got '--dryrun'"),
        (["report", "runs", "--out", "results", "x=1"], "unrecognized arguments: x=1"),
    ],
)
def test_a_wrong_argument_ends_with_a_message(capsys, arguments, message):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert re.search(message, capsys.readouterr().err)


DATA = str(CONFIGS.parent / "examples" / "text.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "/nowhere"], "report: directory must hold a results.json; got none below /nowhere"),
        (["train", "branches.a.task=x"], "config: branches.a.task must be one of .*; got 'x'"),
        (["train", "branches.a.task=data", "branches.a.data.path=x.jsonl"], "got 'x.jsonl', which does not exist"),
        (
            ["train", "branches.a.task=arithmetic", "model.path=/no/model"],
            "model: path must be a folder .*, which is",
        ),
        (
            ["eval", "/no", "--config", str(CONFIGS / "smoke.yaml")],
            "model: path must .*; got /no, which is no",
        ),
        (["merge", "/a", "/b", "--out", "/c"], "model: path must be a folder written by save_pretrained"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_no_traceback(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=f"^copd: .*{message}[^\n]*$"):
        cli.main(arguments)
    monkeypatch.setenv("COPD_DEBUG", "1")
    with pytest.raises((ValueError, OSError), match=message):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["path=no.jsonl"], "which does not exist"),
        (
            [f"path={DATA}", "test_rows=2", "columns.prompt=problem"],
            "problem must be text or a list of messages; got None",
        ),
        ([f"path={DATA}", "rewards=[exact]"], "rewards: name must be one of"),
        (
            [f"path={DATA}", "test_rows=2", "rewards=[json:load]"],
            "row must have the columns .*; got no fp",
        ),
        ([f"path={DATA}", "test_rows=2", "fps=0"], "data.fps must be above 0"),
    ],
)
def test_a_dry_run_finds_what_the_run_would(capsys, settings, message):
    lines = ["branches.a.task=data", *(f"branches.a.data.{setting}" for setting in settings)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--dry-run", *lines])
    assert re.search(message, f"{ended.value} {capsys.readouterr().err}")


def test_a_dry_run_finds_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="report_to must name installed packages; got trackio"):
        cli.main(["train", "--config", str(CONFIGS / "smoke.yaml"), "--dry-run", "report_to=[trackio]"])


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit"])
    message = capsys.readouterr().err
    assert all(f"'{name}'" in message for name in ("fit", "train", "study", "eval", "merge", "report"))


def test_eval_and_merge_work_on_saved_branches(tmp_path, capsys):
    cfg = make_config(tmp_path, "method=expert")
    run(cfg)
    folders = [str(cfg.run_dir / f"branch-{name}") for name in ("text", "image")]
    outs = [str(tmp_path / name) for name in ("out", "weighted")]
    cli.main(["merge", *folders, "--out", outs[0]])
    cli.main(["merge", *folders, "--out", outs[1], "method=weighted", f"weights={{{folders[0]}: 3}}"])
    text, image, mean, weighted = (load_saved(path)[0].state_dict() for path in (*folders, *outs))
    for key in mean:
        torch.testing.assert_close(mean[key], (text[key] + image[key]) / 2)
        torch.testing.assert_close(weighted[key], (3 * text[key] + image[key]) / 4)
    cli.main(["eval", str(tmp_path / "out"), "--config", str(cfg.run_dir / "config.yaml")])
    assert capsys.readouterr().out.count("accuracy") == 2


def test_merge_without_the_base_it_needs_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="merge: base must be given for ties; got none"):
        cli.main(["merge", "a", "b", "--out", str(tmp_path), "method=ties"])


@pytest.mark.parametrize(
    ("name", "branch"), [("smoke", "model.safetensors"), ("smoke_lora", "adapter_model.safetensors")]
)
def test_the_smoke_configs_run_by_one_command(tmp_path, name, branch):
    """As a user runs it: report and models are there, and the progress says what happened."""
    command = [
        sys.executable,
        "-m",
        "copd.train",
        "--config",
        str(CONFIGS / f"{name}.yaml"),
        f"output_dir={tmp_path}",
        "name=smoke",
    ]
    cached = f"warmstart.cache_dir={tmp_path / 'warmstart'}"
    done = subprocess.run([*command, cached], capture_output=True, text=True, check=False, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stderr
    for name in (
        "metrics.jsonl",
        "results.json",
        "results.md",
        "report.html",
        "merged/model.safetensors",
        f"branch-video/{branch}",
    ):
        assert (tmp_path / "smoke" / name).stat().st_size > 0
    assert "merged" in done.stdout
    assert "MiB in all" in done.stderr
