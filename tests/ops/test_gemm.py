"""GEMMs of 16-bit operands into fp32 on a CPU with AMX, against float64; and what happens without it."""

import pytest
import torch
from kernel_cases import DIVERGENCES, cast, gradients, make, relative

from copd_kernels import gemm, kl, logprob, mutual_kl
from copd_kernels.reference import accumulator

needs_amx = pytest.mark.skipif(not gemm.available(), reason="needs AMX, and csrc/ built for it")
HALVES = [torch.bfloat16, torch.float16]
# one number; less than a tile; ragged in every dimension; several blocks down, across and along K
SHAPES = [(1, 1, 1), (5, 7, 3), (33, 65, 70), (100, 1100, 600), (1040, 40, 1000)]


def matrix(rows, columns, dtype, along):
    """Numbers side by side along dimension `along`, a gap of NaN between its lines."""
    lines, length = (rows, columns) if along else (columns, rows)
    held = torch.full((lines, length + 5), torch.nan, dtype=dtype)
    held[:, :length] = torch.randn(lines, length)
    held = held[:, :length]
    return held if along else held.T


def product(a, b, alpha=1.0, onto=0.0):
    return onto + alpha * (a.double() @ b.double())


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("types", [(a, b) for a in (*HALVES, torch.float32) for b in HALVES], ids=str)
def test_the_product_is_that_of_widened_operands(types, shape):
    M, N, K = shape
    for left, right, accumulate in [(1, 1, False), (1, 0, True), (0, 1, True), (0, 0, False)]:
        a, b = matrix(M, K, types[0], left), matrix(K, N, types[1], right)
        held = torch.randn(M, N + 3)
        around, out = held[:, N:].clone(), held[:, :N]
        onto = out.double() if accumulate else torch.zeros(M, N)
        want, size = product(a, b, 0.7, onto), product(a.abs(), b.abs(), 0.7, onto.abs())
        torch_error = torch.addmm(out, a.float(), b.float(), alpha=0.7, beta=int(accumulate)) - want
        gemm.addmm(out, a, b, 0.7, accumulate)
        # of fp32 operands 16 bits are read
        floor = 2**-16 if types[0] == torch.float32 else 1e-6
        assert (out - want).norm() <= 2 * torch_error.norm() + floor * size.norm()
        assert torch.equal(held[:, N:], around)


@needs_amx
def test_fp32_operands_are_rounded_to_bf16_where_torch_is_told_to():
    a, b, out = torch.randn(64, 300), torch.randn(300, 64).bfloat16(), torch.empty(64, 64)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    gemm.addmm(out, a, b, 1.0, False)
    matmul.fp32_precision = before
    assert relative(out, product(a.bfloat16(), b)) <= 2e-6


@needs_amx
def test_nothing_times_nothing_is_zero_and_onto_is_as_before():
    empty, out = torch.empty(0, dtype=torch.bfloat16), torch.ones(3, 4)
    gemm.addmm(out, empty.view(3, 0), empty.view(0, 4), 1.0, True)
    assert torch.equal(out, torch.ones(3, 4))
    gemm.addmm(out, empty.view(3, 0), empty.view(0, 4), 1.0, False)
    assert torch.equal(out, torch.zeros(3, 4))
    gemm.addmm(out[:0], empty.view(0, 2), torch.ones(2, 4, dtype=torch.bfloat16), 1.0, False)


@needs_amx
def test_operands_may_lie_anywhere_and_be_repeated():
    a, b, out = torch.randn(40, 200).bfloat16()[::2, ::2], torch.randn(1, 50).bfloat16(), torch.empty(20, 50)
    for right in (b.expand(100, 50), b.expand(100, 50).contiguous().as_strided((100, 50), (0, 1))):
        gemm.addmm(out, a, right, 1.0, False)
        assert relative(out, product(a, right)) <= 2e-6


@needs_amx
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("along", [0, 1])
def test_a_nan_reaches_its_own_row_and_an_infinite_number_stays_infinite(along, dtype):
    a, b, out = matrix(40, 70, dtype, along), matrix(70, 50, torch.bfloat16, along), torch.empty(40, 50)
    a[3, 69], a[38, 2], b[5, 49] = torch.nan, -torch.inf, torch.nan
    gemm.addmm(out, a, b, 1.0, False)
    want = product(a, b).float()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[38, :49], want[38, :49])
    assert torch.equal(out[38].isinf().nonzero(), torch.arange(49)[:, None])


@needs_amx
@pytest.mark.parametrize("shape", [(1040, 40, 1000), (50, 1100, 70)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    M, N, K = shape
    a, b = torch.randn(M, K), torch.randn(K, N).bfloat16()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.empty(M, N))
        gemm.addmm(results[-1], a, b, 1.0, False)
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_amx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": 0}, "operands must not be null"),
        ({"a_strides": (8, 2)}, "one of an operand's strides must be 1"),
        ({"b_type": "float64"}, "operands must be float32, float16 or bfloat16"),
        ({"out_stride": 3}, "its rows at least N apart"),
        ({"parts": 3}, "parts must be 1 or 2"),
        ({"K": -1}, "sizes must not be negative"),
    ],
)
def test_what_would_leave_memory_is_refused(change, message):
    from copd_kernels import _C

    out = torch.zeros(4, 4)
    address, operand = out.data_ptr(), torch.ones(4, 4, dtype=torch.bfloat16).data_ptr()
    good = {"M": 4, "N": 4, "K": 4, "a": operand, "a_type": "bfloat16", "a_strides": (4, 1), "b": operand}
    good |= {"b_type": "bfloat16", "b_strides": (4, 1), "out": address, "out_stride": 4, "alpha": 1.0}
    with pytest.raises(ValueError, match=message):
        _C.gemm(**(good | {"accumulate": False, "parts": 2, "threads": 1} | change))


def results(op, heads):
    if op == "logprob":
        value = logprob(heads[0], torch.arange(len(heads[0].hidden)) % heads[0].V, recompute=True).logp.sum()
    else:
        value = mutual_kl(heads).loss if op == "mutual_kl" else kl(heads[0], heads[1:], divergence=op)
    return value, gradients(value, heads[0])


@needs_amx
@pytest.mark.parametrize("op", [*DIVERGENCES, "logprob", "mutual_kl"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_losses_and_gradients_are_as_good_as_those_of_widened_operands(dtype, op, monkeypatch):
    student = make(70, 48, 3000, dtype, bias=None)
    heads = [student, make(70, 48, 3000, dtype, like=student, noise=0.05)]
    value, got = results(op, heads)
    exact, want = results(op, [cast(head, torch.float64) for head in heads])
    called = []
    monkeypatch.setattr(gemm, "available", lambda: called.append(1))
    other, widened = results(op, heads)
    assert called  # and so the two differ in their GEMMs
    assert value.dtype == accumulator(dtype)
    assert abs(value - exact) <= 2 * abs(other - exact) + 1e-5 * abs(exact)
    for name, g in got.items():
        assert relative(g, want[name]) <= 1.2 * relative(widened[name], want[name])
