"""When a run's checkpoints are written, and what becomes of one that cannot be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from copd import checkpoint
from copd.coevolve import Plan
from copd.config import Config

logger = logging.getLogger("copd")


class Saver:
    """Writes one checkpoint at a time, mostly while training goes on; `saved` is the step of the newest."""

    def __init__(self, directory: Path, plan: Plan, cfg: Config, saved: int) -> None:
        self.directory, self.plan, self.cfg, self.saved = directory, plan, cfg, saved
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.flying: tuple[int, bool, Future[Path]] | None = None

    def save(self, step: int, required: bool, beside: bool = False) -> None:
        """Begins a checkpoint when the last one is done; waits for it but where training goes on `beside` it.

        One that cannot be written, as on a full disk, is an `OSError` where it is required, now or at the next call.
        """
        self.settle()
        moment = checkpoint.take(self.plan, step, copy=beside)
        write = partial(checkpoint.write, self.directory, moment, self.cfg)
        if beside:
            self.flying = step, required, self.thread.submit(write)
        else:
            self._end(step, required, write)

    def settle(self) -> None:
        """Waits for the one in flight."""
        if self.flying is not None:
            (step, required, future), self.flying = self.flying, None
            self._end(step, required, future.result)

    def _end(self, step: int, required: bool, write: Callable[[], Path]) -> None:
        try:
            write()
            self.saved = step
        except (OSError, RuntimeError) as error:  # torch words a full disk as a RuntimeError
            last = next((str(path) for path in reversed(checkpoint.found(self.directory))), "none")
            reason = str(error).splitlines()[0]
            message = f"checkpoint: step {step} must fit in {self.directory}; got {reason}; the last good one is {last}"
            if required:
                raise OSError(message) from error
            logger.error(message)
