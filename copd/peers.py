"""Ranks that do something together: all of a run, or those that share one branch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from copd import files

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Peers:
    """`size` ranks, of which this is number `index`; one where there is no other.

    What follows all of them call at the same point. A rank that is asked alone waits until the group's timeout.

    Args:
        group: what carries their words; None is the group of all ranks.
        mesh: theirs, where they split a model.
    """

    def __init__(self, size: int = 1, index: int = 0, group: Any = None, mesh: DeviceMesh | None = None) -> None:
        self.size, self.index, self.group, self.mesh = size, index, group, mesh

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.index == 0

    def share(self, count: int) -> slice:
        """Which of `count` prompts are this rank's: as many as the others', or one more."""
        return slice(*(count * i // self.size for i in (self.index, self.index + 1)))

    def over(self, count: int) -> Peers:
        """These, to share `count` prompts; this rank alone where that leaves one with none, and all do all of them."""
        return self if count >= self.size else Peers()

    def all(self, value: T) -> list[T]:
        """Everybody's, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def rounds(self, mine: list[bool]) -> list[bool]:
        """Whether anybody's is true, round by round; who has fewer rounds than others repeats the last."""
        lists = self.all(mine)
        return [any(own[min(i, len(own) - 1)] for own in lists) for i in range(max(map(len, lists)))]

    def any(self, flag: bool) -> bool:
        return any(self.all(flag))

    def union(self, found: Mapping[Key, T], order: Iterable[Key]) -> dict[Key, T]:
        """What all ranks found, in this order."""
        whole = {key: value for part in self.all(dict(found)) for key, value in part.items()}
        return {key: whole[key] for key in order if key in whole}

    def together(self, work: Callable[[], T]) -> T:
        """`work()` on every rank; what it raises on one it raises on all."""
        if self.size == 1:
            return work()
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        errors = self.all(_portable(error))
        if error := error or next(filter(None, errors), None):
            raise error
        return result  # type: ignore[return-value]  # it has been assigned

    def told(self, work: Callable[[], T]) -> T:
        """`work()` on the first rank; everywhere what it returned, or raised, there."""
        if self.size == 1:
            return work()
        said = [self.together(lambda: work() if self.first else None)]
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        return said[0]  # type: ignore[return-value]  # it is the first rank's

    def ahead(self, work: Callable[[], T]) -> T:
        """`work()` on the first rank, and then on the others, which find the files that it left."""
        if self.size == 1:
            return work()
        early = self.together(lambda: work() if self.first else None)
        late = self.together(lambda: None if self.first else work())
        return early if self.first else late  # type: ignore[return-value]  # one of them is it

    @contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        """`files.whole` of a folder in which every rank writes."""

        def begin() -> Path:
            scratch = stack.enter_context(files.whole(path))
            scratch.mkdir()
            return scratch

        with ExitStack() as stack:
            scratch, failed = self.told(begin), None
            try:
                yield scratch
            except Exception as error:
                failed = error

            def end() -> None:
                if failed is not None:
                    raise failed

            self.together(end)
            self.together(stack.close)


def _portable(error: Exception | None) -> Exception | None:
    """One that can be pickled and raised again."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
