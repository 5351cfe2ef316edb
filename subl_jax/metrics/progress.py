"""Progress of a stage on standard error: a bar on a terminal, a plain line now and then in a log file.

An iterable or a total goes in; every stage leaves one summary line with its seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Generic, Protocol, TypeVar, cast, runtime_checkable

import tqdm

T = TypeVar("T")

PLAIN_INTERVAL_S = 10.0  # a log of an hour-long stage stays readable, and a hung stage shows within seconds
# tqdm's default without what it thinks is left.
_BAR_WITHOUT_ETA = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]"


@runtime_checkable
class Stream(Protocol):
    """What progress writes to: a text file, standard error, or a buffer."""

    def write(self, text: str, /) -> object:
        """Writes the text."""
        ...

    def flush(self) -> object:
        """Hands it on."""
        ...

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        ...


class Progress(Generic[T]):
    """A running count; use it as an iterator over `items`, or call `advance` inside a `with` block.

    Attributes:
      count: units done so far.
    """

    def __init__(
        self,
        items: Iterable[T] | None,
        total: int | None,
        description: str,
        unit: str,
        stream: Stream,
        interval_s: float,
    ):
        """See `progress`."""
        self.count = 0
        self._items = items
        self._total = total
        self._description = description
        self._unit = unit
        self._stream = stream
        self._interval_s = interval_s
        self._start = self._last = time.monotonic()
        self._fields = ""
        self._eta = ""
        self._closed = False
        self._bar = None
        if stream.isatty():
            self._bar = tqdm.tqdm(total=total, desc=description, unit=unit, file=stream, leave=False, mininterval=0.2)

    def advance(self, count: int = 1, *, eta_s: float | None = None, **fields: float) -> None:
        """Adds `count` units; `fields` (e.g. loss=0.31) are shown beside them.

        Units that do not come at an even rate need an `eta_s` of the caller's: the seconds that are left. It takes the
        place of the bar's own estimate, and stands in plain lines, which else have none.
        """
        self.count += count
        if fields:
            self._fields = " ".join(f"{name}={value:.4g}" for name, value in fields.items())
        if eta_s is not None:
            self._eta = f", {_duration(eta_s)} to go"
        if self._bar is not None:
            if eta_s is not None:
                self._bar.bar_format = _BAR_WITHOUT_ETA
            self._bar.set_postfix_str(", ".join(filter(None, (self._eta[2:], self._fields))), refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self._line(f"{self._amount()}, {now - self._start:.0f} s{self._eta}")

    def close(self, failed: bool = False) -> None:
        """Ends the bar and prints the summary line; idempotent."""
        if self._closed:
            return
        self._closed = True
        seconds = time.monotonic() - self._start
        if self._bar is not None:
            self._bar.close()
        rate = f", {self.count / seconds:.4g} {self._unit}/s" if seconds > 0 and self.count else ""
        stopped = "stopped at " if failed else ""
        self._line(f"{stopped}{self._amount()} in {seconds:.1f} s{rate}")

    def _amount(self) -> str:
        of = "" if self._total is None else f"/{self._total}"
        return f"{self.count}{of} {self._unit}"

    def _line(self, text: str) -> None:
        fields = f" [{self._fields}]" if self._fields else ""
        print(f"{self._description}: {text}{fields}", file=self._stream, flush=True)

    def __iter__(self) -> Iterator[T]:
        """Yields the items, counting one per item; a block that raises or breaks off is reported as stopped."""
        if self._items is None:
            raise TypeError("this progress has a total, not items: call advance() inside a with block")
        finished = False
        try:
            for item in self._items:
                yield item
                self.advance()
            finished = True
        finally:
            self.close(failed=not finished)

    def __enter__(self) -> Progress[T]:
        """Starts counting."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Prints the summary line."""
        self.close(failed=kind is not None)


def _duration(seconds: float) -> str:
    """Seconds as a person would say them, to two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress(
    items_or_total: Iterable[T] | int | None,
    description: str,
    *,
    unit: str = "it",
    stream: Stream | None = None,
    interval_s: float = PLAIN_INTERVAL_S,
) -> Progress[T]:
    """Shows how far a stage is: over an iterable, or up to a total.

    Either `for task in progress(tasks, "roll out"): …` or `with progress(600, "train") as shown: shown.advance()`.

    Args:
      items_or_total: what to iterate over, or how many units there will be (None: unknown).
      description: the stage, shown at the head of the line.
      unit: what is counted, e.g. "step".
      stream: where to write; standard error by default. A bar is drawn only if it is a terminal.
      interval_s: the least time between two plain lines, in seconds.
    """
    where: Stream = sys.stderr if stream is None else stream
    if items_or_total is None or isinstance(items_or_total, int):
        return Progress(None, items_or_total, description, unit, where, interval_s)
    total = len(cast(Sized, items_or_total)) if hasattr(items_or_total, "__len__") else None
    return Progress(items_or_total, total, description, unit, where, interval_s)
