"""The likeliest words, against their definition."""

import pytest
import torch
from kernel_cases import SMALL_WORKSPACE, make

from copd_kernels import Head, agreement, reference
from copd_kernels.top import top_k


def words(ids, V):
    """(..., V) bool of (..., k) ids."""
    return torch.zeros(*ids.shape[:-1], V, dtype=torch.bool).scatter_(-1, ids, True)


@pytest.mark.parametrize("kind", [{}, {"softcap": 7.0}])
def test_the_words_are_those_of_the_definition(kind):
    head = make(37, 8, 211, **kind)
    ids = top_k(head, 10, workspace_bytes=SMALL_WORKSPACE)
    assert torch.equal(words(ids, 211), reference.top_k(reference.logits(head), 10))


def test_among_equal_logits_the_lowest_ids():
    head = Head(torch.ones(9, 1), torch.randint(0, 4, (40, 1)).float())
    assert torch.equal(words(top_k(head, 17), 40), reference.top_k(reference.logits(head), 17))


def test_what_two_heads_share_is_their_agreement():
    student, teacher = make(12, 8, 50), make(12, 8, 50)
    common = words(top_k(student, 10), 50) & words(top_k(teacher, 10), 50)
    assert torch.equal(common.sum(-1) / 10, agreement(student, teacher).overlap[0])


def test_shapes_are_kept_and_a_row_of_nan_has_some_words():
    head = make(12, 8, 50)
    assert top_k(Head(head.hidden.view(3, 4, 8), head.lm_head), 5).shape == (3, 4, 5)
    assert top_k(make(0, 8, 50), 5).shape == (0, 5)
    hidden = head.hidden.detach().clone()
    hidden[3] = torch.nan
    assert (top_k(Head(hidden, head.lm_head), 5)[3] < 50).all()


@pytest.mark.parametrize("k", [0, 51])
def test_k_is_checked(k):
    with pytest.raises(ValueError, match=rf"top_k: k must be in 1..50; got {k}"):
        top_k(make(2, 8, 50), k)
