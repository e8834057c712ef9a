"""What a small run must show: two branches, 60 steps, one seed. Minutes long, so only `make test-slow` runs it."""

from pathlib import Path
from statistics import fmean

import pytest
from copd_cases import run

from copd import schema
from copd.lab import study
from copd.lab.config import LabConfig

STUDY = Path(__file__).parents[2] / "configs" / "study.yaml"


@pytest.mark.slow
def test_branches_that_teach_each_other_stay_close_and_average_well(tmp_path):
    """Margins that every seed of earlier runs kept several times over; see the ordering against mixed RLVR and MOPD in
    `results/`, which no test may assume."""
    settings = [f"output_dir={tmp_path}", "common.cycles=4", "common.consolidate.steps=0"]
    plan = schema.load(study.Study, STUDY, settings)
    runs = {
        method: run(schema.load(LabConfig, study.write_config(plan, "sharpen-k2", 0, method)))
        for method in ("independent", "copd")
    }
    steps = {run["phases"][-1][-1] for run in runs.values()}
    assert steps == {60}
    accuracy = {
        (method, model): {domain: record["accuracy"] for domain, record in domains.items()}
        for method, run in runs.items()
        for model, domains in run["final"].items()
    }
    overall = {key: fmean(domains.values()) for key, domains in accuracy.items()}
    last = {method: [record for record in run["divergence"] if record["step"] == 60] for method, run in runs.items()}
    kl = {method: fmean(record["symmetric_kl"] for record in records) for method, records in last.items()}
    overlap = {method: fmean(record["overlap"] for record in records) for method, records in last.items()}
    print(f"overall accuracy {overall}\nexperts {accuracy}\nsymmetric KL {kl}\noverlap {overlap}")
    assert kl["copd"] < kl["independent"] / 3
    assert overlap["copd"] > overlap["independent"] + 0.02
    for name in ("text", "image"):
        assert accuracy["independent", name][name] > accuracy["independent", "base"][name] + 0.20
    assert overall["copd", "merged"] > overall["independent", "merged"] + 0.03
    assert overall["copd", "merged"] > max(overall["independent", name] for name in ("text", "image")) + 0.05
