"""What a chunk launches beside its GEMMs."""

import pytest

from bench import launches

pytest.importorskip("triton")
native = pytest.importorskip("copd_kernels._C")

# bias, softcap and a temperature a token are in sweeps that are made anyway; the gradient of the student's bias is two
BESIDE_GEMMS = {
    "kl, T = 1, reverse": {"triton": 4, "native": 2},
    "kl, T = 4, symmetric": {"triton": 4, "native": 2},
    "kl, T = 4, jsd": {"triton": 6, "native": 2},
    "kl, routed, jsd": {"triton": 6, "native": 2},
    "kl, a temperature a token, forward": {"triton": 4, "native": 2},
    "kl, T = 4, forward, softcap": {"triton": 4, "native": 2},
    "kl, T = 1, reverse, bias, softcap": {"triton": 6, "native": 4},
    "mutual_kl, K = 3, symmetric": {"triton": 3 * 4, "native": 3 * 2},
    "mutual_kl, K = 3, jsd": {"triton": 3 * 6, "native": 3 * 2},
    "mutual_kl, K = 3, reverse, softcap": {"triton": 3 * 4, "native": 3 * 2},
    "kl, a temperature a token, jsd, bias, softcap": {"triton": 8, "native": 4},
    "logprob": {"triton": 4, "native": 4},
    "logprob, bias, softcap": {"triton": 6, "native": 6},
}


@pytest.mark.parametrize("backend", launches.BACKENDS)
def test_a_chunk_is_counted_once(backend):
    """As many GEMMs as it spends: T + 3 of `kl`, 4 of `logprob` whose logits are made again, 3 K of `mutual_kl`."""
    cases = launches.cases(backend)
    names = ["kl, T = 4, jsd", "kl, routed, jsd", "logprob", "mutual_kl, K = 3, jsd"]
    assert [cases[name]().gemms for name in names] == [7, 4, 4, 9]


@pytest.mark.parametrize("backend", launches.BACKENDS)
@pytest.mark.parametrize("name", BESIDE_GEMMS)
def test_a_chunk_launches_a_few_kernels_and_takes_no_memory(name, backend):
    found = launches.cases(backend)[name]()
    assert found.kernels.total() == BESIDE_GEMMS[name][backend], found.kernels
    assert found.allocations == 0
