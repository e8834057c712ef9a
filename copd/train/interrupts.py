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


class Interrupts:
    """While entered, a signal raises `KeyboardInterrupt`: at once, or where `hold` ends; a second one at once.

    `pass_on` is told of each first.
    """

    def __init__(self, pass_on: Callable[[int], None] = lambda number: None) -> None:
        self.pass_on = pass_on
        self.held = self.asked = False
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
            self.held = False
        if self.asked:
            raise KeyboardInterrupt("asked to stop")
