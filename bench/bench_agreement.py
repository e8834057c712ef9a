"""agreement: top-k overlap and both KLs, no gradient; libraries have no such op."""

import pytest

from bench.rivals import EAGER


@pytest.mark.parametrize("T", [1, 2])
def bench_agreement(contest, T):
    contest("agreement", EAGER, T=T, backward=False)
