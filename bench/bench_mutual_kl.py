"""mutual_kl: K heads teach each other on the same tokens."""

import pytest

from bench.rivals import FEW


@pytest.mark.parametrize("K", [2, 3])
def bench_mutual_kl(contest, K):
    contest("mutual_kl", FEW, T=K - 1)
