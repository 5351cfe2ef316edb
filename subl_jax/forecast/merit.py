"""How well forecasts rank what was measured: Spearman's rho of the audit and of every baseline, and their differences.

Records of audited students with their measured shifts in; per group of students the rank correlations with intervals out.
The replicate is a seed: intervals resample whole seeds, and where there is only one they resample pairs and say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from subl_jax.config import STUDENT_OF, suffix_of

# What is correlated: the audit, the plain change of the log-odds in the virtual runs, and the baselines.
AUDIT = "audit"
DRAWS = 2000
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval, and the audit's lead over it.

    Attributes:
      score: the predictor's name.
      rho: Spearman's; None where one side is constant or fewer than three students have both.
      low, high: 95 % percentile interval; None where it cannot be had.
      students: how many.
      lead, lead_low, lead_high: the audit's rho minus this one's, on the same students, with a paired interval.
    """

    score: str
    rho: float | None
    low: float | None
    high: float | None
    students: int
    lead: float | None
    lead_low: float | None
    lead_high: float | None


def spearman(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks; None where it is not defined."""
    if len(x) < 3:
        return None
    one, other = stats.rankdata(x), stats.rankdata(y)
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt(np.sum(one**2) * np.sum(other**2))
    return None if size == 0 else float(np.sum(one * other) / size)


def correlations(
    records: Sequence[Record], scores: Sequence[str], target: str, *, draws: int = DRAWS, seed: int = 0
) -> tuple[list[Correlation], str]:
    """The rank correlation of every score with the target over some students.

    Args:
      records: each with "seed", "pair", "scores" (name -> number or None) and "measured" (name -> number).
      scores: names, the audit among them.
      target: name of what was measured.
      draws, seed: of the bootstrap.

    Returns:
      One line per score, and what the bootstrap resampled: "seeds", or "pairs" where all students are of one seed, or
      "nothing" where they are of one pair too.
    """
    seeds, pairs = {record["seed"] for record in records}, {(record["setting"], record["pair"]) for record in records}
    over, key = ("seeds", _seed) if len(seeds) > 1 else ("pairs", _pair) if len(pairs) > 1 else ("nothing", None)
    resamples = [] if key is None else _resamples(records, key, draws, seed)
    measured = np.asarray([record["measured"][target] for record in records], np.float64)
    table = {
        name: np.asarray([_number(record["scores"].get(name)) for record in records], np.float64) for name in scores
    }
    found = []
    for name in scores:
        known = np.flatnonzero(np.isfinite(table[name]) & np.isfinite(table[AUDIT]))
        rho, audit = (spearman(table[each][known], measured[known]) for each in (name, AUDIT))
        drawn = []
        for rows in resamples:
            kept = rows[np.isin(rows, known)]
            both = [spearman(table[each][kept], measured[kept]) for each in (name, AUDIT)]
            if None not in both:
                drawn.append(both)
        # A resample in which one side is constant says nothing; an interval needs nearly all of them.
        enough = len(drawn) >= 0.9 * max(1, len(resamples)) and bool(resamples) and rho is not None
        values = np.asarray(drawn, np.float64)
        lead = None if rho is None or audit is None or name == AUDIT else audit - rho
        low, high = _limits(values[:, 0]) if enough else (None, None)
        lead_low, lead_high = _limits(values[:, 1] - values[:, 0]) if enough and lead is not None else (None, None)
        found.append(Correlation(name, rho, low, high, len(known), lead, lead_low, lead_high))
    return found, over


def _limits(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _number(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _seed(record: Record) -> Hashable:
    return record["seed"]


def _pair(record: Record) -> Hashable:
    return record["setting"], record["pair"]


def _resamples(
    records: Sequence[Record], key: Callable[[Record], Hashable], draws: int, seed: int
) -> list[Int[np.ndarray, " _"]]:
    """Places of the records of resampled clusters, cluster by cluster."""
    members: dict[Hashable, list[int]] = {}
    for place, record in enumerate(records):
        members.setdefault(key(record), []).append(place)
    clusters = [np.asarray(each) for each in members.values()]
    picked = np.random.default_rng(seed).integers(len(clusters), size=(draws, len(clusters)))
    return [np.concatenate([clusters[place] for place in row]) for row in picked]


def contrasts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Treatment minus counter-bias control of every pair, arm and seed, in scores and in what was measured."""
    by_place = {(r["setting"], r["seed"], r["pair"], r["condition"]): r for r in records}
    found = []
    for (setting, seed, pair, condition), record in by_place.items():
        arm = record["arm"]
        if condition != STUDENT_OF["teacher"] + suffix_of(arm):
            continue
        control = by_place.get((setting, seed, pair, STUDENT_OF["control_teacher"] + suffix_of(arm)))
        if control is None:
            continue
        found.append(
            {
                "setting": setting, "seed": seed, "pair": pair, "arm": arm,
                "condition": f"{condition} - {control['condition']}",
                **{name: _minus(record[name], control[name]) for name in ("scores", "measured")},
            }
        )  # fmt: skip
    return found


def _minus(one: Mapping[str, float | None], other: Mapping[str, float | None]) -> dict[str, float | None]:
    pairs = {name: (one[name], other.get(name)) for name in one}
    return {name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()}


def groups(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The groups that are reported: all students, each setting, each arm of a setting, and the contrasts."""
    found: dict[str, list[Any]] = {"all students": list(records)}
    settings = list(dict.fromkeys(record["setting"] for record in records))
    if len(settings) > 1:
        found |= {setting: [r for r in records if r["setting"] == setting] for setting in settings}
    for setting in settings:
        for arm in dict.fromkeys(r["arm"] for r in records if r["setting"] == setting):
            chosen = [r for r in records if (r["setting"], r["arm"]) == (setting, arm)]
            found[f"{setting}, arm {arm}"] = chosen
    biased = [r for r in records if r["condition"] == STUDENT_OF["teacher"] + suffix_of(r["arm"])]
    found["students of the biased teacher"] = biased
    found["treatment - control"] = contrasts(records)
    return {name: chosen for name, chosen in found.items() if len(chosen) >= 3}
