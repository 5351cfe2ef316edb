"""A profiler trace of a few steps of a loop, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

# A trace leaves out the first steps, which compile and warm up, and holds a few.
_AFTER, _STEPS = 10, 5


class Trace:
    """A profiler trace of a few steps, of those after the first ten where there are so many; nothing without a directory.

    The devices are waited for at both ends, so that it holds these steps and no other.
    """

    def __init__(self, directory: Path | None, start: int, steps: int) -> None:
        self._directory = directory
        self._first = max(start, min(start + _AFTER, steps - _STEPS))
        self._last = min(self._first + _STEPS, steps)
        self._running = False

    def begin(self, position: int, state: Any) -> None:
        """To be called before the step at a position."""
        if self._directory is not None and position == self._first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def end(self, done: int, state: Any) -> None:
        """To be called behind it."""
        if self._running and done == self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Trace:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that a failure left running."""
        if self._running:
            self._stop()
