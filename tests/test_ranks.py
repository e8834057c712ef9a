"""Ranks answer in order, and one that raises or hangs fails its own call and no other."""

import time

import pytest
import torch
import torch.distributed as dist


def total(x):
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return x.item(), dist.get_rank(), dist.get_world_size()


def part(how):
    """Rank 1 leaves the others waiting for it."""
    if dist.get_rank() == 1:
        how()
    dist.barrier()


def fail():
    raise ValueError("of this rank alone")


def hang():
    time.sleep(600)


def test_every_rank_runs_the_function_in_a_group_of_its_own(ranks):
    assert ranks(2, total, torch.ones(1)) == [(3, 0, 2), (3, 1, 2)]
    assert ranks(3, total, torch.ones(1)) == [(6, rank, 3) for rank in range(3)]
    assert ranks(2, total, torch.zeros(1)) == [(1, 0, 2), (1, 1, 2)]


@pytest.mark.parametrize(("how", "told"), [(fail, "ValueError: of this rank alone"), (hang, "in hang")])
def test_a_rank_that_fails_or_hangs_is_told_of_and_replaced(ranks, how, told):
    with pytest.raises(AssertionError, match=f"(?s)^part failed\n.*rank 1 of 2: .*{told}"):
        ranks(2, part, how, seconds=3 if how is hang else 60)
    assert ranks(2, total, torch.zeros(1)) == [(1, 0, 2), (1, 1, 2)]
