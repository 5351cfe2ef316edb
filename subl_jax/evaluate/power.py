"""What a design can find: power of the tests over seeds, and of the paper's tests on the items of one run.

In: an effect (a share, .50 = 50 points), the standard deviation that per-seed differences are expected to have, and the
number of seeds; or two rates and the number of items. Out: probabilities of rejecting, the smallest difference that is
found with a given power, the seeds that an effect needs, and a table to print before a run. No result of the run goes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import integrate, optimize, special, stats

from subl_jax.evaluate.verdicts import EQUIVALENCE_ALPHA

POWER = 0.8  # what a design is usually asked for
MOST_SEEDS = 1000  # beyond it, "more seeds" is no advice


def t_power(effect: float, sd: float, seeds: int, alpha: float = 0.05) -> float:
    """Power of the two-sided one-sample Student t over seeds, from the noncentral t (Cohen 1988, chapter 2).

    Args:
      effect: the true mean difference, a share; its sign does not matter.
      sd: standard deviation of the per-seed differences, in the same unit.
      seeds: at least 2.
      alpha: level of the test; Holm's first step over m pairs tests at alpha/m.
    """
    _check_design(sd, seeds, alpha)
    shift, df = abs(effect) / sd * math.sqrt(seeds), seeds - 1
    critical = float(stats.t.ppf(1 - alpha / 2, df))
    # SciPy's lower tail is NaN where it is below 1e-30 or so.
    wrong_side = float(np.nan_to_num(stats.nct.cdf(-critical, df, shift)))
    return min(1.0, float(stats.nct.sf(critical, df, shift)) + wrong_side)


def minimum_detectable(sd: float, seeds: int, power: float = POWER, alpha: float = 0.05) -> float:
    """The smallest true difference that `t_power` finds with this power, in the unit of `sd`."""
    _check_design(sd, seeds, alpha)
    _check_share("power", power)
    if power <= alpha:
        raise ValueError(f"power={power} is no more than alpha={alpha}, which no difference at all reaches")
    high = sd
    while t_power(high, sd, seeds, alpha) < power:
        high *= 2
    return _root(lambda effect: t_power(effect, sd, seeds, alpha) - power, 0.0, high)


def seeds_needed(effect: float, sd: float, power: float = POWER, alpha: float = 0.05) -> int:
    """The fewest seeds with which `t_power` reaches this power.

    Raises:
      ValueError: more than 1000 would be needed.
    """
    _check_share("power", power)
    for seeds in range(2, MOST_SEEDS + 1):
        if t_power(effect, sd, seeds, alpha) >= power:
            return seeds
    raise ValueError(f"effect={effect:g} at sd={sd:g} needs more than {MOST_SEEDS} seeds; look for a larger effect")


def equivalence_power(margin: float, sd: float, seeds: int, difference: float = 0.0, alpha: float = 0.05) -> float:
    """Probability that two one-sided t tests (`statistics.equivalence_p` below alpha) claim equivalence.

    Exact: given the sample standard deviation s, equivalence is claimed where |mean| < margin - t·s/√n; that normal
    probability is integrated over the chi distribution of s (Schuirmann 1987; Phillips 1990, J. Pharmacokin. Biopharm. 18:137).

    Args:
      margin: the equivalence margin, a share.
      sd: standard deviation of the per-seed differences.
      seeds: at least 2.
      difference: the true mean difference; at ±margin the result is the test's error rate.
      alpha: level of each one-sided test.
    """
    _check_design(sd, seeds, alpha)
    if margin <= 0:
        raise ValueError(f"an equivalence margin must be positive, got {margin}")
    df, error = seeds - 1, sd / math.sqrt(seeds)
    critical = float(stats.t.ppf(1 - alpha, df))

    def claimed(chi: float) -> float:
        room = margin - critical * error * chi / math.sqrt(df)
        inside = special.ndtr((room - difference) / error) - special.ndtr((-room - difference) / error)
        return float(inside * stats.chi.pdf(chi, df))

    # Beyond `last` no mean is close enough; chi has no mass worth counting beyond its median plus 12.
    last = min(margin * math.sqrt(df) / (critical * error), float(stats.chi.median(df)) + 12)
    found, _ = integrate.quad(claimed, 0.0, last, limit=200, epsabs=1e-12, epsrel=1e-10)
    return min(1.0, max(0.0, found))


def fisher_power(first: float, second: float, n: int, alpha: float = 0.05) -> float:
    """Power of Fisher's exact two-sided test on two independent groups of n items, by enumeration of all tables.

    The two-sided p sums the tables that are no likelier than the one seen, as in R and SciPy.
    """
    _check_rates(n, alpha, first, second)
    counts = np.arange(n + 1)
    rejected = np.zeros((n + 1, n + 1))
    for total in range(2 * n + 1):
        one = counts[max(0, total - n) : min(n, total) + 1]
        chances = stats.hypergeom.pmf(one, 2 * n, n, total)
        p_values = np.array([chances[chances <= chance * (1 + 1e-7)].sum() for chance in chances])
        rejected[one, total - one] = p_values <= alpha
    return float(stats.binom.pmf(counts, n, first) @ rejected @ stats.binom.pmf(counts, n, second))


def mcnemar_power(treatment_only: float, control_only: float, n: int, alpha: float = 0.05) -> float:
    """Power of the exact McNemar test on n shared tasks, by enumeration.

    Args:
      treatment_only: probability that a task shows the behaviour with the treatment only; for two models that answer
        independently at rates p and q it is p(1-q).
      control_only: that it does with the control only, q(1-p).
      n: shared tasks.
      alpha: level of the test.
    """
    discordant = treatment_only + control_only
    _check_rates(n, alpha, treatment_only, control_only, discordant)
    found = 0.0
    for count in range(1, n + 1):
        only = np.arange(count + 1)
        p_values = 2 * stats.binom.cdf(np.minimum(only, count - only), count, 0.5)
        share = treatment_only / discordant if discordant else 0.0
        chances = stats.binom.pmf(only, count, share)
        found += float(stats.binom.pmf(count, n, discordant)) * float(chances[p_values <= alpha].sum())
    return found


def spread(contrast: Mapping[str, Any]) -> float:
    """The standard deviation over seeds of one contrast of an earlier `summary.json` (or of a grid), a share."""
    differences = [seed["difference"] for seed in contrast["per_seed"]]
    if len(differences) < 2:
        raise ValueError(f"contrast {contrast['name']!r} has {len(differences)} seed; a spread needs at least 2")
    return float(np.std(differences, ddof=1))


def lines(
    spreads: Mapping[str, float],
    seeds: int,
    pairs: int = 7,
    effects: Sequence[float] = (0.05, 0.10, 0.25, 0.50),
    *,
    margin: float,
    alpha: float = 0.05,
) -> list[str]:
    """The power of a design as a table of text lines, to be printed before the run.

    Args:
      spreads: name -> assumed standard deviation of the per-seed differences, e.g. of earlier runs by `spread`.
      seeds: replicates that will be run.
      pairs: contrasts that share Holm's adjustment.
      effects: true differences, shares.
      margin: equivalence margin, a share; the last column is the power of a claimed null at the level that verdicts use.
      alpha: level of the family.
    """
    if pairs < 1:
        raise ValueError(f"pairs={pairs} must be at least 1")
    first = alpha / pairs
    heads = [f"{100 * effect:+.0f}" for effect in effects]
    equal = f"equal within ±{100 * margin:g} at {EQUIVALENCE_ALPHA:g}"
    width = max(map(len, [*spreads, "spread over seeds taken from"]))
    found = [
        f"Power with {seeds} seeds, two-sided t at {alpha:g} / at {first:.2g} (Holm's first step over {pairs} pairs); "
        "differences in points",
        f"{'spread over seeds taken from':{width}}    sd  "
        + "  ".join(f"{head:>11}" for head in heads)
        + f"  found with {POWER:g}  {equal}",
    ]
    for name, sd in spreads.items():
        powers = [f"{t_power(e, sd, seeds, alpha):.2f} / {t_power(e, sd, seeds, first):.2f}" for e in effects]
        least = " / ".join(_points(minimum_detectable(sd, seeds, POWER, level)) for level in (alpha, first))
        shown = f"{equivalence_power(margin, sd, seeds, 0.0, EQUIVALENCE_ALPHA):.2f}"
        cells = "  ".join(f"{power:>11}" for power in powers)
        found.append(f"{name:{width}}  {100 * sd:4.1f}  {cells}  {least:>14}  {shown:>{len(equal)}}")
    return found


def _points(difference: float) -> str:
    """A difference that would be found, in points; rates cannot differ by more than 100."""
    return "none" if difference > 1 else f"{100 * difference:.0f}"


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(optimize.brentq(function, low, high, xtol=1e-12, rtol=1e-12))  # pyright: ignore[reportArgumentType]


def _check_design(sd: float, seeds: int, alpha: float) -> None:
    if not sd > 0:
        raise ValueError(f"sd={sd} must be positive; seeds that agree exactly are taken at the resolution, 1/tasks")
    if seeds < 2:
        raise ValueError(f"seeds={seeds}: a t test over seeds needs at least 2")
    _check_share("alpha", alpha)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must lie strictly between 0 and 1")


def _check_rates(n: int, alpha: float, *rates: float) -> None:
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 item")
    _check_share("alpha", alpha)
    for rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"probability {rate} must lie between 0 and 1")
