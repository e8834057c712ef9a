"""Huge pages are asked for within a buffer's memory, whole ones, and never beyond it."""

import pytest
import torch

from copd_kernels import pages


@pytest.fixture
def asked(monkeypatch):
    ranges = []
    monkeypatch.setattr(pages, "ADVICE", 14)
    monkeypatch.setattr(pages, "madvise", lambda: lambda start, size, advice: ranges.append((start, size)))
    return ranges


@pytest.mark.parametrize("offset", [0, 1, 4096, pages.SIZE // 4])
def test_whole_huge_pages_within_the_buffer_and_no_byte_more(asked, offset):
    x = torch.empty(offset + pages.SIZE)[offset:]  # four times as many bytes
    assert pages.in_huge_pages(x) is x
    [(start, size)] = asked
    end = x.data_ptr() + x.numel() * x.element_size()
    assert start % pages.SIZE == size % pages.SIZE == 0
    assert 0 <= start - x.data_ptr() < pages.SIZE
    assert 0 <= end - (start + size) < pages.SIZE


def test_a_buffer_that_holds_none_or_too_many_asks_for_none(asked):
    for numel in (0, 1, pages.SIZE // 8, pages.MOST_BYTES):  # of four bytes each
        pages.in_huge_pages(torch.empty(numel))
    assert not asked


def test_a_system_that_has_none_is_not_asked(asked, monkeypatch):
    monkeypatch.setattr(pages, "ADVICE", None)
    pages.in_huge_pages(torch.empty(pages.SIZE))
    assert not asked


def test_what_the_system_says_changes_nothing():
    x = torch.ones(pages.SIZE)
    pages.in_huge_pages(x)
    assert (x == 1).all()
