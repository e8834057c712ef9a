"""Configs: files, overrides, errors, and the command line."""

import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from copd_cases import make_config

from copd import cli, config, study, topology, train
from copd.model import load_saved

CONFIGS = Path(__file__).parent.parent / "configs"


def test_a_config_survives_the_round_trip(tmp_path):
    cfg = make_config(tmp_path, "opd.branch_beta.text=0.5", "branches.image.options.grid=2")
    assert config.load(asdict(cfg)) == cfg


def test_every_field_has_a_line_of_documentation():
    source = Path(config.__file__).read_text().splitlines()
    for cls in vars(config).values():
        if is_dataclass(cls) and cls.__module__ == config.__name__ and cls is not config.Config:
            for field in fields(cls):
                (place,) = [i for i, line in enumerate(source) if line.startswith(f"    {field.name}: ")][:1] or [None]
                assert source[place + 1].strip().startswith('"""'), f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rlvr.clip=1", "Key 'clip' not in 'RLVRConfig'"),
        ("method=grpo", "Invalid value 'grpo', expected one of"),
        ("optim.lr=fast", "could not be converted to Float"),
        ("branches.text.data.file=x", "Key 'file' not in 'DataConfig'"),
        ("hub=audio", r"hub must be one of the branches \['text', 'image'\]; got 'audio'"),
        ("opd.branch_beta.audio=1", "opd.branch_beta must name branches"),
        ("merge.weights.audio=1", "merge.weights must name branches"),
        ("branches.audio.options.steps=1", "branches.audio.task must be set"),
        ("rollout.samples=0", "rollout.samples must be at least 1; got 0"),
        ("rollout.temperature=0", "rollout.temperature must be above 0; got 0.0"),
        ("merge.density=0", r"merge.density must be in \(0, 1\]; got 0.0"),
        ("cycles=-1", "cycles must be at least 0; got -1"),
        ("cycles", "an override must have the form key=value; got 'cycles'"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(tmp_path, override, message):
    with pytest.raises(ValueError, match=f"^config: .*{message}"):
        make_config(tmp_path, override)


def test_a_run_without_branches_is_an_error():
    with pytest.raises(ValueError, match="branches must name at least one domain; got none"):
        config.load(None)


@pytest.mark.parametrize("name", ["smoke", "qwen3_vl_4b"])
def test_the_bundled_runs_load(name):
    assert list(config.load(CONFIGS / f"{name}.yaml").branches) == ["text", "image", "video"]


@pytest.mark.parametrize("name", ["demo", "study"])
def test_the_bundled_studies_load(tmp_path, name):
    plan = config.load(CONFIGS / f"{name}.yaml", [f"output_dir={tmp_path}"], study.Study)
    for variant in plan.variants:
        for method in plan.methods:
            path = study.write_config(plan, variant, 3, method)
            cfg = config.load(path)
            assert (cfg.method, cfg.seed, cfg.variant) == (method, 3, variant)


def test_the_paper_is_the_default():
    cfg = config.load(CONFIGS / "smoke.yaml")
    paper = config.OPDConfig()
    assert (paper.signal, paper.teacher, paper.native, paper.delta_clamp) == ("sampled", "live", True, None)
    assert (cfg.rlvr.clip_low, cfg.rlvr.clip_high, cfg.rlvr.loss_aggregation) == (0.2, 0.28, "sequence")
    assert (cfg.topology, cfg.merge.method, config.OptimConfig().lr) == ("hub", "mean", 1e-6)


def test_the_hub_exchanges_with_every_spoke_and_spokes_with_the_hub_alone(tmp_path):
    domains = ("text", "image", "video")
    hub = topology.teachers(make_config(tmp_path, "hub=image", domains=domains))
    assert hub == {"text": ["image"], "image": ["text", "video"], "video": ["image"]}
    pairs = topology.teachers(make_config(tmp_path, "topology=all", domains=domains))
    assert pairs["video"] == ["text", "image"]


def test_a_dry_run_prints_the_resolved_config(capsys):
    cli.main(["train", "--config", str(CONFIGS / "smoke.yaml"), "--dry-run", "optim.lr=0.5"])
    assert "lr: 0.5" in capsys.readouterr().out


def test_an_unknown_key_on_the_command_line_ends_with_a_message(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(CONFIGS / "smoke.yaml"), "lr=0.5"])
    assert "Key 'lr' not in 'Config'" in capsys.readouterr().err


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


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fit"])
    message = capsys.readouterr().err
    assert all(f"'{name}'" in message for name in ("fit", "train", "study", "eval", "merge", "report"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("branches.text.task=audio", "branches.text.task must be one of arithmetic, count, motion, data; got 'audio'"),
        ("branches.text.options.depth=3", "branches.text.options must be arguments of arithmetic"),
    ],
)
def test_a_wrong_task_is_an_error_that_names_it(tmp_path, task, message):
    cfg = make_config(tmp_path, task)
    with pytest.raises(ValueError, match=message):
        train.make_task("text", cfg.branches["text"], None)


def test_eval_and_merge_work_on_saved_branches(tmp_path, capsys):
    cfg = make_config(tmp_path, "method=expert")
    train.run(cfg)
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


def test_a_study_runs_each_method_in_its_process_and_continues(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(study, "launch", lambda path: calls.append(path.stem) or int(path.stem == "mixed-seed1"))
    plan = study.Study(
        output_dir=str(tmp_path),
        seeds=[0, 1],
        jobs=1,
        common={"cycles": 1},
        variants={"tiny": {"branches": {"text": {"task": "arithmetic"}}}},
    )
    failed = study.run(plan)
    assert [path.stem for path in failed] == ["mixed-seed1"]
    methods = ["independent", "copd", "mixed", "mopd"]
    assert calls == [f"{method}-seed{seed}" for seed in (0, 1) for method in methods]


def test_a_failed_first_run_takes_those_that_need_it_along(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "launch", lambda path: 1)
    plan = study.Study(output_dir=str(tmp_path), variants={"tiny": {"branches": {"text": {"task": "arithmetic"}}}})
    assert len(study.run(plan)) == 4


def test_ctrl_c_starts_no_further_run(tmp_path, monkeypatch):
    calls, arrived = [], threading.Event()

    def interrupt(*_):
        arrived.set()
        raise KeyboardInterrupt

    def launch(path):
        calls.append(path.stem)
        if path.stem == "copd-seed0":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            # a busy machine may be late to wake the main thread
            assert arrived.wait(60)
            time.sleep(0.5)
        return 0

    monkeypatch.setattr(study, "launch", launch)
    variants = {"tiny": {"branches": {"text": {"task": "arithmetic"}}}}
    # a shell starts background jobs with SIGINT ignored
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.run(study.Study(output_dir=str(tmp_path), jobs=1, variants=variants))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["independent-seed0", "copd-seed0"]


def test_the_smoke_config_runs_by_one_command(tmp_path):
    """As a user runs it: report and models are there, and the progress says what happened."""
    command = [sys.executable, "-m", "copd.train", "--config", str(CONFIGS / "smoke.yaml"), f"output_dir={tmp_path}"]
    cached = f"warmstart.cache_dir={tmp_path / 'warmstart'}"
    done = subprocess.run([*command, cached], capture_output=True, text=True, check=False, cwd=CONFIGS.parent)
    assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "results.json", "results.md", "report.html", "merged/model.safetensors"):
        assert (tmp_path / "smoke" / name).stat().st_size > 0
    assert "merged" in done.stdout
    assert "MiB in all" in done.stderr
