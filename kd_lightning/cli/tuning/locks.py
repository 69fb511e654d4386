"""Locks of files that end with the process that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock


def make_lock(path: Path) -> FileLock:
    """Return the lock of a file, which is waited for."""
    from filelock import FileLock  # here, since few runs need it

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


class JournalLock:
    """The lock of the journal's file, as Optuna calls it. Optuna's own ones outlive a killed process by 30 s."""

    def __init__(self, path: Path) -> None:
        self._lock = make_lock(path)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


@contextmanager
def waits_for_others(path: Path) -> Iterator[None]:
    """Within it, no other process is in the same part. A line says so if it has to wait."""
    from filelock import Timeout

    lock = make_lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("tune: waiting for another process, which trains the final seeds", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
