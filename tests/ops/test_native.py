"""The compiled rows: every instruction set, under sanitizers, what the build promises, and every message."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import DIVERGENCES, make, relative

from bench import counts
from copd_kernels import kl, rows
from copd_kernels.rows import BACKENDS, missing

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL_TESTS = ["test_kl.py", "test_logprob.py", "test_mutual_kl.py", "test_agreement.py", "test_special_rows.py"]
built = importlib.util.find_spec("copd_kernels._C") is not None
needs_build = pytest.mark.skipif(not built, reason="csrc/ is not built")


def run_kernel_tests(where, select, environment, files=KERNEL_TESTS):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select]
    done = subprocess.run(
        [*command, *(f"tests/ops/{name}" for name in files)],
        cwd=where,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert " passed" in done.stdout


def cpu_has(isa):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"plain": True, "avx2": " avx2 " in flags, "avx512": " avx512vl " in flags}[isa]


@needs_build
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_passes_the_kernel_tests(isa):
    if not cpu_has(isa):
        pytest.skip(f"this processor has no {isa}")
    run_kernel_tests(ROOT, "native and cpu", {"COPD_ISA": isa, "OMP_NUM_THREADS": "1"})


def test_the_cpu_rows_are_clean_under_sanitizers(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None or not shutil.which("ninja"):
        pytest.skip("needs g++, pybind11 and ninja")
    for name in ("copd_kernels", "csrc", "tests", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = {"COPD_SANITIZE": "1", "COPD_CUDA": "0", "CXX": compiler}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | build, check=True, capture_output=True)
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    select = "test_gemm or native and cpu and (reference or agreement or infinite or no_token or no_distribution)"
    run_kernel_tests(tmp_path, select, preload, ["test_gemm.py", *KERNEL_TESTS])


# 16-bit rows at odd multiples of 8 bytes; one segment a block; a ring that turns; fp32 that a bulk copy cannot read;
# a real vocabulary
WIDTHS = {"half-aligned": 4100, "small": 8192, "uneven": 20_008, "misaligned": 20_011, "real": 151_936}


@pytest.mark.gpu
@needs_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("width", WIDTHS)
def test_cuda_rows_match_the_torch_rows(width, divergence, T, dtype):
    R, V, teachers = 5, WIDTHS[width], list(range(1, T + 1))
    z = 3 * torch.randn(T + 1, R, V, device="cuda")
    z[1:, -1] = z[0, -1] + 0.1 * torch.randn(V, device="cuda")
    weight = torch.rand(T, R, device="cuda")
    got, wanted = torch.empty(R, V, device="cuda", dtype=dtype), torch.empty_like(z[0], dtype=torch.float64)
    arguments = (0, teachers, divergence, 0.3)
    want = rows.load("torch").kl(z.double(), *arguments, weight.double(), 50.0, wanted)
    value = rows.load("native").kl(z, *arguments, weight, 50.0, got)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-6)
    assert relative(got, wanted) < {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2e-3}[dtype]
    again = torch.empty_like(got)
    assert torch.equal(rows.load("native").kl(z, *arguments, weight, 50.0, again), value)
    assert torch.equal(again, got)
    assert torch.equal(rows.load("native").kl(z, *arguments), value)


@pytest.mark.gpu
@needs_build
@pytest.mark.parametrize("width", WIDTHS)
def test_cuda_rows_of_logprob_match_the_torch_rows(width):
    R, V = 5, WIDTHS[width]
    z, tokens, upstream = 3 * torch.randn(1, R, V), torch.randint(0, V, (R,)), torch.randn(3, R)
    z, tokens, upstream = z.cuda(), tokens.cuda(), upstream.cuda()
    side, exact = rows.load("native").logprob(z), rows.load("torch").logprob(z.double())
    for got, want in zip(side, exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-6)
    got, wanted = torch.empty_like(z[0]), torch.empty_like(z[0], dtype=torch.float64)
    rows.load("torch").logprob_grad(z.double(), exact, tokens, *upstream.double(), None, wanted)
    rows.load("native").logprob_grad(z, side, tokens, *upstream, None, got)
    assert relative(got, wanted) < 1e-5


@needs_build
def test_rows_reject_what_would_leave_memory():
    from copd_kernels import _C

    z, value = torch.zeros(2, 3, 5), torch.zeros(1, 3)
    address, out = z.data_ptr(), value.data_ptr()
    with pytest.raises(ValueError, match="teachers must be among the heads"):
        _C.kl(address, "float32", 2, 3, 5, 0, [2], 0, 0.5, 0, 0.0, 0, "float32", out, False, 1)
    with pytest.raises(ValueError, match="value must not be null"):
        _C.kl(address, "float32", 2, 3, 5, 0, [1], 0, 0.5, 0, 0.0, 0, "float32", 0, False, 1)
    with pytest.raises(ValueError, match="logits must be float32 or float64"):
        _C.kl(address, "float16", 2, 3, 5, 0, [1], 0, 0.5, 0, 0.0, 0, "float16", out, False, 1)
    with pytest.raises(ValueError, match="dlogits must have the logits' type"):
        _C.kl(address, "float32", 2, 3, 5, 0, [1], 0, 0.5, out, 0.0, address, "float64", out, False, 1)
    tokens, top, zeros = torch.tensor([0, 5, 1]), torch.tensor([0, -2, 1]), torch.zeros(3, dtype=torch.int64)
    gradient = (0.0, address, "float32", False, 1)
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.V-1"):
        _C.logprob(address, "float32", 3, 5, [out] * 3, tokens.data_ptr(), tokens.data_ptr(), [out] * 3, *gradient)
    with pytest.raises(ValueError, match=r"top must be in -1\.\.V-1"):
        _C.logprob(address, "float32", 3, 5, [out] * 3, top.data_ptr(), zeros.data_ptr(), [out] * 3, *gradient)
    with pytest.raises(ValueError, match="statistics must not be null"):
        _C.logprob(address, "float32", 3, 5, [out, 0, out], top.data_ptr(), 0, [], 0.0, 0, "float32", False, 1)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.V"):
        _C.agreement(address, "float32", 2, 3, 5, 0, [1], 6, out, out, out, 1)
    with pytest.raises(ValueError, match="results must not be null"):
        _C.agreement(address, "float32", 2, 3, 5, 0, [1], 2, out, 0, out, 1)


def test_the_default_falls_back_without_the_compiled_rows(monkeypatch):
    monkeypatch.delenv("COPD_BACKEND", raising=False)
    monkeypatch.setattr(rows, "native_failure", lambda: "csrc/ is built not at all; run `pip install -e .`")
    student, teacher = make(3, 4, 10), make(3, 4, 10)
    assert rows.resolve("kl", None, torch.device("cpu")) == "torch"
    assert torch.isfinite(kl(student, teacher))
    with pytest.raises(RuntimeError, match=r"kl: backend 'native' is not available here: .*run `pip install -e \.`"):
        kl(student, teacher, backend="native")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "not at all"),
        ("_C.cpython-39-x86_64-linux-gnu.so", "only for another Python"),
        ("_C.py", "does not load"),
    ],
)
def test_what_is_wrong_with_a_build_is_said(tmp_path, module, reason):
    shutil.copytree(ROOT / "copd_kernels", tmp_path / "copd_kernels", ignore=shutil.ignore_patterns("*.so"))
    if module:
        (tmp_path / "copd_kernels" / module).write_text("raise ImportError('undefined symbol')")
    # an editable install would find the repository's own library
    script = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, copd_kernels.rows as r
print(r.missing("native", torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert reason in done.stdout
    assert "pip install -e ." in done.stdout


@needs_build
@pytest.mark.parametrize(
    ("capability", "reason"), [((8, 6), None), ((9, 0), None), ((10, 0), None), ((7, 5), "sm_75"), ((12, 0), "sm_120")]
)
def test_a_gpu_the_library_has_no_code_for_is_named(monkeypatch, capability, reason):
    from copd_kernels import _C

    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "cuda_versions", lambda: (13000, 13000))
    monkeypatch.setattr(rows, "get_device_capability", lambda device: capability)
    found = missing("native", torch.device("cuda"))
    assert found is None if reason is None else reason in found
    monkeypatch.setattr(_C, "has_cuda", False)
    assert "COPD_CUDA=1 pip install -e ." in missing("native", torch.device("cuda"))


@needs_build
@pytest.mark.parametrize(
    ("driver", "reason"), [(13000, None), (13020, None), (14000, None), (12080, "CUDA 13.1, .* up to CUDA 12.8;")]
)
def test_a_driver_older_than_the_runtime_linked_in_is_named(monkeypatch, driver, reason):
    from copd_kernels import _C

    monkeypatch.setattr(_C, "has_cuda", True)
    monkeypatch.setattr(_C, "cuda_versions", lambda: (13010, driver))
    monkeypatch.setattr(rows, "get_device_capability", lambda device: (9, 0))
    found = missing("native", torch.device("cuda"))
    assert found is None if reason is None else re.search(reason, found)


@needs_build
def test_the_library_knows_the_runtime_it_was_linked_with():
    from copd_kernels import _C

    built, driver = _C.cuda_versions()
    assert (built >= 12000) == _C.has_cuda
    assert driver >= 0


def test_the_module_prints_what_this_machine_has():
    done = subprocess.run([sys.executable, "-m", "copd_kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    for backend in BACKENDS:
        assert f"  {backend:8}" in done.stdout
    assert done.stdout.count(", the default") >= 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"COPD_CUDA": "yes"}, "COPD_CUDA must be 0, 1 or auto; got 'yes'"),
        ({"COPD_CUDA": "1", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"}, "COPD_CUDA=1 needs nvcc"),
        ({"COPD_CUDA": "auto", "PATH": "/nowhere", "CXX": "", "CUDA_HOME": ""}, "no C++ compiler found"),
    ],
)
def test_the_build_says_what_it_misses(tmp_path, environment, message):
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert message in done.stderr
    assert (done.returncode == 0) == (environment["COPD_CUDA"] == "auto")


@needs_build
def test_the_committed_table_of_resources_is_that_of_the_build():
    spec = importlib.util.spec_from_file_location("resources", ROOT / "csrc" / "resources.py")
    resources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(resources)
    from copd_kernels import _C

    if not (_C.has_cuda and resources.cuobjdump() and shutil.which("nvcc")):
        pytest.skip("needs the CUDA part, nvcc and cuobjdump")
    committed = (ROOT / "csrc" / "RESOURCES.md").read_text()
    version = resources.cuda_version()
    table = resources.usage(resources.library())
    assert {architecture for row in table.values() for architecture in row} == {"sm_80", "sm_90a", "sm_100"}
    if f"CUDA {version} built" not in committed:
        pytest.skip(f"the table is another compiler's, this is CUDA {version}")
    assert resources.markdown(table, version) == committed


@needs_build
def test_the_committed_counts_are_those_of_the_build():
    pytest.importorskip("triton")  # which carries the disassembler
    from copd_kernels import _C

    if not (_C.has_cuda and shutil.which("nvcc")):
        pytest.skip("needs the CUDA part and nvcc")
    version = counts.cuda_version()
    if f"CUDA {version}." not in counts.FILE.read_text():
        pytest.skip(f"the counts are of another compiler's code, this is CUDA {version}")
    committed = [row for row in counts.committed(90) if row.rows != "Triton"]
    assert counts.of_cuda(Path(_C.__file__)) == committed, "run `python -m bench.counts`"
