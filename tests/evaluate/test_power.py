"""Power against statsmodels, enumeration of every table, and simulation."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import TTestPower

from subl_jax.evaluate import power, statistics

DOCS = Path(__file__).resolve().parents[2] / "docs"
DRAWS = 40_000


@given(st.floats(0, 1), st.floats(0.02, 0.4), st.integers(2, 12), st.sampled_from([0.05, 0.05 / 7]))
def test_power_of_students_t_equals_statsmodels(effect, sd, seeds, alpha):
    expected = TTestPower().power(effect / sd, seeds, alpha)
    if math.isnan(expected):  # statsmodels hands on SciPy's NaN of the negligible tail
        expected = stats.nct.sf(stats.t.ppf(1 - alpha / 2, seeds - 1), seeds - 1, effect / sd * math.sqrt(seeds))
    assert power.t_power(effect, sd, seeds, alpha) == pytest.approx(min(1.0, expected), abs=1e-10)


def test_power_of_students_t_is_how_often_it_rejects():
    rng = np.random.default_rng(0)
    for effect, sd, seeds in ((0.10, 0.07, 5), (0.25, 0.14, 3), (0.05, 0.07, 8)):
        samples = rng.normal(effect, sd, (DRAWS, seeds))
        expected: Any = stats.ttest_1samp(samples, 0, axis=1)
        rejected = np.mean(expected.pvalue <= 0.05)
        assert power.t_power(effect, sd, seeds) == pytest.approx(rejected, abs=4 * 0.5 / math.sqrt(DRAWS))


def test_power_without_an_effect_is_alpha_and_of_a_huge_one_is_one():
    assert power.t_power(0.0, 0.1, 5, 0.03) == pytest.approx(0.03)
    assert power.t_power(1.0, 1e-4, 8) == power.t_power(-1.0, 1e-4, 8) == 1.0


def test_the_minimum_detectable_difference_equals_statsmodels():
    for seeds, alpha in itertools.product((3, 5, 8), (0.05, 0.05 / 7)):
        expected = 0.13 * TTestPower().solve_power(nobs=seeds, alpha=alpha, power=0.8)
        assert power.minimum_detectable(0.13, seeds, 0.8, alpha) == pytest.approx(expected, rel=1e-6)


def test_needed_seeds_are_the_fewest_that_reach_the_power():
    for effect in (0.05, 0.1, 0.3):
        seeds = power.seeds_needed(effect, 0.12)
        assert power.t_power(effect, 0.12, seeds) >= 0.8
        assert seeds == 2 or power.t_power(effect, 0.12, seeds - 1) < 0.8
        assert seeds == max(2, math.ceil(TTestPower().solve_power(effect / 0.12, alpha=0.05, power=0.8)))
    with pytest.raises(ValueError, match="more than 1000 seeds"):
        power.seeds_needed(0.0001, 0.5)


@pytest.mark.parametrize(
    ("sd", "seeds", "difference"), [(0.02, 5, 0.0), (0.07, 5, 0.02), (0.04, 3, 0.0), (0.05, 8, 0.08)]
)
def test_equivalence_power_is_how_often_equivalence_is_claimed(sd, seeds, difference):
    samples = np.random.default_rng(1).normal(difference, sd, (4000, seeds))
    claimed = np.mean([statistics.equivalence_p(statistics.student_t_interval(s), 0.08) <= 0.05 for s in samples])
    found = power.equivalence_power(0.08, sd, seeds, difference)
    assert found == pytest.approx(claimed, abs=4 * math.sqrt(max(0.002, found * (1 - found)) / len(samples)))


def test_equivalence_power_at_the_margin_is_alpha_where_the_other_margin_is_far():
    assert power.equivalence_power(1.0, 0.05, 5, 1.0) == pytest.approx(0.05, abs=1e-8)
    assert power.equivalence_power(0.08, 1e-5, 5) == pytest.approx(1.0, abs=1e-8)


def _fisher(table) -> float:
    found: Any = stats.fisher_exact(table)
    return found.pvalue


def test_fisher_power_equals_scipys_test_on_every_table():
    n, rates = 9, (0.45, 0.1)
    expected = sum(
        stats.binom.pmf(a, n, rates[0]) * stats.binom.pmf(b, n, rates[1])
        for a, b in itertools.product(range(n + 1), repeat=2)
        if _fisher([[a, n - a], [b, n - b]]) <= 0.05
    )
    assert power.fisher_power(*rates, n) == pytest.approx(expected, abs=1e-10)


def test_the_papers_twenty_items_miss_thirty_against_five_percent_more_often_than_not():
    # 30 % against 5 %, n = 20: .446 by enumeration with SciPy's own fisher_exact on all 441 tables (as the test above).
    assert power.fisher_power(0.30, 0.05, 20) == pytest.approx(0.4457, abs=5e-5)
    assert power.fisher_power(0.30, 0.05, 240) > 0.999


def test_mcnemar_power_equals_statsmodels_test_on_every_table():
    n, only, other = 11, 0.42, 0.06
    expected = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b <= n and mcnemar([[0, a], [b, n - a - b]], exact=True).pvalue <= 0.05:  # pyright: ignore
            expected += stats.multinomial.pmf([a, b, n - a - b], n, [only, other, 1 - only - other])
    assert power.mcnemar_power(only, other, n) == pytest.approx(expected, abs=1e-10)
    assert power.mcnemar_power(0.0, 0.0, n) == 0.0


def test_the_spread_of_an_earlier_run_is_that_of_its_per_seed_differences():
    summary = json.loads((DOCS / "api_tiny_summary.json").read_text())
    primary = next(contrast for contrast in summary["contrasts"] if contrast["role"] == "primary")
    rates = {
        name: [seed["behaviour_rate"] for seed in summary["conditions"][name]["per_seed"]]
        for name in (primary["treatment"], primary["control"])
    }
    expected = np.std(np.subtract(rates[primary["treatment"]], rates[primary["control"]]), ddof=1)
    assert power.spread(primary) == pytest.approx(expected)
    with pytest.raises(ValueError, match="has 1 seed"):
        power.spread({"name": "x", "per_seed": [{"difference": 0.1}]})


def test_the_table_before_a_run_states_power_for_one_contrast_and_for_holms_first_step():
    head, columns, row = power.lines({"api: student": 0.135}, 5, margin=0.08)
    assert "5 seeds" in head and "7 pairs" in head
    assert "found with 0.8" in columns and columns.endswith("equal within ±8 at 0.025")
    for value in (power.t_power(0.25, 0.135, 5), power.t_power(0.25, 0.135, 5, 0.05 / 7)):
        assert f"{value:.2f}" in row
    assert f"{100 * power.minimum_detectable(0.135, 5):.0f} /" in row


@pytest.mark.parametrize("margin", [0.08, 0.2])
def test_the_power_of_a_claimed_null_is_at_the_level_and_margin_that_verdicts_use(margin):
    *_, columns, row = power.lines({"api: control": 0.05}, 5, margin=margin)
    samples = np.random.default_rng(2).normal(0.0, 0.05, (4000, 5))
    # A verdict of "equivalent" is a 95 % interval inside the margin.
    low, high = (stats.ttest_1samp(samples, 0, axis=1).confidence_interval(0.95)[index] for index in (0, 1))
    claimed = np.mean((low > -margin) & (high < margin))
    assert float(row.split()[-1]) == pytest.approx(claimed, abs=0.03)
    assert f"±{100 * margin:g} at 0.025" in columns


def test_a_difference_that_no_rates_can_have_is_not_promised():
    *_, row = power.lines({"two seeds": 0.3, "few": 0.1}, 2, margin=0.08)[:3]
    assert "none / none" in row and not any(int(number) > 100 for number in row.split() if number.isdigit())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power.t_power(0.1, 0.0, 5), "sd=0.0 must be positive"),
        (lambda: power.t_power(0.1, 0.1, 1), "seeds=1"),
        (lambda: power.t_power(0.1, 0.1, 5, 1.0), "alpha=1.0"),
        (lambda: power.minimum_detectable(0.1, 5, 0.01), "no more than alpha"),
        (lambda: power.minimum_detectable(0.1, 5, 1.0), "power=1.0"),
        (lambda: power.equivalence_power(0.0, 0.1, 5), "must be positive"),
        (lambda: power.fisher_power(1.2, 0.1, 20), "probability 1.2"),
        (lambda: power.mcnemar_power(0.7, 0.6, 20), "probability 1.2"),
        (lambda: power.fisher_power(0.2, 0.1, 0), "n=0"),
        (lambda: power.lines({"a": 0.1}, 5, pairs=0, margin=0.08), "pairs=0"),
    ],
)
def test_impossible_designs_are_refused_with_their_limit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
