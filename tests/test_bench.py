"""The benches count what the ops spend, and README says what was measured."""

import json
import re

import pytest
import torch

from bench import report, work
from bench.cases import SCALES, Case, draw
from bench.measure import differentiate
from bench.results import Results
from bench.rivals import ours

CASES = {
    "kl": {},
    "kl, two teachers": {"T": 2},
    "kl, frozen head": {"frozen": True},
    "kl, forward": {"backward": False},
    "routed_kl": {"op": "routed_kl", "T": 2},
    "mutual_kl": {"op": "mutual_kl", "T": 2},
    "logprob": {"op": "logprob"},
    "logprob, logits kept": {"op": "logprob", "shrink": (8, 64)},
    "logprob, logits made again": {"op": "logprob", "shrink": (8, 64), "recompute": True},
    "logprob, forward": {"op": "logprob", "backward": False},
    "agreement": {"op": "agreement", "T": 2, "backward": False},
}


def flops(run) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        run()
    return sum(event.flops for event in profile.key_averages())


@pytest.mark.parametrize("name", CASES)
def test_counted_passes_are_those_the_op_and_its_roof_spend(name):
    fields = {"op": "kl", "model": "qwen3-8b", "N": 64, "dtype": torch.float32, "device": "cpu"}
    case = Case(**fields | {"shrink": SCALES["quick"].shrink} | CASES[name])
    inputs = draw(case)
    counted = work.passes_spent(case) * 2 * case.N * case.V * case.D
    assert flops(lambda: differentiate(ours(), inputs)) == pytest.approx(counted, rel=0.02)
    assert flops(work.roof(inputs)) == pytest.approx(counted, rel=0.02)


def test_a_row_measured_again_replaces_the_first_unless_all_start_afresh(tmp_path):
    row = {"op": "kl", "shrink": (8, 16), "entries": [{"name": "copd_kernels", "ms": [1.23456]}]}
    other = row | {"shrink": (1, 1)}
    for each in (row, other, row):
        Results(tmp_path).add(each)
    found = Results(tmp_path).data["rows"]
    assert [r["shrink"] for r in found] == [[8, 16], [1, 1]]
    assert found[0]["entries"][0]["ms"] == [1.235]
    fresh = Results(tmp_path, fresh=True)
    fresh.add(row)
    assert len(Results(tmp_path).data["rows"]) == 1


def test_readme_is_what_the_results_say():
    written = report.BLOCK.search(report.README.read_text())
    assert written[0] == report.block(report.load()), "run `python -m bench.report`"


@pytest.mark.parametrize("data", report.load(), ids=lambda data: data["name"])
def test_results_say_where_they_come_from_but_not_on_which_host(data):
    assert data["machine"]["torch"]
    assert data["machine"]["device"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]) for row in data["rows"])
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(data))
    for row in report.timed(data):
        assert report.entry(row, report.OURS)
        for found in row["entries"]:
            assert found["ms"] or found["why"], f"{row['op']}: {found['name']} has neither a time nor a reason"
    for name in ("scale", "accuracy"):
        assert (report.FOLDER / f"{data['name']}-{name}.png").exists()
