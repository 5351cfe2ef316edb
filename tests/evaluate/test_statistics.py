"""The statistics against statsmodels, published values, brute force, and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from subl_jax.evaluate import statistics


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_and_clopper_pearson_equal_statsmodels(counts, confidence):
    successes, n = counts
    for ours, name in ((statistics.wilson, "wilson"), (statistics.clopper_pearson, "beta")):
        found = ours(successes, n, confidence)
        low, high = proportion_confint(successes, n, 1 - confidence, name)
        assert found.low == pytest.approx(low, abs=1e-9)
        assert found.high == pytest.approx(high, abs=1e-9)


def test_wilson_equals_the_published_example_of_newcombe():
    # Newcombe (1998), Statistics in Medicine 17:857-872, table I: 81/263 by the score method without correction.
    found = statistics.wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_clopper_pearson_limits_are_where_the_binomial_tails_hold_two_and_a_half_percent():
    found = statistics.clopper_pearson(7, 40)
    assert stats.binom.sf(6, 40, found.low) == pytest.approx(0.025)
    assert stats.binom.cdf(7, 40, found.high) == pytest.approx(0.025)


@pytest.mark.parametrize(("successes", "method"), [(0, "Clopper-Pearson"), (20, "Clopper-Pearson"), (1, "Wilson")])
def test_rate_interval_is_exact_at_the_ends_and_wilson_between(successes, method):
    found = statistics.rate_interval(successes, 20)
    assert found.method == method
    if successes == 0:  # the rule of three's exact form
        assert found.high == pytest.approx(1 - 0.025 ** (1 / 20))


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused_with_their_limit(successes, n):
    with pytest.raises(ValueError, match="n="):
        statistics.rate_interval(successes, n)


def _clustered_sample(rng, groups=8, size=25, spread=1.5):
    rates = 1 / (1 + np.exp(-rng.normal(-0.5, spread, groups)))
    sizes = rng.integers(size // 2, size, groups)
    outcomes = np.concatenate([rng.random(count) < rate for count, rate in zip(sizes, rates, strict=True)])
    return outcomes, np.repeat([f"family{g}" for g in range(groups)], sizes)


def test_cluster_standard_error_equals_statsmodels_cluster_robust_regression():
    rng = np.random.default_rng(0)
    outcomes, families = _clustered_sample(rng)
    values, groups = outcomes.astype(float), np.unique(families, return_inverse=True)[1]
    # statsmodels multiplies by (n-1)/(n-k), which is 1 with an intercept only.
    fit = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    found = statistics.cluster_interval(outcomes, families)
    low, high = fit.conf_int()[0]
    assert found.low == pytest.approx(max(0.0, low))
    assert found.high == pytest.approx(high)


def test_cluster_interval_covers_where_the_independent_one_does_not():
    rng = np.random.default_rng(1)
    # Truth: the mean of the families' rates over their distribution, by a large draw.
    truth = float(np.mean(1 / (1 + np.exp(-rng.normal(-0.5, 1.5, 400_000)))))
    clustered = independent = 0
    draws = 400
    for _ in range(draws):
        outcomes, families = _clustered_sample(rng)
        found = statistics.cluster_interval(outcomes, families)
        clustered += found.low <= truth <= found.high
        naive = statistics.rate_interval(int(outcomes.sum()), len(outcomes))
        independent += naive.low <= truth <= naive.high
    assert clustered / draws > 0.9
    assert independent / draws < 0.7


def test_cluster_interval_is_never_narrower_than_wilson():
    # Every family has the same rate exactly, so the clustered variance is zero.
    outcomes, families = [1, 0] * 10, sum(([f] * 2 for f in range(10)), [])
    found, floor = statistics.cluster_interval(outcomes, families), statistics.wilson(10, 20)
    assert (found.low, found.high) == (floor.low, floor.high)


def test_cluster_interval_of_one_family_is_refused():
    with pytest.raises(ValueError, match="at least 2 families, got 1"):
        statistics.cluster_interval([1, 0, 1], ["logs"] * 3)


def test_student_t_equals_scipy():
    differences = [0.41, 0.55, 0.62]
    found = statistics.student_t_interval(differences)
    expected: Any = stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval(0.95)
    assert (found.mean, found.p_value) == pytest.approx((np.mean(differences), expected.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_student_t_equals_students_own_sleep_data():
    # Student (1908), Biometrika 6:1-25: differences of two hyoscyamines; t = 4.0621, p = .00283 two-sided.
    gains = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = statistics.student_t_interval(gains)
    assert found.mean / found.standard_error == pytest.approx(4.0621, abs=1e-4)
    assert found.p_value == pytest.approx(0.00283, abs=1e-5)


def test_seeds_that_agree_exactly_are_floored_at_the_resolution():
    found = statistics.student_t_interval([1.0, 1.0, 1.0], resolution=1 / 200)
    assert found.low == pytest.approx(1 - stats.t.ppf(0.975, 2) * 0.005 / math.sqrt(3))
    assert "floored" in found.method
    assert statistics.student_t_interval([0.0, 0.0], resolution=0.01).p_value == 1.0


def test_one_seed_has_no_t_interval_over_seeds():
    with pytest.raises(ValueError, match="at least 2 seeds, got 1"):
        statistics.student_t_interval([0.5])


def test_paired_difference_equals_cluster_robust_regression_of_the_differences():
    rng = np.random.default_rng(3)
    families = np.repeat(np.arange(9), 20)
    effect = rng.normal(0.3, 0.4, 9)[families]  # families differ, so the clustered error is the larger one
    control = rng.random(len(families))
    treatment = control + effect + rng.normal(0, 0.2, len(families))
    fit = OLS(treatment - control, np.ones(len(families))).fit(
        cov_type="cluster", cov_kwds={"groups": families}, use_t=True
    )
    found = statistics.paired_difference(treatment, control, families)
    assert (found.low, found.high) == pytest.approx(tuple(fit.conf_int()[0]))
    assert found.p_value == pytest.approx(float(fit.pvalues[0]), rel=1e-6)
    assert found.method.startswith("within-run only")


def test_paired_difference_is_never_surer_than_independent_tasks():
    families = [f for f in range(6) for _ in range(10)]
    treatment = [float(i % 2) for i in range(60)]  # every family at exactly one half: no variance between families
    found = statistics.paired_difference(treatment, [0.0] * 60, families)
    assert found.standard_error == pytest.approx(np.std(treatment, ddof=1) / math.sqrt(60))


def test_missing_readouts_are_not_averaged_over():
    with pytest.raises(ValueError, match="NaN"):
        statistics.paired_difference([0.1, float("nan")], [0.0, 0.0], ["a", "b"])


def test_equivalence_agrees_with_the_ninety_percent_interval():
    rng = np.random.default_rng(4)
    for _ in range(200):
        differences = rng.normal(0.03, 0.03, 4)
        found = statistics.student_t_interval(differences)
        narrow = statistics.student_t_interval(differences, confidence=0.9)
        inside = -0.08 < narrow.low and narrow.high < 0.08
        assert (statistics.equivalence_p(found, 0.08) < 0.05) == inside


def test_holm_equals_statsmodels():
    rng = np.random.default_rng(5)
    for size in range(1, 13):
        p_values = rng.random(size) ** 3
        p_values[rng.integers(size)] = p_values[0]  # ties
        expected = np.asarray(multipletests(p_values, method="holm")[1])
        assert statistics.holm(list(p_values)) == pytest.approx(list(expected))


def test_holm_rejects_exactly_what_the_step_down_procedure_rejects():
    p_values, alpha = [0.011, 0.3, 0.02, 0.012, 0.04], 0.05
    rejected, order = set(), sorted(range(5), key=lambda i: p_values[i])
    for rank, index in enumerate(order):  # Holm's procedure as he states it
        if p_values[index] > alpha / (5 - rank):
            break
        rejected.add(index)
    assert {i for i, p in enumerate(statistics.holm(p_values)) if p <= alpha} == rejected
