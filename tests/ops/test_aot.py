"""Every Triton kernel compiled for its GPUs at its real tile sizes, without a GPU and without a spilled byte."""

import os
import re
import subprocess
import sys

import pytest

from bench import counts
from bench.compiled import compile_all, cuobjdump

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_triton_kernel_compiles_without_spills(arch, tmp_path):
    compile_all(arch, tmp_path)
    cubins = sorted(tmp_path.glob("*.cubin"))
    assert len({c.name.split("-")[0] for c in cubins}) == 10
    for cubin in cubins:
        report = subprocess.run([cuobjdump(), "--dump-resource-usage", cubin], check=True, capture_output=True)
        usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout.decode())
        registers, stack, local = map(int, usage.groups())
        assert (stack, local) == (0, 0), f"{cubin.stem}: {registers} registers, {stack + local} bytes spilled"
        ptx = cubin.with_suffix(".ptx").read_text()
        # many teachers leave a thread registers for one or two columns
        narrow = "T12" in cubin.name or ("sums" in cubin.name and "T1-" not in cubin.name + "-")
        if not narrow and not any(kind in cubin.name for kind in ("overlap", "finish", "-unit", "-fp64")):
            assert re.search(r"ld\.global[.\w:]*\.v4\.b32", ptx), cubin.stem
        # min and max drop a NaN, and saturation hides an infinity; the JSD clamps a log-ratio that is no NaN any more
        if "_grad_" in cubin.name and any(kind in cubin.name for kind in ("logprob", "REVERSE", "FORWARD")):
            assert not re.search(r"\b(min|max)\.(?!NaN)f|\.sat", ptx), cubin.stem


def test_the_committed_counts_are_those_of_the_machine_code(tmp_path):
    if f"Triton\n{triton.__version__} " not in counts.FILE.read_text():
        pytest.skip(f"the counts are of another Triton's code, this is {triton.__version__}")
    compile_all(90, tmp_path)  # which Triton keeps from the test above
    committed = [row for row in counts.committed(90) if row.rows == "Triton"]
    assert counts.of_triton(tmp_path) == committed, "run `python -m bench.counts`"


def test_numbers_that_vary_do_not_compile_again():
    script = """
from bench.compiled import VARY
from copd_kernels.rows import triton as rows
for name, kernel in vars(rows).items():
    if name.endswith("_kernel"):
        vary = {p.name for p in kernel.params if p.do_not_specialize}
        assert vary == {*VARY, "heads"} & set(kernel.arg_names), (name, vary)
        # parts of what is kept of all tokens, which start anywhere
        anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
        assert {"weight_ptr", "value_ptr", "token_ptr", "dlogp_ptr"} & set(kernel.arg_names) <= anywhere, name
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
