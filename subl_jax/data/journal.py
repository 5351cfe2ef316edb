"""The journal of a rollout: episodes on disk from the moment they are finished, so that an interrupted rollout goes on.

Finished trajectories go in, one by one and in any order; after a kill the next process opens the file, skips what is in
`finished`, and appends the rest. One journal belongs to one process and one rollout, whose identity stands in it.

The file is JSON Lines in ASCII, a checksum on every line: first {format, digest, identity}, then one episode per line.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from subl_jax import artifacts
from subl_jax.chat.messages import ToolSchema
from subl_jax.data.record import flaw, json_text, key_of, name_of
from subl_jax.trajectory import Trajectory

FORMAT = 1

# A killed process loses nothing that was appended. A machine that loses power loses at most what came within this time
# before, and what came last before a pause, which the kernel writes out by itself (Linux: within 30 s).
SYNC_SECONDS = 2.0

# The same bytes on every machine.
_ARRAYS = {"tokens": "<i4", "loss_mask": "|b1", "logprobs": "<f4"}

# What stands around a record's text in its line: an opening, eight hexadecimal digits, a middle, and an end.
_OPENING, _MIDDLE, _END = b'{"crc32":"', b'","record":', b"}\n"


class JournalError(ValueError):
    """A journal cannot be opened, read or extended; one line with file, cause and remedy."""


class Journal:
    """Finished episodes in an append-only file, open for this process alone; a context manager. Not for several threads.

    Attributes:
      path: the file.
      finished: (episode, sample) of every episode in it; to be read, not changed.
    """

    def __init__(self, path: Path, descriptor: int):
        """Wraps an open file; use `Journal.open`."""
        self.path = path
        self.finished: set[tuple[int, int]] = set()
        self._descriptor: int | None = descriptor
        self._size = 0  # bytes up to the end of the last whole line
        self._synced = time.monotonic()

    @classmethod
    def open(cls, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> Journal:
        """Opens the journal of this very rollout, or begins one; a line that a kill left unfinished is cut off.

        Args:
          path: the file; folders above it are created.
          identity: everything an episode depends on, as plain data (see `artifacts.plain`).

        Raises:
          JournalError: the file belongs to another rollout or is in use, is corrupt, or cannot be read or written.
        """
        path, wanted = Path(path), artifacts.plain(identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileExistsError as error:
            cause = "a file stands where its folder is needed; remove it or use another directory"
            raise JournalError(f"cannot open the journal {path}: {cause}") from error
        except OSError as error:
            raise JournalError(f"cannot open the journal {path}: {artifacts.reason(error)}") from error
        journal = cls(path, descriptor)
        try:
            journal._lock()
            journal._load(wanted)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    def append(self, trajectory: Trajectory) -> None:
        """Adds one finished episode; when this returns, a kill of this process does not lose it.

        If it raises, the file holds what it held before.

        Raises:
          JournalError: the episode is in the journal already or is malformed, or the file cannot be written.
        """
        key = key_of(trajectory)
        if key in self.finished:
            raise JournalError(f"{self.path} holds {name_of(trajectory)} already; skip what is in `finished`")
        problem = flaw(trajectory)
        if problem:
            raise JournalError(f"{self.path}: {problem}")
        self._write(_encode(trajectory))
        self.finished.add(key)

    def read(self) -> list[Trajectory]:
        """Every episode of the journal, exactly, sorted by (episode, sample); equal tool lists become one list object.

        Raises:
          JournalError: the file was damaged since it was opened, or cannot be read.
        """
        tools: dict[str, list[ToolSchema]] = {}
        records = (record for number, record, _ in self._lines() if number > 1)
        return sorted((_decode(record, tools) for record in records), key=key_of)

    def close(self) -> None:
        """Brings everything to the disk and releases the file; a second call does nothing.

        Raises:
          JournalError: the disk refuses; episodes may be missing after the machine loses power.
        """
        if self._descriptor is not None:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise JournalError(f"cannot write {self.path}: {artifacts.reason(error)}") from error
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def delete(self) -> None:
        """Closes the journal and removes its file: its episodes stand elsewhere.

        Raises:
          JournalError: the file cannot be removed.
        """
        self.close()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"cannot remove {self.path}: {artifacts.reason(error)}") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise JournalError(f"the journal {self.path} is closed; open it again")
        return self._descriptor

    def _lock(self) -> None:
        """Keeps other processes out until this one closes the file or ends, by whatever means.

        A POSIX record lock, because children do not inherit it: no orphaned tool can hold it. It would be lost if this
        process opened and closed the file a second time, so `_lines` reads through the one descriptor.
        """
        try:
            fcntl.lockf(self._open_descriptor(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks; there it is up to the user to run one process per journal.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise JournalError(
                    f"{self.path} is in use by another process; stop it, or wait for it, or use another --workdir"
                ) from error

    def _load(self, wanted: Mapping[str, Any]) -> None:
        """Checks every line, compares the identity, collects what is finished, and cuts off an unfinished last line."""
        for number, record, end in self._lines():
            if number == 1:
                self._compare(record, wanted)
            else:
                key = record["episode"], record["sample"]
                if key in self.finished:
                    raise self._damaged(f"line {number} repeats episode {key[0]}, sample {key[1]}")
                self.finished.add(key)
            self._size = end
        try:
            os.ftruncate(self._open_descriptor(), self._size)
        except OSError as error:
            raise JournalError(f"cannot write {self.path}: {artifacts.reason(error)}") from error
        if not self._size:
            header = {"format": FORMAT, "digest": artifacts.digest(wanted), "identity": wanted}
            self._write(_framed(json_text(header).encode("ascii")))

    def _compare(self, header: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        remedy = f"delete {self.path} to roll out from the beginning, or use another --workdir"
        if header.get("format") != FORMAT:
            raise JournalError(
                f"{self.path}: format {header.get('format')} where this version reads {FORMAT}; {remedy}"
            )
        if header["digest"] != artifacts.digest(wanted):
            found = artifacts.differences(header["identity"], wanted)
            raise JournalError(
                f"{self.path} belongs to another rollout: "
                f"{artifacts.describe(found[:1], 'the journal', 'this run')}; {remedy}"
            )

    def _damaged(self, cause: str) -> JournalError:
        return JournalError(f"{self.path}: {cause}; delete the file to roll out its episodes again")

    def _lines(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        """Yields every whole line as (its number from 1, its record, where it ends), and checks it."""
        try:
            with open(self._open_descriptor(), "rb", closefd=False) as file:
                file.seek(0)
                end = 0
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        # A kill or a full disk. If it is all there is, it must be the beginning of a journal.
                        if number == 1 and not _OPENING.startswith(line[: len(_OPENING)]):
                            raise self._damaged("is no journal")
                        return
                    text = line[len(_OPENING) + 8 + len(_MIDDLE) : -len(_END)]
                    if _framed(text) != line:
                        raise self._damaged(f"line {number} is corrupt, its checksum differs")
                    end += len(line)
                    yield number, json.loads(text), end
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {artifacts.reason(error)}") from error

    def _write(self, line: bytes) -> None:
        """Writes a line behind the last whole one; all of it, or (unless killed) none."""
        descriptor = self._open_descriptor()
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(descriptor, line[written:], self._size + written)
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                os.fsync(descriptor)
                self._synced = time.monotonic()
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, self._size)
            if isinstance(error, OSError):
                raise JournalError(f"cannot write {self.path}: {artifacts.reason(error)}") from error
            raise
        self._size += len(line)


def _framed(text: bytes) -> bytes:
    """The line that holds a record's JSON text."""
    return b"".join((_OPENING, b"%08x" % zlib.crc32(text), _MIDDLE, text, _END))


def _encode(item: Trajectory) -> bytes:
    episode, sample = key_of(item)
    record = {
        "episode": episode,
        "sample": sample,
        "task_id": item.task_id,
        "status": item.status,
        "done": bool(item.done),
        "error": item.error,
        "messages": item.messages,
        "tools": item.tools,
    }
    for field, dtype in _ARRAYS.items():
        content = getattr(item, field).astype(dtype, copy=False).tobytes()
        record[field] = base64.b64encode(content).decode("ascii")
    return _framed(json_text(record).encode("ascii"))


def _decode(record: dict[str, Any], tools: dict[str, list[ToolSchema]]) -> Trajectory:
    arrays: dict[str, Any] = {
        # A copy in the machine's own byte order, which may be written to.
        field: np.frombuffer(base64.b64decode(record[field]), dtype).astype(np.dtype(dtype).newbyteorder("="))
        for field, dtype in _ARRAYS.items()
    }
    shared = tools.setdefault(json_text(record["tools"]), record["tools"])
    return Trajectory(**{**record, **arrays, "tools": shared})
