"""Studies: each run in its process, continued, stopped."""

import signal
import threading
import time
from pathlib import Path

import pytest

from copd import schema
from copd.lab import study
from copd.lab.config import LabConfig
from copd.train.interrupts import Interrupts

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["demo", "study"])
def test_the_bundled_studies_load(tmp_path, name):
    plan = schema.load(study.Study, CONFIGS / f"{name}.yaml", [f"output_dir={tmp_path}"])
    for variant in plan.variants:
        for method in plan.methods:
            path = study.write_config(plan, variant, 3, method)
            cfg = schema.load(LabConfig, path)
            assert (cfg.method, cfg.seed, cfg.variant) == (method, 3, variant)


def test_a_study_runs_each_method_in_its_process_and_continues(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        study, "launch", lambda path, children: calls.append(path.stem) or int(path.stem == "mixed-seed1")
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
    monkeypatch.setattr(study, "launch", lambda path, children: 1)
    plan = study.Study(output_dir=str(tmp_path), variants={"tiny": {"branches": {"text": {"task": "arithmetic"}}}})
    assert len(study.run(plan)) == 4


def test_ctrl_c_starts_no_further_run(tmp_path, monkeypatch):
    calls, arrived = [], threading.Event()
    heed = Interrupts._heed

    def interrupt(*arguments):
        arrived.set()
        heed(*arguments)

    monkeypatch.setattr(Interrupts, "_heed", interrupt)

    def launch(path, children):
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
