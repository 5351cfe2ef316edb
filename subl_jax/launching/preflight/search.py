"""The largest batch that fits, by few measurements: each of them is a compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Found(NamedTuple):
    """The answer, and what it took.

    Attributes:
      rows: the largest multiple of the unit that fits; 0: not even one unit does.
      measured: rows -> bytes, in the order of asking.
    """

    rows: int
    measured: dict[int, float]


def largest(measure: Callable[[int], float], limit: float, unit: int, start: int, most: int = 1 << 20) -> Found:
    """The largest multiple of `unit` whose bytes are within the limit.

    Bytes grow with rows, and nearly along a line: the next guess is where the line through the two nearest measurements meets
    the limit, kept between what fits and what does not. The answer does not depend on the line, only the number of guesses.

    Args:
      measure: rows -> bytes of one device.
      limit: bytes that there are.
      unit: what rows come in.
      start: the first guess; it is rounded down to the unit.
      most: rows beyond which nobody asks.
    """
    measured: dict[int, float] = {}

    def ask(units: int) -> bool:
        measured[units * unit] = measure(units * unit)
        return measured[units * unit] <= limit

    low, high = 0, most // unit + 1  # low fits (nothing is held), high is taken not to
    guess = min(max(start // unit, 1), high - 1)
    while high - low > 1:
        if ask(guess):
            low = guess
        else:
            high = guess
        guess = min(max(_next(measured, limit, unit, low, high), low + 1), high - 1)
    return Found(low * unit, measured)


def _next(measured: dict[int, float], limit: float, unit: int, low: int, high: int) -> int:
    """Units at which the line through the two measurements nearest to the limit meets it; twice as many after one alone."""
    if len(measured) < 2:
        return 2 * low if low else high // 2
    nearest = sorted(measured, key=lambda rows: abs(measured[rows] - limit))[:2]
    (x, y), (u, v) = ((rows, measured[rows]) for rows in sorted(nearest))
    if v <= y:
        return (low + high) // 2
    return int((x + (limit - y) * (u - x) / (v - y)) // unit)
