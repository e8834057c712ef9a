"""What a run writes, it writes whole or not at all, and alone.

A kill may come between any two instructions: a file or folder is written beside its place and renamed into it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a file or a folder, that takes its place when the block ends and goes if it fails."""
    scratch = path.with_name(f".{path.name}.part")
    remove(scratch)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
        for written in (scratch, *scratch.rglob("*")):
            _sync(written)
        if path.is_dir():
            discard(path)
        scratch.replace(path)
        _sync(path.parent)
    except BaseException:
        remove(scratch)
        raise


def write(path: Path, text: str) -> None:
    with whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Removes a folder that half-removed would pass for a whole one."""
    gone = folder.with_name(f".{folder.name}.gone.part")
    remove(gone)
    remove(folder.rename(gone))


def _sync(path: Path) -> None:
    """A rename may reach the disk before the data does, unless they are sent ahead."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_aside(folder: Path) -> Path:
    """Renames `folder` to the first free `<name>.old-<n>`, which nothing reads again."""
    number = next(n for n in range(1, 10**9) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    return folder.rename(folder.with_name(f"{folder.name}.old-{number}"))


def is_aside(path: Path) -> bool:
    return any(".old-" in part for part in path.parts)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder this process's own, and clears what a killed one left half-written in it.

    The system drops the lock with the process that held it, however that ended. Raises `BlockingIOError` while another
    process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            rule = f"run: {folder} must have one process at a time"
            raise BlockingIOError(f"{rule}; got {file.read() or 'another'} at work on it") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        for left in folder.glob(".*.part"):
            remove(left)
        yield
