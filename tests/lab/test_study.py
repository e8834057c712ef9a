"""Studies: each run in its process, continued, stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from copd import checkpoint, files, schema
from copd.lab import study
from copd.lab.config import LabConfig
from copd.train.interrupts import Interrupts

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["demo", "study"])
def test_the_bundled_studies_load(tmp_path, name):
    plan = schema.load(study.Study, CONFIGS / f"{name}.yaml", [f"output_dir={tmp_path}"])
    for variant in plan.variants:
        for arm in plan.arms:
            path = study.write_config(plan, variant, 3, arm)
            cfg = schema.load(LabConfig, path)
            assert list(plan.arms) == list(OmegaConf.load(CONFIGS / f"{name}.yaml").get("arms", study.METHODS))
            assert (cfg.arm, cfg.method, cfg.seed, cfg.variant) == (arm, plan.method(arm), 3, variant)


def test_an_arm_is_a_method_with_settings_of_its_own(tmp_path):
    plan = study.Study(
        output_dir=str(tmp_path),
        common={"opd": {"signal": "forward"}},
        variants={"tiny": {"branches": {"text": {"task": "arithmetic"}}}},
        arms={"frozen": {"method": "mopd"}, "alone": {"method": "independent"}, "copd": {"opd": {"signal": "sampled"}}},
        only=["tiny/*o*e*", "other/copd"],
    )
    cfg = {arm: schema.load(LabConfig, study.write_config(plan, "tiny", 1, arm)) for arm in plan.arms}
    assert [(cfg[arm].method, cfg[arm].opd.signal) for arm in plan.arms] == [
        ("mopd", "forward"),
        ("independent", "forward"),
        ("copd", "sampled"),
    ]
    assert cfg["frozen"].experts == str(cfg["alone"].run_dir)
    # from one base, which stays with them
    assert {made.warmstart.cache_dir for made in cfg.values()} == {f"{tmp_path}/warmstart"}
    assert plan.chosen("tiny") == ["frozen", "alone"]
    assert plan.chosen("other") == ["copd"]


def test_a_study_runs_each_method_in_its_process_and_continues(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        study, "launch", lambda path, children, ranks: calls.append(path.stem) or int(path.stem == "mixed-seed1")
    )
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
    monkeypatch.setattr(study, "launch", lambda path, children, ranks: 1)
    plan = study.Study(output_dir=str(tmp_path), variants={"tiny": {"branches": {"text": {"task": "arithmetic"}}}})
    assert len(study.run(plan)) == 4


def test_ctrl_c_starts_no_further_run(tmp_path, monkeypatch):
    calls, arrived = [], threading.Event()
    heed = Interrupts._heed

    def interrupt(*arguments):
        arrived.set()
        heed(*arguments)

    monkeypatch.setattr(Interrupts, "_heed", interrupt)

    def launch(path, children, ranks):
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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            study.run(study.Study(output_dir=str(tmp_path), jobs=1, variants=variants))
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == ["independent-seed0", "copd-seed0"]


TINY = """
common: {{cycles: {cycles}, rl_steps: 1, opd_steps: 0, threads: 1, model: {{hidden_size: 32, layers: 1}},
         rollout: {{prompts: 2, samples: 2, max_new_tokens: 4}}, eval: {{prompts: 2, samples: 1}}}}
variants: {{tiny: {{branches: {{text: {{task: {task}, data: {{path: gone.jsonl}}}}}}}}}}
arms: {{independent: {{}}, mixed: {{}}}}
"""


def start_study(folder, cycles, task):
    (folder / "study.yaml").write_text(TINY.format(cycles=cycles, task=task))
    command = [sys.executable, "-m", "copd", "study", "--config", "study.yaml", f"output_dir={folder / 'study'}"]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, text=True, env=environment, **pipes)


def test_a_study_passes_a_signal_on_and_waits_for_its_runs(tmp_path):
    child = start_study(tmp_path, 10**6, "arithmetic")
    run = tmp_path / "study" / "tiny" / "independent-seed0"
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and '"train"' in (run / "metrics.jsonl").read_text():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=120)
    assert child.returncode == 130
    assert len(checkpoint.found(run)) == 1
    with files.lock(run):  # nobody works on it any more
        assert not (run.parent / "mixed-seed0").exists()


def test_a_study_whose_runs_all_fail_lists_them_with_the_end_of_their_logs(tmp_path):
    child = start_study(tmp_path, 1, "data")
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "study: failed:" in said
    assert "independent-seed0.log):" in said
    assert "got 'gone.jsonl', which does not exist" in said
    assert "Traceback" not in said
    assert "mixed-seed0.log):\n    did not start" in said


def test_what_a_restart_left_aside_and_a_cut_off_line_are_passed_over(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {"kind": "train", "step": 3, "phase": "rl", "reward": 0.5, "tokens_per_s": 10.0}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n" + '{"kind": "tr')
    assert study.progress(tmp_path / "run.yaml") == "step 3, rl, reward 0.50, 10 tokens/s"


def test_progress_is_shown_from_the_warm_start_on(tmp_path):
    assert study.progress(tmp_path / "run.yaml") == "begins"
    lines = ["warm start: step 50 of at most 100, text 0.20", "warm start: step 100 of at most 100, text 0.80", "other"]
    (tmp_path / "run.log").write_text("\n".join(lines))
    assert study.progress(tmp_path / "run.yaml") == lines[1]
