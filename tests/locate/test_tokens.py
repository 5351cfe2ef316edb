"""Concentration, kinds and banned parts against brute force over single tokens and the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest

from subl_jax.locate import tokens
from subl_jax.locate.places import KINDS, Place
from tests.distill import tiny


def made(values: list[float], kinds: list[str] | None = None) -> tokens.LossTokens:
    """Loss tokens of one document with these divergences."""
    kinds = kinds or [KINDS[0]] * len(values)
    places = [Place(n, 0, kind, f"w{n % 2}") for n, kind in enumerate(kinds)]
    return tokens.LossTokens(np.zeros(len(values), int), places, {"it": np.asarray(values)})


def test_the_curve_is_the_share_that_the_largest_carry_and_ends_at_one():
    values = np.asarray([0.0, 5.0, 1.0, 4.0])
    assert tokens.concentration(values, (0.25, 0.5, 0.75, 1.0)) == pytest.approx([0.5, 0.9, 1.0, 1.0])
    assert tokens.concentration(values, (0.125,)) == pytest.approx([0.25])  # half of the largest token
    even = tokens.concentration(np.ones(7), tokens.SHARES)
    np.testing.assert_allclose(even, tokens.SHARES)


def test_gini_is_half_the_mean_absolute_difference_over_the_mean():
    values = np.random.default_rng(0).exponential(size=41) ** 2
    by_pairs = sum(abs(a - b) for a in values for b in values) / len(values) ** 2 / 2 / values.mean()
    assert tokens.gini(values) == pytest.approx(by_pairs, rel=1e-12)
    assert tokens.gini(np.ones(5)) == pytest.approx(0.0)
    assert tokens.gini(np.eye(50)[0]) == pytest.approx(0.98)


@pytest.mark.parametrize(("values", "half"), [([1.0] * 6, 3), ([9, 1, 1, 1], 1), ([3, 3, 2, 2], 2), ([1.0], 1)])
def test_half_is_carried_by_the_fewest_tokens_that_reach_it(values, half):
    assert tokens.carrying(np.asarray(values, float)) == half


def test_nothing_to_rank_is_refused():
    with pytest.raises(ValueError, match="3 tokens sum to 0.0: nothing can be ranked"):
        tokens.concentration(np.zeros(3))


def test_kinds_share_out_all_tokens_and_all_of_the_divergence():
    rng = np.random.default_rng(1)
    kinds = [KINDS[n] for n in rng.integers(0, 4, 90)]
    table = made((rng.exponential(size=90) ** 2).tolist(), kinds)
    families = [f"f{n % 5}" for n in range(90)]
    rows = {row["kind"]: row for row in tokens.by_kind(table, "it", families)}
    assert list(rows) == list(KINDS)
    for kind, row in rows.items():
        own = [value for value, each in zip(table.values["it"], kinds, strict=True) if each == kind]
        assert row["tokens"] == len(own) and row["token_share"] == len(own) / 90
        assert row["divergence_share"] == pytest.approx(sum(own) / table.values["it"].sum())
        assert row["mean"] == (pytest.approx(np.mean(own)) if own else None)
        assert 0 <= row["low"] <= row["divergence_share"] <= row["high"] <= 1
    assert sum(row["divergence_share"] for row in rows.values()) == pytest.approx(1)


def test_the_interval_of_a_share_is_as_wide_as_resampled_families_spread():
    rng = np.random.default_rng(2)
    families = np.repeat(np.arange(40), 25)
    kinds = [KINDS[n] for n in rng.integers(0, 2, 1000)]
    values = rng.exponential(size=1000) * np.repeat(rng.uniform(0.5, 1.5, 40), 25)
    table = made(values.tolist(), kinds)
    row = tokens.by_kind(table, "it", [f"f{each}" for each in families])[0]
    here = np.asarray(kinds) == KINDS[0]
    drawn = []
    for _ in range(600):
        picked = np.concatenate([np.flatnonzero(families == each) for each in rng.integers(0, 40, 40)])
        drawn.append(values[picked][here[picked]].sum() / values[picked].sum())
    # Of at least the width of independent tokens, so a little wider than families alone say.
    assert 0.9 < (row["high"] - row["low"]) / (2 * 2.02 * np.std(drawn)) < 1.5


def test_overlap_counts_the_most_divergent_that_two_comparisons_share():
    table = made([9.0, 8.0, 1.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    table = tokens.LossTokens(
        table.document, table.places, {**table.values, "other": table.values["it"][[0, 2, 1, *range(3, 10)]]}
    )
    assert tokens.overlap(table, "it", "other", 0.2) == 0.5
    assert tokens.overlap(table, "it", "it", 0.2) == 1.0


def test_words_gather_all_of_their_places():
    rows = tokens.by_text(made([1.0, 5.0, 2.0, 0.0]), "it", 5)
    assert [(row["text"], row["places"], row["divergence_share"]) for row in rows] == [
        ("w1", 2, 0.625),
        ("w0", 2, 0.375),
    ]


def test_the_banned_part_and_the_rest_make_the_whole_divergence_and_none_is_negative():
    rng = np.random.default_rng(3)
    p, q = (np.log(rng.dirichlet(np.full(12, 0.3), size=6) + 1e-12) for _ in range(2))
    whole = [sum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    banned, rest = tokens.banned_part(p[:, :4], q[:, :4]), tokens.banned_part(p[:, 4:], q[:, 4:])
    np.testing.assert_allclose(banned + rest, whole, rtol=1e-9, atol=1e-9)
    assert (banned >= 0).all() and (rest >= 0).all()
    padded = np.full((6, 2), -np.inf)
    np.testing.assert_allclose(tokens.banned_part(np.hstack([p[:, :4], padded]), np.hstack([q[:, :4], padded])), banned)


def test_values_line_up_with_places_and_the_largest_comes_first():
    first, second = tiny.document([1, 2, 3, 4], [1, 3]), tiny.document([5, 6, 7], [2])
    places = [[Place(1, 0, KINDS[0], "a"), Place(3, 0, KINDS[1], "b")], [Place(2, 0, KINDS[2], "c")]]
    table = tokens.loss_tokens([first, second], places, {"it": [np.asarray([0, 0.5, 0, 3.0]), np.asarray([0, 0, 2.0])]})
    assert table.values["it"].tolist() == [0.5, 3.0, 2.0] and table.document.tolist() == [0, 0, 1]
    assert [table.places[row].text for row in table.ranked("it")] == ["b", "c", "a"]
