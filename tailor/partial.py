"""What is not whole yet, under a hidden name beside its destination."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_sibling(out: Path, *, folder: bool) -> Iterator[Path]:
    """A new empty file or folder `.<name of out>.<hex>.partial` beside `out`, to be renamed when whole.

    Whatever still has that name at the end is removed. A killed process cannot do so: what it left is removed here, by
    the next one that writes to the same `out`. It is known by its lock, which the system drops with the process, so
    that a partial file of a live process is never touched. Raises OSError.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{_literal(out.name)}.*.partial"):
        _remove_if_abandoned(stale)
    path, lock = _make(out, folder=folder)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def _make(out: Path, *, folder: bool) -> tuple[Path, int]:
    """The new path and the descriptor that holds its lock."""
    while True:
        path = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        if folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        # A process in search of abandoned ones may come between making and locking, and takes this one for such.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            return path, lock  # a file system without locks: what a killed process leaves there, stays
        if path.exists():
            return path, lock
        os.close(lock)


def _remove_if_abandoned(path: Path) -> None:
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except OSError:
        pass
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _literal(name: str) -> str:
    """The name as a pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
