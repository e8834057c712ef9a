"""What a chunk launches beside its GEMMs."""

import pytest

from bench import launches

pytest.importorskip("triton")
native = pytest.importorskip("copd_kernels._C")


@pytest.mark.parametrize("backend", launches.BACKENDS)
def test_a_chunk_is_counted_once(backend):
    """As many GEMMs as it spends: T + 3 of `kl`, 4 of `logprob` whose logits are made again, 3 K of `mutual_kl`."""
    cases = launches.cases(backend)
    names = ["kl, T = 4, jsd", "kl, routed, jsd", "logprob", "mutual_kl, K = 3, jsd"]
    assert [cases[name]().gemms for name in names] == [7, 4, 4, 9]
