"""When two greedy continuations count as the same, and when nothing may be timed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from subl_jax.benchmark import greedy
from subl_jax.benchmark.greedy import Request
from subl_jax.benchmark.harness import BenchmarkError

REQUEST = Request([[row, row] for row in range(40)], 3)
OURS = [[7, 8, 9]] * 40


def changed(*rows: int) -> list[list[int]]:
    """Ours, with another second token in these rows."""
    return [[7, 5, 9] if number in rows else row for number, row in enumerate(OURS)]


def test_equal_rows_need_no_logits() -> None:
    def never(tokens: Sequence[int]) -> float:
        raise AssertionError("nothing differs")

    assert greedy.differing_rows("peer", REQUEST, OURS, OURS, never) == 0


def test_a_tie_is_counted_and_looked_at_where_the_rows_part() -> None:
    seen = []

    def gap(tokens: Sequence[int]) -> float:
        seen.append(list(tokens))
        return 1e-5

    assert greedy.differing_rows("peer", REQUEST, OURS, changed(3, 17), gap) == 2
    assert seen == [[3, 3, 7], [17, 17, 7]]


def test_a_difference_without_a_tie_is_refused_with_its_place() -> None:
    with pytest.raises(BenchmarkError, match=r"row 3 at new token 1 \(5 and 8\).*0\.25 apart.*not run the same model"):
        greedy.differing_rows("peer", REQUEST, OURS, changed(3), lambda tokens: 0.25)


def test_more_than_a_few_ties_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="differ in 3 of 40 rows"):
        greedy.differing_rows("peer", REQUEST, OURS, changed(1, 2, 3), lambda tokens: 0.0)
    one = Request([[1]], 3)
    assert greedy.differing_rows("peer", one, [[7, 8, 9]], [[7, 8, 5]], lambda tokens: 0.0) == 1


def test_fewer_tokens_than_asked_for_are_refused() -> None:
    greedy.check_lengths("peer", REQUEST, OURS)
    for short in (OURS[1:], [*OURS[1:], [7, 8]]):
        with pytest.raises(BenchmarkError, match="peer returned .* 40 rows of 3 were asked for"):
            greedy.check_lengths("peer", REQUEST, short)
