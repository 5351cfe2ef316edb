"""Locks on a shared file system, so that processes that share a grid stay out of each other's way.

A file in; the lock is held while a block runs, and ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from absl import logging


class GridError(ValueError):
    """A grid that cannot be run as asked; one line with the remedy."""


@contextlib.contextmanager
def only_here(path: Path, what: str) -> Iterator[None]:
    """Holds a lock that no other process on this file system holds; it ends with the process, however that ends.

    Raises:
      GridError: another one holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise GridError(
                f"{what} is being run by {file.read().strip() or 'another process'}; give each process a part of its own with "
                "--index and --of, or wait for it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """One process after the other; `what` says in the log what another one is doing meanwhile."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process, which %s", what)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
