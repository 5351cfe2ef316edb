"""The statistics against statsmodels, published values, brute force, and simulation."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

from subl_jax.evaluate import statistics


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.8, 0.95]))
def test_wilson_and_clopper_pearson_equal_statsmodels(counts, confidence):
    successes, n = counts
    for ours, name in ((statistics.wilson, "wilson"), (statistics.clopper_pearson, "beta")):
        found = ours(successes, n, confidence)
        low, high = proportion_confint(successes, n, 1 - confidence, name)
        assert found.low == pytest.approx(low, abs=1e-10)
        assert found.high == pytest.approx(high, abs=1e-10)


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
        assert statistics.holm(list(p_values)) == pytest.approx(list(expected), abs=1e-10)


def test_holm_rejects_exactly_what_the_step_down_procedure_rejects():
    p_values, alpha = [0.011, 0.3, 0.02, 0.012, 0.04], 0.05
    rejected, order = set(), sorted(range(5), key=lambda i: p_values[i])
    for rank, index in enumerate(order):  # Holm's procedure as he states it
        if p_values[index] > alpha / (5 - rank):
            break
        rejected.add(index)
    assert {i for i, p in enumerate(statistics.holm(p_values)) if p <= alpha} == rejected


# Against other implementations, to rounding


def _samples(count=60, seed=11):
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(0, 0.2), rng.uniform(0.01, 0.3), rng.integers(2, 12)) for _ in range(count)]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_student_t_equals_statsmodels_and_scipy_to_rounding(confidence):
    for differences in _samples():
        found = statistics.student_t_interval(differences, confidence)
        low, high = DescrStatsW(differences).tconfint_mean(1 - confidence)
        _, p_value, df = DescrStatsW(differences).ttest_mean(0)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-10)
        assert found.p_value == pytest.approx(p_value, abs=1e-10)
        expected: Any = stats.ttest_1samp(differences, 0)
        assert found.p_value == pytest.approx(expected.pvalue, abs=1e-10)
        assert found.df == df


def test_equivalence_equals_statsmodels_to_rounding():
    rng = np.random.default_rng(12)
    for differences in _samples():
        margin, test = float(rng.uniform(0.01, 0.4)), statistics.student_t_interval(differences)
        expected = DescrStatsW(differences).ttost_mean(-margin, margin)[0]
        assert statistics.equivalence_p(test, margin) == pytest.approx(expected, abs=1e-10)
        control = rng.random(len(differences))
        paired = ttost_paired(control + differences, control, -margin, margin)[0]
        assert statistics.equivalence_p(test, margin) == pytest.approx(paired, abs=1e-10)


def test_equivalence_of_seeds_without_any_spread_is_the_margin_itself():
    exact = statistics.student_t_interval([0.05, 0.05, 0.05])
    assert (statistics.equivalence_p(exact, 0.08), statistics.equivalence_p(exact, 0.05)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        statistics.equivalence_p(exact, 0)


def test_one_sided_p_equals_scipy_and_ignores_no_side():
    for differences in _samples():
        expected: Any = stats.ttest_1samp(differences, 0, alternative="greater")
        found = statistics.one_sided(statistics.student_t_interval(differences))
        assert found == pytest.approx(expected.pvalue, abs=1e-10)
        mirrored = statistics.one_sided(statistics.student_t_interval(-differences))
        assert found + mirrored == pytest.approx(1.0, abs=1e-10)
    assert statistics.one_sided(statistics.student_t_interval([0.1, 0.1])) == 0.0
    assert statistics.one_sided(statistics.student_t_interval([0.0, 0.0])) == 1.0


# McNemar, within a run


def _tasks(both, only, other, neither):
    treatment = [1] * (both + only) + [0] * (other + neither)
    return treatment, [1] * both + [0] * only + [1] * other + [0] * neither


@given(*[st.integers(0, 60)] * 4)
def test_mcnemar_equals_statsmodels(both, only, other, neither):
    if not both + only + other + neither:
        return
    found = statistics.mcnemar(*_tasks(both, only, other, neither))
    expected: Any = mcnemar([[both, only], [other, neither]], exact=True)
    assert (found.treatment_only, found.control_only, found.n) == (only, other, both + only + other + neither)
    assert found.p_value == pytest.approx(min(1.0, float(expected.pvalue)), abs=1e-10)


def test_mcnemar_equals_the_enumeration_of_all_ways_that_discordant_tasks_fall():
    for only, other in itertools.product(range(5), repeat=2):
        falls = [sum(fall) for fall in itertools.product((0, 1), repeat=only + other)]
        # As far from an even split as the one seen, either way.
        far = sum(abs(2 * one - only - other) >= abs(only - other) for one in falls) / len(falls)
        assert statistics.mcnemar(*_tasks(1, only, other, 2)).p_value == pytest.approx(far, abs=1e-12)


def test_mcnemar_without_a_discordant_task_finds_nothing_and_says_where_it_holds():
    found = statistics.mcnemar([1, 1, 0], [1, 1, 0])
    assert found.p_value == 1.0
    assert found.method.startswith("within-run only")


@pytest.mark.parametrize(("treatment", "control"), [([1], [1, 0]), ([], []), ([0.5], [0]), ([float("nan")], [0])])
def test_mcnemar_refuses_what_is_no_pair_of_binary_lists(treatment, control):
    with pytest.raises(ValueError, match="mcnemar"):
        statistics.mcnemar(treatment, control)


# Sign flips, over seeds


def test_sign_flip_equals_scipys_exact_permutation_test():
    for differences in _samples():
        expected: Any = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=2**12, vectorized=False
        )
        # SciPy doubles the smaller tail, which is the same: the flipped means lie symmetrically about zero.
        assert statistics.sign_flip(differences) == pytest.approx(expected.pvalue, abs=1e-10)


@pytest.mark.parametrize("differences", [[0.3, 0.3, -0.3, 0.1], [0.1, 0.2, 0.3, 0.6], [0.0, 0.0, 0.1], [0.0, 0.0]])
def test_sign_flip_counts_ties_as_the_enumeration_in_whole_numbers_does(differences):
    whole = [round(10 * value) for value in differences]
    sums = [
        sum(s * v for s, v in zip(signs, whole, strict=True)) for signs in itertools.product((1, -1), repeat=len(whole))
    ]
    expected = sum(abs(total) >= abs(sum(whole)) for total in sums) / len(sums)
    assert statistics.sign_flip(differences) == expected


def test_five_seeds_cannot_go_below_one_in_sixteen():
    assert statistics.sign_flip([0.5, 0.6, 0.7, 0.8, 0.9]) == 0.0625


@pytest.mark.parametrize("differences", [[], [0.1] * 21, [0.1, float("nan")]])
def test_sign_flip_refuses_what_it_cannot_enumerate(differences):
    with pytest.raises(ValueError, match="seeds|NaN"):
        statistics.sign_flip(differences)


def test_twenty_seeds_are_enumerated_within_a_second():
    start = time.monotonic()
    assert statistics.sign_flip(np.arange(1, 21)) == 2 / 2**20
    assert time.monotonic() - start < 1


# The hierarchical bootstrap


def _all_seed_means(families):
    """The mean of every equally likely resample of one seed: families, then tasks within each family drawn."""
    for drawn in itertools.product(families, repeat=len(families)):
        for tasks in itertools.product(*[itertools.product(family, repeat=len(family)) for family in drawn]):
            values = [value for family in tasks for value in family]
            yield sum(values) / len(values)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_bootstrap_limits_are_quantiles_of_all_resamples(confidence):
    treatment = [[[1.0, 0.3], [0.9, 0.0]], [[0.55, 0.2], [0.75, 0.12]]]  # seed, family, task
    control = [[[0.1, 0.0], [0.0, 0.06]], [[0.21, 0.0], [0.0, 0.03]]]
    differences = [
        [np.subtract(*pair) for pair in zip(*both, strict=True)] for both in zip(treatment, control, strict=True)
    ]
    # Seeds have as many resamples here, so that all of them are equally likely.
    each = np.array([mean for seed in differences for mean in _all_seed_means(seed)])
    exact = np.sort(np.add.outer(each, each).ravel() / 2)
    families, draws = [["a", "a", "b", "b"]] * 2, 40_000
    found = statistics.hierarchical_bootstrap(
        [sum(seed, []) for seed in treatment], [sum(seed, []) for seed in control], families, confidence, draws
    )
    tail = (1 - confidence) / 2
    error = 4 * math.sqrt(tail * (1 - tail) / draws)
    for limit, share in ((found.low, tail), (found.high, 1 - tail)):
        assert np.searchsorted(exact, limit - 1e-9) / len(exact) <= share + error
        assert np.searchsorted(exact, limit + 1e-9, side="right") / len(exact) >= share - error
    assert found.estimate == pytest.approx(np.mean([np.mean(seed) for seed in differences]))


def test_families_of_unequal_size_weigh_by_their_tasks():
    # One seed: a family of one task at 1 and a family of two at 0 -> resampled means 1 (1/4), 1/3 (1/2), 0 (1/4).
    treatment, control, families = [[1, 0, 0]], [[0, 0, 0]], [["a", "b", "b"]]
    wide = statistics.hierarchical_bootstrap(treatment, control, families, confidence=0.6)
    narrow = statistics.hierarchical_bootstrap(treatment, control, families, confidence=0.4)
    assert (wide.low, wide.high) == (0.0, 1.0)
    assert (narrow.low, narrow.high) == pytest.approx((1 / 3, 1 / 3))


def test_one_task_per_seed_leaves_scipys_percentile_bootstrap_of_seeds():
    differences = np.array([0.41, 0.55, 0.62, 0.2, 0.48, 0.9])
    expected: Any = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=60_000, rng=np.random.default_rng(1)
    )
    found = statistics.hierarchical_bootstrap(
        [[value] for value in differences], [[0.0]] * 6, [["all"]] * 6, draws=60_000
    )
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.004)


def test_treatment_and_control_are_resampled_together():
    rng = np.random.default_rng(14)
    control = [rng.random(30) for _ in range(4)]
    families = [[f"family{i % 5}" for i in range(30)]] * 4
    found = statistics.hierarchical_bootstrap([c + 0.25 for c in control], control, families)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))  # apart, the control's own variance would show


def _whole_run(seeds=5, tasks=240):
    rng = np.random.default_rng(15)
    families = [[f"family{i % 7}" for i in range(tasks)]] * seeds
    draw = lambda rate: [rng.random(tasks) < rate for _ in range(seeds)]  # noqa: E731
    return draw(0.6), draw(0.05), families


def test_bootstrap_is_reproducible_from_its_seed_and_fast():
    start = time.monotonic()
    found = statistics.hierarchical_bootstrap(*_whole_run(), seed=3)
    assert time.monotonic() - start < 2
    assert found == statistics.hierarchical_bootstrap(*_whole_run(), seed=3)
    assert found == statistics.hierarchical_bootstrap(*_whole_run(), seed=np.random.default_rng(3))
    assert found != statistics.hierarchical_bootstrap(*_whole_run(), seed=4)
    assert "seeds, families within a seed, tasks within a family" in found.method
    assert "5 here) that differ it covers less than it says" in found.method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], [[0], [0]], [["a"]]), "one entry per seed"),
        (([], [], []), "one entry per seed"),
        (([[1, 0]], [[0]], [["a", "b"]]), "1 items but 2 families"),
        (([[float("nan")]], [[0]], [["a"]]), "NaN"),
    ],
)
def test_bootstrap_refuses_seeds_that_do_not_match(arguments, message):
    with pytest.raises(ValueError, match=message):
        statistics.hierarchical_bootstrap(*arguments)


def test_bootstrap_refuses_too_few_draws():
    with pytest.raises(ValueError, match="draws=10"):
        statistics.hierarchical_bootstrap([[1]], [[0]], [["a"]], draws=10)


# "This pair is the strongest"


def test_the_intersection_union_test_rejects_exactly_where_every_component_does():
    for p_values in itertools.product((0.0, 0.049, 0.05, 0.051, 1.0), repeat=3):
        assert (statistics.intersection_union(p_values) <= 0.05) == all(p <= 0.05 for p in p_values)


@pytest.mark.parametrize("p_values", [[], [0.1, 1.5], [float("nan")]])
def test_the_intersection_union_test_needs_p_values(p_values):
    with pytest.raises(ValueError, match="p-value"):
        statistics.intersection_union(p_values)


def test_the_clustered_standard_error_is_that_of_the_sums_over_families():
    """Brute force over pairs of items of one family, with the G/(G-1) correction."""
    rng = np.random.default_rng(3)
    families = [f"f{index % 4}" for index in range(22)]
    values = rng.normal(1, 2, 22) + [2.0 * int(name[1]) for name in families]
    left = values - values.mean()
    total = sum(
        left[a] * left[b] for a in range(22) for b in range(22) if families[a] == families[b]
    )  # fmt: skip
    wanted = math.sqrt(4 / 3 * total) / 22
    assert statistics.clustered_standard_error(values, families) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="at least 2 families"):
        statistics.clustered_standard_error(values, ["one"] * 22)
