"""A reward in a process of its own, so that one that hangs or dies costs its row and not the run."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from copd import rewards


class Apart:
    """The reward called `name`, as `copd.rewards.load` knows it, with its own signature.

    Its process starts at the first call, is ended where no answer comes within `seconds` or it dies, which is a
    `TimeoutError` or `ChildProcessError`, and is started again by the next call.
    """

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, name: str, seconds: float) -> None:
        function = rewards.load(name)
        self.name, self.seconds = name, seconds
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments: Any) -> Any:
        if self.process is None:
            self._start()
        try:
            self.pipe.send(arguments)
            if not self.pipe.poll(self.seconds):
                self.end()
                raise TimeoutError(f"no answer within {self.seconds} s")
            answer = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.end()
            raise ChildProcessError("its process has died") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _start(self) -> None:
        self.pipe, theirs = Pipe()
        command = f"from copd.apart import serve; serve({theirs.fileno()}, {self.name!r})"
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", command], pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": paths}
        )
        theirs.close()
        self.pipe.recv()  # imports are not the reward's time

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.pipe.close()
        self.process = None

    def __del__(self) -> None:
        self.end()


def serve(descriptor: int, name: str) -> None:
    """What runs there: answers calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    pipe, function = Connection(descriptor), rewards.load(name)
    pipe.send(None)
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        prompts, completions = arguments.pop("prompts"), arguments.pop("completions")
        try:
            pipe.send(rewards.call(name, function, prompts, completions, arguments))
        except Exception as error:
            known = isinstance(error, rewards.WrongList)
            pipe.send(error if known else RuntimeError(f"{type(error).__name__}: {error}"))
