"""Ranks that tests run functions in: fresh interpreters, started once a test session, since importing takes seconds.

    def spread(x):                                   # at the top of a test module; every rank runs it in one group
        dist.all_reduce(x := x.clone())
        return x

    def test_sum(ranks):
        assert ranks(2, spread, torch.ones(1)) == [2, 2]

A rank that raises fails the call with its traceback; one that is not done in time prints where it stands and ends.
Either way all ranks are replaced, so no call can hang the session or spoil the next one.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

SECONDS = 400  # far beyond what any call takes on a busy machine


class Rank:
    """One interpreter, from the outside."""

    def __init__(self, folder: Path, number: int) -> None:
        self.connection, theirs = Pipe()
        self.log = folder / f"rank-{number}.log"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(theirs.fileno())]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        theirs.close()

    def result(self) -> tuple[bool, Any]:
        """Whether its function returned, and what; or why not."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            return False, f"the process ended\n{self.log.read_text()[-4000:]}"


class Ranks:
    """As many ranks as were ever asked for at once."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.calls = 0
        self.ranks: list[Rank] = []

    def __call__(self, size: int, function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> list[Any]:
        """What `function(*args)` returns on each of `size` ranks of a gloo group of their own, seeded alike."""
        folder, self.calls = Path(self.folder.name), self.calls + 1
        self.ranks += [Rank(folder, number) for number in range(len(self.ranks), size)]
        name = function.__module__, function.__qualname__
        for number, rank in enumerate(self.ranks[:size]):
            place = str(folder / f"store-{self.calls}"), number, size
            rank.connection.send_bytes(pickle.dumps((name, args, place, seconds)))
        numbers = {rank.connection: number for number, rank in enumerate(self.ranks[:size])}
        results: dict[int, Any] = {}
        failures: list[str] = []
        # of those that a failure leaves waiting, what comes at once is told too: the cause may be there
        while numbers and (ready := wait(list(numbers), timeout=2 if failures else None)):
            for connection in ready:
                number = numbers.pop(connection)
                returned, results[number] = self.ranks[number].result()
                if not returned:
                    failures.append(f"rank {number} of {size}: {results[number]}")
        if failures:
            self.stop()
            raise AssertionError("\n".join([f"{name[1]} failed", *failures]))
        return [results[number] for number in range(size)]

    def stop(self) -> None:
        for rank in self.ranks:
            rank.process.kill()
            rank.process.wait()
            rank.connection.close()
        self.ranks = []


def serve(connection: Connection) -> None:
    """Runs what is asked for until nobody asks any more."""
    import torch
    import torch.distributed as dist

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # as in conftest
    while True:
        try:
            (module, function), args, (store, rank, size), seconds = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.dump_traceback_later(seconds, exit=True)
        try:
            limit = timedelta(seconds=seconds)
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=limit
            )
            torch.manual_seed(0)
            answer = True, getattr(importlib.import_module(module), function)(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            dist.destroy_process_group()
        if "torch.distributed.tensor" in sys.modules:
            # or an equal mesh of the next call would be taken for this one, whose group is gone
            importlib.import_module("torch.distributed.tensor.debug")._clear_sharding_prop_cache()
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
