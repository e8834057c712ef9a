"""Ctrl-C, a scheduler's SIGTERM and a closed terminal: all are a `KeyboardInterrupt`, and wait for the step to end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger("copd")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Asked to stop, and stopped where a step ends, every rank after the same one."""


class Interrupts:
    """While entered, a signal raises `KeyboardInterrupt`: at once, or where `hold` ends; a second one at once.

    `pass_on` is told of each first. With `agree`, which makes what this rank was asked the answer of all, the first one
    always waits: the end of a step is where all ranks are.
    """

    def __init__(
        self,
        pass_on: Callable[[int], None] = lambda number: None,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self.pass_on, self.agree = pass_on, agree
        self.held, self.asked = agree is not None, False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # signals reach the main thread alone; one that is ignored, as nohup ignores SIGHUP, stays so
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._heed)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.pass_on(number)
        if self.asked or not self.held:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.asked = True
        logger.warning("%s: stopping after this step; once more stops at once", signal.Signals(number).name)

    @contextmanager
    def hold(self) -> Iterator[None]:
        self.held = True
        try:
            yield
        finally:
            self.held = self.agree is not None
        if self.agree(self.asked) if self.agree else self.asked:
            raise Stopped("asked to stop")
