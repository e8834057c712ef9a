"""The CUDA rows without a GPU: the kernels' text on blocks and clusters made of CPU threads, beside the torch rows."""

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kernel_cases import DIVERGENCES, relative

from copd_kernels.rows import load
from copd_kernels.rows.raw import Raw

torch_rows = load("torch")
HERE = Path(__file__).parent
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ORDER = ("reverse", "forward", "symmetric", "jsd")
# (columns, clusters, bytes of shared memory a block): 0 clusters read from memory. Segments have 256 columns here.
READERS = {
    "memory, ragged": (1003, 0, 0),
    "memory, aligned": (1024, 0, 0),
    "one block": (700, 1, 30_000),
    "two blocks, a turning ring": (1504, 1, 14_000),
    "memory, rows with a gap": (1003, 0, 0),
    "two blocks, rows with a gap": (1503, 1, 14_000),
    "two clusters": (1504, 2, 14_000),
    "four blocks, the last with fewer segments": (2052, 1, 16_000),
}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("gpu") / "gpu.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-psabi", "-Wno-unknown-pragmas", "-pthread"]
    source = HERE / "gpu_on_threads.cpp"
    subprocess.run([compiler, *flags, f"-I{HERE.parents[1] / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(x):
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def rows_of(*shape, gap=0, dtype=torch.float32):
    """NaN, in the gap between rows too."""
    *rows, V = shape
    return torch.full((*rows, V + gap), torch.nan, dtype=dtype)[..., :V]


def logits(heads, R, V, dtype=torch.float32, gap=0):
    z = rows_of(heads, R, V, gap=gap, dtype=dtype).copy_(3 * torch.randn(heads, R, V))
    z[0, 1, 5] = 40  # a peaked row
    z[1:, -1] = z[0, -1] + 1e-3 * torch.randn(V, dtype=dtype)  # near agreement
    return z


def emulated_kl(gpu, z, teachers, divergence, reader, weight, cap, dlogits):
    H, R, V = z.shape
    _, clusters, shared = reader
    value = torch.full((len(teachers), R), torch.nan, dtype=z.dtype)
    run = gpu.kl_double if z.dtype == torch.float64 else gpu.kl_float
    run(
        address(z), H, ctypes.c_long(R), ctypes.c_long(V), ctypes.c_long(z.stride(1)), 0,
        (ctypes.c_int * len(teachers))(*teachers), len(teachers),
        ORDER.index(divergence), ctypes.c_double(0.3), address(weight), ctypes.c_double(cap or 0), address(dlogits),
        CODES[z.dtype if dlogits is None else dlogits.dtype], address(value), clusters, ctypes.c_long(shared),
    )  # fmt: skip
    return value


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_rows_match_the_torch_rows(gpu, divergence, reader):
    V, gap = READERS[reader][0], int("gap" in reader)
    z, teachers, weight = logits(3, 5, V, gap=gap), [2, 1], torch.rand(2, 5)
    weight[:, 2] = 0
    exact, wanted = z.double(), torch.empty(5, V, dtype=torch.float64)
    want = torch_rows.kl(exact, 0, teachers, divergence, 0.3, weight.double(), 50.0, wanted)
    single = torch.empty(5, V)
    torch_rows.kl(z, 0, teachers, divergence, 0.3, weight, 50.0, single)
    got = rows_of(5, V, gap=gap)
    value = emulated_kl(gpu, z, teachers, divergence, READERS[reader], weight, 50.0, got)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-6)
    assert relative(got, wanted) <= 2 * relative(single, wanted) + 2e-6
    # one row at a KL of 5e-7, where p - q has three digits to lose
    assert relative(got[-1], wanted[-1]) < 1e-3
    # values alone take the same way, and the gradient may overwrite the student's logits
    assert torch.equal(emulated_kl(gpu, z, teachers, divergence, READERS[reader], None, None, None), value)
    emulated_kl(gpu, z, teachers, divergence, READERS[reader], weight, 50.0, z[0])
    assert torch.equal(z[0], got)


@pytest.mark.parametrize("reader", ["memory, ragged", "two blocks, a turning ring"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_that_are_no_distribution_give_nan_and_rows_without_weight_nothing(gpu, divergence, reader):
    V = READERS[reader][0]
    z, weight = logits(2, 8, V), torch.rand(1, 8) + 0.1
    for side in (0, 1):
        z[side, 1 + 3 * side, 0] = torch.nan
        z[side, 2 + 3 * side, V - 1] = torch.inf
        z[side, 3 + 3 * side] = -torch.inf
    weight[0, [2, 4]] = 0
    g, wanted = torch.full((8, V), torch.nan), torch.empty(8, V)
    want = torch_rows.kl(z, 0, [1], divergence, 0.3, weight, 50.0, wanted)
    got = emulated_kl(gpu, z, [1], divergence, READERS[reader], weight, 50.0, g)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().sum() == 6
    assert g.isnan().all(1).tolist() == [False, True, False, True, False, True, True, False]
    assert (g[[2, 4]] == 0).all()
    assert g[[0, 7]].isfinite().all()


@pytest.mark.parametrize("reader", ["memory, ragged", "memory, aligned", "two blocks, a turning ring"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_come_in_sixteen_bits(gpu, dtype, reader):
    V = READERS[reader][0]
    z, weight = logits(2, 5, V), torch.rand(1, 5)
    wide, narrow = torch.empty(5, V), torch.empty(5, V, dtype=dtype)
    for out in (wide, narrow):
        emulated_kl(gpu, z, [1], "symmetric", READERS[reader], weight, None, out)
    assert torch.equal(wide.to(dtype), narrow)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_double_rows_match_the_torch_rows(gpu, divergence):
    z, weight = logits(2, 3, 301, torch.float64), torch.rand(1, 3, dtype=torch.float64)
    got, wanted = torch.empty(3, 301, dtype=torch.float64), torch.empty(3, 301, dtype=torch.float64)
    want = torch_rows.kl(z, 0, [1], divergence, 0.3, weight, None, wanted)
    value = emulated_kl(gpu, z, [1], divergence, (301, 0, 0), weight, None, got)
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-13)
    assert relative(got, wanted) < 1e-11


@pytest.mark.parametrize("reader", READERS)
def test_logprob_rows_match_the_torch_rows(gpu, reader):
    V, clusters, shared = READERS[reader]
    gap = int("gap" in reader)
    z, tokens = logits(1 + 1, 5, V, gap=gap)[:1], torch.randint(0, V, (5,))
    tokens[1] = 5
    upstream, side = torch.randn(3, 5), torch.full((3, 5), torch.nan)
    top = torch.full((5,), -7)

    def run(dlogits):
        pointers = [(ctypes.c_void_p * 3)(*(x.data_ptr() for x in numbers)) for numbers in (side, upstream)]
        gpu.logprob_float(
            address(z), ctypes.c_long(5), ctypes.c_long(V), ctypes.c_long(z.stride(1)),
            pointers[0], address(top), address(tokens), pointers[1],
            ctypes.c_double(50.0), address(dlogits), 0, clusters, ctypes.c_long(shared // 3),
        )  # fmt: skip

    run(None)
    exact = torch_rows.logprob(z.double())
    torch.testing.assert_close(side.double(), torch.stack([exact.max, exact.tail, exact.moment]), rtol=1e-5, atol=1e-6)
    assert torch.equal(top, exact.top)
    g, wanted = rows_of(5, V, gap=gap), torch.empty(5, V, dtype=torch.float64)
    torch_rows.logprob_grad(z.double(), exact, tokens, *upstream.double(), 50.0, wanted)
    run(g)
    assert relative(g, wanted) < 1e-5


@contextmanager
def lacking(gpu, V, heads, R, which):
    """The logits of those heads lack a bias, a softcap (but one head's, which has none) and a temperature a token."""
    bias, temperature = torch.randn(heads, V), torch.rand(R) + 0.5
    caps = [30.0, 0.0, 20.0][:heads]
    kept = (ctypes.c_int * len(which))(*which), (ctypes.c_double * heads)(*caps)
    gpu.set_raw_logits(kept[0], len(which), address(bias), ctypes.c_long(V), kept[1], address(temperature))
    yield Raw(V, bias, caps, temperature, set(which))
    gpu.set_raw_logits(None, 0, None, ctypes.c_long(0), None, None)


def test_a_pass_completes_every_logit(gpu):
    z = rows_of(5, 1003, gap=1).copy_(20 * torch.randn(5, 1003))
    want = z.double()
    with lacking(gpu, 1003, 1, 5, [0]) as raw:
        raw.complete(want.unsqueeze(0), torch_rows.complete)
        gpu.complete_float(address(z), ctypes.c_long(5), ctypes.c_long(1003), ctypes.c_long(z.stride(0)))
    torch.testing.assert_close(z.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reader", READERS)
def test_raw_logits_are_completed_where_they_are_read_first(gpu, reader):
    V, gap = READERS[reader][0], int("gap" in reader)
    z, teachers, weight = logits(3, 5, V, gap=gap), [2, 1], torch.rand(2, 5)
    complete, wanted = z.clone(), torch.empty(5, V)
    with lacking(gpu, V, 3, 5, [0, 1, 2]) as raw:
        raw.complete(complete, torch_rows.complete)
        got = rows_of(5, V, gap=gap)
        value = emulated_kl(gpu, z, teachers, "jsd", READERS[reader], weight, 50.0, got)
    want = torch_rows.kl(complete, 0, teachers, "jsd", 0.3, weight, 50.0, wanted)
    torch.testing.assert_close(z, complete, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reader", ["memory, ragged", "two clusters"])
def test_raw_logits_have_log_probabilities_and_gradients(gpu, reader):
    V, clusters, shared = READERS[reader]
    z, tokens, upstream = logits(2, 5, V)[:1], torch.randint(0, V, (5,)), torch.randn(3, 5)
    side, top, made_again, complete = torch.empty(3, 5), torch.empty(5, dtype=torch.int64), z.clone(), z.clone()
    pointers = [(ctypes.c_void_p * 3)(*(x.data_ptr() for x in numbers)) for numbers in (side, upstream)]
    got, wanted = torch.empty(5, V), torch.empty(5, V)
    with lacking(gpu, V, 1, 5, [0]) as raw:
        raw.complete(complete, torch_rows.complete)
        for rows, out in ((z, None), (made_again, got)):
            gpu.logprob_float(
                address(rows), ctypes.c_long(5), ctypes.c_long(V), ctypes.c_long(V), pointers[0], address(top),
                address(tokens), pointers[1], ctypes.c_double(50.0), address(out), 0, clusters,
                ctypes.c_long(shared // 3),
            )  # fmt: skip
    torch.testing.assert_close(z, complete, rtol=1e-5, atol=1e-5)
    want = torch_rows.logprob(complete, tokens)
    torch.testing.assert_close(side, torch.stack([want.max, want.tail, want.moment]), rtol=1e-4, atol=1e-5)
    torch_rows.logprob_grad(complete, want, tokens, *upstream, 50.0, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_rows_of_real_vocabularies_fit_a_cluster(gpu):
    """In an H200's 227 KiB of shared memory a block, less 6 KiB of the kernel's own, by segments of 512 threads."""

    def blocks(V, heads):
        return gpu.cluster_blocks(ctypes.c_long(V), heads, ctypes.c_long(221 << 10), 4 * 512)

    assert [blocks(V, 2) for V in (128_256, 151_936, 262_144)] == [8, 8, 16]
    assert [blocks(V, 3) for V in (128_256, 151_936)] == [16, 16]
    assert [blocks(V, 5) for V in (128_256, 151_936)] == [16, 16]
    assert blocks(262_144, 5) == 0
