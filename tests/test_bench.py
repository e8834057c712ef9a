"""The benches count what the ops spend, and README says what was measured."""

import json
import re

import pytest
import torch

from bench import counts, report, sass, work
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


MACHINE_CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FSETP.GT.AND P0, PT, R4, R0, PT ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   SHFL.BFLY PT, R0, R4, 0x10, 0x1f ;
        /*0080*/                   FADD R0, R0, R4 ;
        /*0090*/                   MUFU.EX2 R5, R4 ;
.L_x_2:
        /*00a0*/                   IADD3 R2, R2, 0x10, RZ ;
        /*00b0*/               @P1 BRA `(.L_x_0) ;
        /*00c0*/                   EXIT ;
"""


def test_a_loop_is_counted_on_the_way_that_ordinary_rows_take():
    flow = sass.Flow(sass.read(MACHINE_CODE))
    (loop,) = flow.sweeps()
    ((read, cost),) = flow.ways(loop, 1024).items()
    assert read == 16
    found = dict(zip(sass.FIGURES, cost.counts, strict=True))
    # a load, a comparison, an exponential, an addition and three branches
    assert found == dict.fromkeys(found, 0) | {
        "instructions": 7,
        "alu": 2,
        "special": 1,
        "global": 1,
        "global_bytes": 16,
    }


def test_predictions_follow_from_the_counts():
    pytest.importorskip("triton")
    pytest.importorskip("copd_kernels._C")
    text = counts.FILE.read_text()
    assert text.endswith(counts.consequences(text)), "run `python -m bench.counts`"


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
