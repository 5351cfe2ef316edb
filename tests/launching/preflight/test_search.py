"""The search for the largest batch against the answer that trying everything gives."""

from __future__ import annotations

import math

import pytest

from subl_jax.launching.preflight import search


def brute(measure, limit: float, unit: int, most: int) -> int:
    return max((rows for rows in range(unit, most + 1, unit) if measure(rows) <= limit), default=0)


MEASURES = {
    "a line": lambda rows: 3.0 + 0.11 * rows,
    "a line that jumps": lambda rows: 3.0 + 0.1 * rows + (2 if rows > 96 else 0),
    "steps": lambda rows: 3.0 + 4 * (rows // 40),
    "faster than a line": lambda rows: 2.0 + 0.001 * rows**2,
    "slower than a line": lambda rows: 1.0 + 0.9 * math.sqrt(rows),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("unit", "start"), [(8, 64), (8, 8), (16, 500), (1, 3)])
def test_the_search_finds_what_trying_everything_finds(name: str, unit: int, start: int) -> None:
    measure = MEASURES[name]
    found = search.largest(measure, 15.75, unit, start, most=1024)
    assert found.rows == brute(measure, 15.75, unit, 1024)


def test_a_line_takes_few_measurements() -> None:
    found = search.largest(lambda rows: 3.0 + 0.11 * rows, 15.75, 8, 64)
    assert found.rows == 112
    assert len(found.measured) <= 4


def test_nothing_fits_where_one_unit_does_not() -> None:
    assert search.largest(lambda rows: 20.0, 15.75, 64, 256).rows == 0
