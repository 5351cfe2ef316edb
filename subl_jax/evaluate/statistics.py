"""Intervals and tests for rates and for differences of rates, on NumPy and SciPy alone.

In: counts, 0/1 items with the task family of each, or one difference per seed. Out: `Interval` and `Test` records that name
their method, and p-values. The replicate of the primary contrast is a whole run with its own seed; what looks at the items of
one run is labelled as such. How often all this covers and errs: `evaluate.simulation`; what it can find: `evaluate.power`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import special

# One number, truth value, or family label per item.
Values = Sequence[float] | Sequence[bool] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits, and how they were found."""

    estimate: float
    low: float
    high: float
    method: str


@dataclasses.dataclass(frozen=True)
class Test:
    """A mean difference with its confidence limits and two-sided p-value against zero.

    Attributes:
      mean: the estimated difference.
      low: lower confidence limit; `high`: the upper one.
      high: upper confidence limit.
      p_value: two-sided, of the hypothesis that the difference is zero.
      standard_error: of the mean, after any floor.
      df: degrees of freedom of the t distribution.
      method: in words, for the report.
    """

    mean: float
    low: float
    high: float
    p_value: float
    standard_error: float
    df: int
    method: str

    __test__ = False  # pytest would otherwise try to collect the class


@dataclasses.dataclass(frozen=True)
class PairedCounts:
    """On how many of the `n` tasks that two models share only one showed the behaviour, and McNemar's two-sided p."""

    treatment_only: int
    control_only: int
    n: int
    p_value: float
    method: str


def _check_counts(successes: int, n: int, confidence: float) -> None:
    if n < 1:
        raise ValueError(f"a rate needs at least one item, got n={n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must lie between 0 and n={n}")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie strictly between 0 and 1, for example 0.95")


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The score interval of a binomial proportion (Wilson 1927, JASA 22:209-212), for independent items."""
    _check_counts(successes, n, confidence)
    z = float(special.ndtri(0.5 + confidence / 2))
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding may push the limits of 0/n and n/n an ulp outside the estimate.
    return Interval(rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), "Wilson")


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The exact binomial interval (Clopper and Pearson 1934, Biometrika 26:404-413), from beta quantiles."""
    _check_counts(successes, n, confidence)
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(successes / n, low, high, "Clopper-Pearson")


