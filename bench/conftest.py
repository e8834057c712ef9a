"""`pytest bench` measures this machine; `--benchmark-disable` only shows, on tiny heads, that everything still runs.

--results DIR keeps the rows in DIR/<device>.json, from which `python -m bench.report` makes every table and plot.
"""

from __future__ import annotations

import os
from pathlib import Path

# a thread that spins while another process has its partner's core loses milliseconds at every barrier
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from bench import measure, report
from bench.cases import SCALES, Case, Scale
from bench.results import Results, machine
from bench.rivals import Contender
from copd_kernels.rows import resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, metavar="DIR", help="write DIR/<device>.json")
    parser.addoption("--fresh", action="store_true", help="drop the rows that DIR/<device>.json has")
    parser.addoption("--whole", action="store_true", help="bench_loop at 30 M parameters and 128 long completions")


def pytest_configure(config):
    folder = None if config.option.benchmark_disable else config.getoption("--results")
    config.bench_rows = []
    if config.option.benchmark_disable:
        # threads that wait for each other cost more than tiny heads do
        torch.set_num_threads(1)
    config.bench_results = Results(folder, config.option.fresh) if folder else None


def pytest_report_header(config):
    known = ", ".join(f"{name} {value}" for name, value in machine().items() if value)
    return f"bench: {known}; backend {resolve('bench', None, torch.device(DEVICE))}"


def pytest_terminal_summary(terminalreporter, config):
    if config.bench_rows and not config.option.benchmark_disable:
        terminalreporter.write_line("")
        terminalreporter.write_line(report.table(config.bench_rows))


def scale_of(config) -> Scale:
    return SCALES["quick" if config.option.benchmark_disable else DEVICE]


def pytest_generate_tests(metafunc):
    if "sweep_N" in metafunc.fixturenames:
        metafunc.parametrize("sweep_N", scale_of(metafunc.config).sweep)


@pytest.fixture
def scale(request) -> Scale:
    return scale_of(request.config)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture
def record(request):
    """Keeps a row for the table and, where asked, for the JSON."""

    def keep(row: dict) -> None:
        request.config.bench_rows.append(row)
        if request.config.bench_results:
            request.config.bench_results.add(row)

    return keep


@pytest.fixture
def contest(benchmark, scale, record):
    """contest(op, rivals, **fields of Case): one row, at this machine's scale."""

    def run(op: str, rivals: dict[str, Contender], *, backends=(), rounds: int = scale.rounds, **fields) -> dict:
        shape = {"model": "qwen3-8b", "N": scale.N, "dtype": scale.dtype, "device": DEVICE, "shrink": scale.shrink}
        case = Case(op, **shape | fields)
        with measure.products(case):
            row = measure.contest(benchmark, case, rivals, rounds, backends)
        record(row)
        return row

    return run
