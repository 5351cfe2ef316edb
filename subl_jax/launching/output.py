"""What several processes write, as one readable stream: whole lines with their rank, and one progress bar at most."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict, deque
from typing import Protocol, runtime_checkable

# Lines of standard error that are kept of each process: a traceback through JAX is long.
_KEPT = 200
# Lines that are shown of them where there is no traceback.
_SHOWN = 20
# A line without an end is handed on in pieces of this many characters.
_LONGEST = 1 << 16
# How often the bar of a process is shown where it cannot be drawn over the last one.
_BAR_EVERY_S = 10.0


@runtime_checkable
class Stream(Protocol):
    """What is printed to: a terminal, a log file, a buffer."""

    def write(self, text: str, /) -> object:
        """Writes the text."""
        ...

    def flush(self) -> object:
        """Hands it on."""
        ...

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        ...


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of one process.

    Attributes:
      rank: of the process.
      error: from standard error.
      text: without its end.
      bar: a state that the next one overwrites (it ended in a carriage return, or begins with one and has no end yet).
    """

    rank: int
    error: bool
    text: str
    bar: bool = False


class Lines:
    """Cuts one pipe of one process into lines."""

    def __init__(self, rank: int, error: bool) -> None:
        self._rank, self._error = rank, error
        self._rest = b""
        self._drawn = b""  # what stands in the line now, behind a carriage return

    def feed(self, data: bytes) -> list[Line]:
        """The lines, and the bar's newest state, that are complete with this data; none: the end of the pipe."""
        self._rest += data
        *whole, self._rest = self._rest.replace(b"\r\n", b"\n").split(b"\n")
        if not data:
            whole, self._rest = [*whole, *filter(None, [self._rest])], b""
        found = [self._line(_visible(piece), bar=False) for piece in whole]
        if b"\r" in self._rest:
            state, end = _visible(self._rest), b"\r" if self._rest.endswith(b"\r") else b""
            if end and not self._rest[:-1].rpartition(b"\r")[2].strip():
                state, end = b"", b""  # wiped out, as tqdm does at the end of a bar
            if state and state != self._drawn:
                found.append(self._line(state, bar=True))
            self._drawn = state
            # What went before is overwritten. This state stays, in case a line's end comes.
            self._rest = b"\r" + state + end if state else b""
        elif len(self._rest) > _LONGEST:
            found.append(self._line(self._rest, bar=False))
            self._rest = b""
        return found

    def _line(self, text: bytes, bar: bool) -> Line:
        return Line(self._rank, self._error, text.decode(errors="replace"), bar)


def _visible(piece: bytes) -> bytes:
    """What a terminal shows of a line that holds carriage returns: the last part that is not blank."""
    return next((part for part in reversed(piece.split(b"\r")) if part.strip()), piece.replace(b"\r", b""))


def _write(stream: Stream, line: str) -> None:
    stream.write(f"{line}\n")
    stream.flush()


class Printer:
    """Prints lines as `[rank] text`; bars of the first process only, over one another on a terminal, else now and then."""

    def __init__(self, out: Stream, error: Stream) -> None:
        self._out, self._error = out, error
        self._drawn = False
        self._bar_at = float("-inf")
        self._kept: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def line(self, line: Line) -> None:
        """Prints a line, or draws a bar."""
        if line.bar:
            self._bar(line)
            return
        self.clear()
        if line.error:
            self._kept[line.rank].append(line.text)
        stream = self._error if line.error else self._out
        _write(stream, f"[{line.rank}] {line.text}")

    def _bar(self, line: Line) -> None:
        if line.rank or not line.text.strip():
            return
        if self._error.isatty():
            self._error.write(f"\r\x1b[K[{line.rank}] {line.text}")
            self._error.flush()
            self._drawn = True
        elif time.monotonic() >= self._bar_at + _BAR_EVERY_S:
            self._bar_at = time.monotonic()
            _write(self._error, f"[{line.rank}] {line.text}")

    def clear(self) -> None:
        """Takes the bar away before something else is written."""
        if self._drawn:
            self._error.write("\r\x1b[K")
            self._drawn = False

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self.clear()
        _write(self._error, f"launch.local: {text}")

    def forget(self) -> None:
        """Drops what is kept of processes that are started again."""
        self._kept.clear()

    def last_words(self, rank: int, heading: str) -> None:
        """The last traceback of a process, or else the last lines of its standard error; nothing is printed after them."""
        kept = list(self._kept[rank])
        start = max((at for at, text in enumerate(kept) if text.startswith("Traceback (most recent")), default=None)
        shown = kept[start:] if start is not None else kept[-_SHOWN:]
        self.say(
            f"{heading}; its last words on standard error:"
            if shown
            else f"{heading}; it said nothing on standard error"
        )
        for text in shown:
            _write(self._error, f"[{rank}] {text}")
