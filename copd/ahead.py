"""What will be asked for soon, read by threads before it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

THREADS = 4


class Ahead:
    """`read(*key)` for keys that are told beforehand: at most `most` of them are read and not yet taken.

    Keys are taken in the order in which they were expected; one that is passed over is forgotten. Reading has to be
    free of side effects. With `most` = 0 nothing is read before it is taken.
    """

    def __init__(self, read: Callable[..., Any], most: int) -> None:
        self.read, self.most = read, most
        self.pool = ThreadPoolExecutor(min(most, THREADS), "copd-ahead") if most else None
        self.expected: dict[tuple[Hashable, ...], Future[Any] | None] = {}
        """in their order; None for those not begun"""

    def expect(self, keys: Iterable[tuple[Hashable, ...]]) -> None:
        """These come next, after what is expected already."""
        if self.pool is not None:
            self.expected |= {key: None for key in keys if key not in self.expected}
            self._begin()

    def take(self, *key: Hashable) -> Any:
        """What `read(*key)` returns or raises."""
        begun: Future[Any] | None = None
        if key in self.expected:
            for passed in list(self.expected):
                begun = self.expected.pop(passed)
                if passed == key:
                    break
                if begun is not None:
                    begun.cancel()
        self._begin()
        return self.read(*key) if begun is None else begun.result()

    def _begin(self) -> None:
        for key, future in list(islice(self.expected.items(), self.most)):
            if future is None and self.pool is not None:
                self.expected[key] = self.pool.submit(self.read, *key)
