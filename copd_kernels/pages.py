"""Buffers in huge pages, which Linux gives to who asks for them.

The first touch of fresh memory costs a fault a page, and what is larger than a processor's table of addresses a walk a
page each time it is read: for logits, in pages of 4 KiB, more than the arithmetic of their rows. Where the system has
no huge pages, or is told to give none, nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

SIZE = 2 << 20
# what is larger is rarely memory that was used before, and the host of a virtual machine may have to find it first: a
# tenth of the time of a call whose logits took 134 MB
MOST_BYTES = 64 << 20
ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def in_huge_pages(x: Tensor) -> Tensor:
    """x, fresh from the allocator: on a CPU the whole huge pages within its memory are asked for, no byte more."""
    if x.device.type == "cpu" and ADVICE is not None:
        start, end = x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()
        start, end = -(-start // SIZE) * SIZE, end // SIZE * SIZE
        if 0 < end - start <= MOST_BYTES:
            # what it answers does not matter: it is advice
            madvise()(start, end - start, ADVICE)
    return x


@functools.cache
def madvise() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None).madvise
    call.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return call