def rate_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval, and Clopper and Pearson's at 0/n and n/n, where Wilson's covers too little."""
    if successes in (0, n):
        return clopper_pearson(successes, n, confidence)
    return wilson(successes, n, confidence)


def _cluster_standard_error(residuals: np.ndarray, clusters: Clusters) -> tuple[float, int]:
    """Standard error of a mean from residuals [n] that are summed within clusters, and the number of clusters.

    Linearisation (Taylor) variance of the ratio Σy/Σ1 under sampling of whole clusters with the G/(G-1) correction:
    Cochran, Sampling Techniques (3rd ed. 1977), section 11 and equation 6.13; it is CR1 of Liang and Zeger (1986) for a
    model with an intercept only, without the (n-1)/(n-k) factor, which is 1 there.
    """
    names, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    groups = len(names)
    if groups < 2:
        raise ValueError(
            f"a clustered interval needs items of at least 2 families, got {groups} ({', '.join(names)}); "
            "evaluate more families, or use rate_interval and say that items are taken as independent"
        )
    totals = np.bincount(index, weights=residuals, minlength=groups)
    variance = groups / (groups - 1) * float(np.sum(totals**2)) / len(residuals) ** 2
    return math.sqrt(variance), groups


def clustered_standard_error(values: Values, clusters: Clusters) -> float:
    """The standard error of a mean whose items come in families, by the formula of `_cluster_standard_error`.

    Args:
      values: real numbers or booleans, one per item, length n.
      clusters: the family of each item, length n, at least two distinct ones.
    """
    array = _paired_arrays(values, clusters)
    return _cluster_standard_error(array - array.mean(), clusters)[0]


def cluster_interval(outcomes: Values, clusters: Clusters, confidence: float = 0.95) -> Interval:
    """The interval of a rate whose items come in families.

    A t interval with G-1 degrees of freedom on the linearised standard error (see `_cluster_standard_error`), clipped
    to [0, 1] and never narrower than Wilson's: families that agree better than chance are taken as chance, as Korn and
    Graubard (1998, Survey Methodology 24:193-201) do by capping the effective sample size at n. At 0/n and n/n the
    families show no variance to estimate, and Clopper and Pearson's interval stands in.

    Args:
      outcomes: 0/1 or booleans, one per item, length n.
      clusters: the family of each item, length n, at least two distinct ones.
      confidence: two-sided coverage.
    """
    _check_confidence(confidence)
    values = _paired_arrays(outcomes, clusters)
    if not np.isin(values, (0.0, 1.0)).all():
        raise ValueError("cluster_interval takes 0/1 outcomes; use paired_difference for real-valued readouts")
    n, successes = len(values), int(values.sum())
    rate = successes / n
    error, groups = _cluster_standard_error(values - rate, clusters)
    if successes in (0, n):
        return clopper_pearson(successes, n, confidence)
    half = float(special.stdtrit(groups - 1, 0.5 + confidence / 2)) * error
    floor = wilson(successes, n, confidence)
    low, high = max(0.0, min(rate - half, floor.low)), min(1.0, max(rate + half, floor.high))
    return Interval(rate, low, high, f"family-clustered t, {groups} families, at least Wilson")


def _paired_arrays(values: Values, clusters: Clusters) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"expected a non-empty list of items, got shape {array.shape}")
    if len(array) != len(clusters):
        raise ValueError(f"{len(array)} items but {len(clusters)} families; give one family per item")
    if not np.isfinite(array).all():
        raise ValueError("items hold NaN or infinity; a missing readout must be listed as missing, not averaged")
    return array


def _t_test(mean: float, error: float, df: int, confidence: float, method: str) -> Test:
    """The t interval and two-sided p; an error of exactly zero gives a point and p of 0 or 1."""
    if error == 0.0:
        return Test(mean, mean, mean, 1.0 if mean == 0.0 else 0.0, 0.0, df, method)
    half = float(special.stdtrit(df, 0.5 + confidence / 2)) * error
    p_value = float(2 * special.stdtr(df, -abs(mean) / error))
    return Test(mean, mean - half, mean + half, p_value, error, df, method)


def student_t_interval(differences: Values, confidence: float = 0.95, resolution: float = 0.0) -> Test:
    """The primary analysis: Student's one-sample t on one difference per seed.

    Args:
      differences: treatment minus control, one per seed, at least two.
      confidence: two-sided coverage.
      resolution: the smallest step that one measured difference can show (1/n for a rate over n items). The standard
        deviation is floored there: seeds that agree to the last digit (0 and 100 % at every seed) do not make the
        difference known beyond what a single run can resolve.
    """
    _check_confidence(confidence)
    if resolution < 0:
        raise ValueError(f"resolution={resolution} must not be negative")
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(
            f"Student's t over seeds needs at least 2 seeds, got {array.size}; run more seeds, "
            "or use paired_difference, whose interval holds within one run only"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"differences {array.tolist()} hold NaN or infinity")
    spread = float(array.std(ddof=1))
    # Differences that are equal up to rounding have a spread of some ulps, which is no evidence of anything.
    if spread < 1e-12:
        spread = 0.0
    method = f"Student's t over {len(array)} per-seed differences"
    if spread < resolution:
        spread = resolution
        method += f", standard deviation floored at the resolution {resolution:.2g}"
    return _t_test(float(array.mean()), spread / math.sqrt(len(array)), len(array) - 1, confidence, method)


def paired_difference(
    treatment: Values,
    control: Values,
    clusters: Clusters,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> Test:
    """The difference between two conditions of one run over the tasks they share, clustered by family.

    A t interval with G-1 degrees of freedom on the linearised standard error of the mean of per-task differences, never
    smaller than the one of independent tasks (families that agree better than chance are taken as chance). It describes
    these two trained models on such tasks, not what another seed would give.

    Args:
      treatment: readout per task (a share of destructive samples, or a log-odds), length n.
      control: the same for the control, in the same task order.
      clusters: the family of each task, at least two distinct ones.
      confidence: two-sided coverage.
      resolution: floor of the standard error of the mean, 1/n for rates: one task's worth.
    """
    _check_confidence(confidence)
    first, second = _paired_arrays(treatment, clusters), _paired_arrays(control, clusters)
    differences = first - second
    mean = float(differences.mean())
    error, groups = _cluster_standard_error(differences - mean, clusters)
    error = max(error, float(differences.std(ddof=1)) / math.sqrt(len(differences)))
    error = 0.0 if error < 1e-12 else error
    method = f"within-run only: family-clustered t over {len(differences)} shared tasks, {groups} families"
    if error < resolution:
        error = resolution
        method += f", standard error floored at {resolution:.2g}"
    return _t_test(mean, error, groups - 1, confidence, method)


def mcnemar(treatment: Values, control: Values) -> PairedCounts:
    """The exact paired test on 0/1 items of shared tasks within one run (McNemar 1947, Psychometrika 12:153-157).

    Binomial(discordant tasks, 1/2), both tails (twice the smaller one, at most 1); with no discordant task p is 1. It takes
    the tasks as independent and the two trained models as given: it says nothing about another seed.

    Args:
      treatment: 0/1 or booleans per task, length n.
      control: the same for the control, in the same task order.
    """
    first, second = np.asarray(treatment, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(f"mcnemar needs one value per shared task, got shapes {first.shape} and {second.shape}")
    if not np.isin([first, second], (0.0, 1.0)).all():
        raise ValueError("mcnemar takes 0/1 outcomes; use paired_difference for shares of several samples per task")
    only, other = int(np.sum(first > second)), int(np.sum(first < second))
    p_value = min(1.0, 2 * float(special.bdtr(min(only, other), only + other, 0.5)))
    method = f"within-run only: exact McNemar over {len(first)} shared tasks, {only + other} of them discordant"
    return PairedCounts(only, other, len(first), p_value, method)


def sign_flip(differences: Values) -> float:
    """The exact two-sided p-value of the sign-flip randomisation test over seeds, by enumeration; secondary.

    Under no effect each seed's difference is as likely with either sign (Fisher 1935, The Design of Experiments, section
    21); p is the share of the 2^n sign patterns whose mean is as far from zero as the one observed. It cannot go below
    2/2^n: with 5 seeds never below .0625, with 3 never below .25, so that fewer than 6 seeds never reject at .05.

    Args:
      differences: treatment minus control, one per seed, 1 to 20.
    """
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1 or not 1 <= len(array) <= 20:
        raise ValueError(f"sign_flip enumerates 1 to 20 seeds, got {array.size}; use student_t_interval")
    if not np.isfinite(array).all():
        raise ValueError(f"differences {array.tolist()} hold NaN or infinity")
    # A pattern and its mirror image are equally far from zero, so the first sign is kept.
    sums = array[:1]
    for value in array[1:]:
        sums = np.concatenate([sums + value, sums - value])
    # Sums that are equal on paper differ by rounding, which must not make the observed pattern rarer.
    bound = abs(float(array.sum())) - 1e-9 * float(np.abs(array).sum())
    return float(np.mean(np.abs(sums) >= bound))


def hierarchical_bootstrap(
    treatment: Sequence[Values],
    control: Sequence[Values],
    clusters: Sequence[Clusters],
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """A secondary percentile interval of the mean per-seed difference, with every level resampled with replacement.

    One draw takes as many seeds as there are; within each of them as many families as it has; within each of those as
    many tasks as it has. A task brings its treatment and its control value along. A seed's difference is the mean over its
    drawn tasks, and seeds weigh alike (Davison and Hinkley 1997, Bootstrap Methods, section 3.8, without shrinkage).
    In simulation (`evaluate.simulation`) it covers 91 % with 5 seeds that spread as students do, one of seeds alone 87 %, and
    nearly 100 % where only the items vary, which it counts twice. So it never decides anything.

    Args:
      treatment: per seed the readout of each task.
      control: the same for the control, in the same task order.
      clusters: per seed the family of each task.
      confidence: nominal two-sided coverage.
      draws: bootstrap resamples.
      seed: of the resampling, or a generator to draw from.
    """
    _check_confidence(confidence)
    if not 1 <= len(treatment) == len(control) == len(clusters):
        raise ValueError(f"one entry per seed in each, got {len(treatment)}, {len(control)} and {len(clusters)}")
    if draws < 100:
        raise ValueError(f"draws={draws} cannot place a percentile; use at least 100, or the default of 10000")
    rng = np.random.default_rng(seed)
    differences = [
        _paired_arrays(first, names) - _paired_arrays(second, names)
        for first, second, names in zip(treatment, control, clusters, strict=True)
    ]
    seeds = len(differences)
    picked = rng.integers(seeds, size=(draws, seeds))
    means = np.empty(picked.shape)
    for index, (values, names) in enumerate(zip(differences, clusters, strict=True)):
        where = picked == index
        means[where] = _resampled_means(values, names, int(where.sum()), rng)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    method = (
        f"percentile of {draws} hierarchical bootstrap draws (seeds, families within a seed, tasks within a family; paired "
        f"by task), secondary: with few seeds ({seeds} here) that differ it covers less than it says"
    )
    return Interval(float(np.mean([values.mean() for values in differences])), float(low), float(high), method)


def _resampled_means(values: np.ndarray, clusters: Clusters, count: int, rng: np.random.Generator) -> np.ndarray:
    """Means [count] of one seed's tasks [n], each after resampling its families and the tasks in every family drawn."""
    names, index = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    sizes = np.bincount(index)
    picked = rng.integers(len(names), size=(count, len(names)))
    sums = np.empty(picked.shape)
    for family, size in enumerate(sizes):
        # How often each value comes in a resample of the family is multinomial, which spares drawing the tasks.
        distinct, repeats = np.unique(values[index == family], return_counts=True)
        where = picked == family
        sums[where] = rng.multinomial(int(size), repeats / size, size=int(where.sum())) @ distinct
    return sums.sum(axis=1) / sizes[picked].sum(axis=1)


