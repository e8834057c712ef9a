"""Time and memory over N: the peak is one workspace and the gradients, from a thousand tokens to a million."""

from bench.rivals import FEW
from copd_kernels.schedule import MIB, WORKSPACE_BYTES

# beyond the workspace: per-token results, a tile of widened weights, what libraries keep
SLACK_MIB = 64


def assert_one_workspace(row: dict) -> None:
    peak = row["entries"][0]["peak_mib"]
    allowed = WORKSPACE_BYTES[row["device"]] / MIB + row["outputs_mib"] + SLACK_MIB
    assert peak is None or peak <= allowed, f"{peak:.0f} MiB at N={row['N']}, allowed {allowed:.0f}"


def bench_over_N(contest, scale, sweep_N):
    rounds = (scale.rounds + 1) // 2
    row = contest("kl", FEW, rounds=rounds, model="qwen3-vl-4b", shrink=scale.sweep_shrink, N=sweep_N)
    assert_one_workspace(row)


def bench_alone(contest, scale):
    row = contest("kl", {}, rounds=1, model="qwen3-vl-4b", shrink=scale.sweep_shrink, N=scale.alone)
    assert_one_workspace(row)
