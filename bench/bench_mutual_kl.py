"""mutual_kl: K heads teach each other on the same tokens."""

import pytest

from bench.rivals import EAGER, FEW


@pytest.mark.parametrize(("K", "rivals"), [(2, FEW), (3, EAGER)], ids=["K2", "K3"])
def bench_mutual_kl(contest, K, rivals):
    contest("mutual_kl", rivals, T=K - 1)
