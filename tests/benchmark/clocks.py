"""A clock that only programs and sleep move, and programs of known duration on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from subl_jax.benchmark.harness import Program


class Clock:
    """Seconds that pass when someone says so; others use `busy` cores of each of them."""

    def __init__(self, busy: float = 0.0) -> None:
        self.now, self.busy, self.others_s = 0.0, busy, 0.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.others_s += self.busy * seconds

    def others(self) -> float:
        return self.others_s


class Worker:
    """A program whose runs take given seconds, the last one repeated; it remembers its inputs in a shared log."""

    def __init__(self, name: str, clock: Clock, seconds: Iterable[float], log: list[tuple[str, Any]], **options: Any):
        self._clock, self._log = clock, log
        self._seconds = list(seconds)
        self.program = Program(name, self.run, **options)

    def run(self, given: Any) -> str:
        self._log.append((self.program.name, given))
        self._clock.pass_time(self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0])
        return f"{self.program.name} did {given}"


def counting(counts: list[int]) -> Callable[[], int]:
    """A count of compilations that reads one number at each look, the last one repeated."""
    return lambda: counts.pop(0) if len(counts) > 1 else counts[0]