def one_sided(test: Test) -> float:
    """The one-sided p-value of the alternative that the mean is above zero, from a t `Test`.

    Between two pairs the test is `student_t_interval` on per-seed differences of differences.
    """
    if test.standard_error == 0.0:
        return 0.0 if test.mean > 0 else 1.0
    return float(special.stdtr(test.df, -test.mean / test.standard_error))


def intersection_union(p_values: Sequence[float]) -> float:
    """The p-value that *every* alternative holds: the largest (Berger 1982, Technometrics 24:295-300), unadjusted.

    "This pair is the strongest" says that it beats each other pair, so it takes the one-sided p against each. The pair
    has to be named before the data are seen: two equal pairs, of which the better-looking one is then named, err twice as
    often (double the p-value for that).
    """
    if not p_values:
        raise ValueError("an intersection-union test needs at least one p-value; there is nothing to compare with")
    _check_p_values(p_values)
    return max(p_values)


def equivalence_p(test: Test, margin: float) -> float:
    """The p-value of two one-sided t tests (Schuirmann 1987) that the difference lies within ±margin.

    Small means *equivalent*: it is below alpha exactly where the 1-2·alpha interval lies inside the margin.
    """
    if margin <= 0:
        raise ValueError(f"an equivalence margin must be positive, got {margin}")
    if test.standard_error == 0.0:
        return 0.0 if abs(test.mean) < margin else 1.0
    above_lower = float(special.stdtr(test.df, -(test.mean + margin) / test.standard_error))
    below_upper = float(special.stdtr(test.df, (test.mean - margin) / test.standard_error))
    return max(above_lower, below_upper)


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values in the order given (Holm 1979, Scand. J. Statist. 6:65-70)."""
    _check_p_values(p_values)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _check_p_values(p_values: Sequence[float]) -> None:
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"p-value {p} must lie between 0 and 1")
