"""Made-up runs with a known truth: what `evaluate.simulation` tries the statistics on.

In: how often a model shows the behaviour, and how much trained models, seeds and families spread about it on the logit
scale. Out: probabilities per run, pair, seed, condition and family, the true means that an interval should cover, and, from
an earlier `summary.json`, the spreads that it shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special

TASKS = 240  # ambiguous evaluation tasks of the tiny preset, dealt round-robin to the families
FAMILIES = 7  # of the API setting; the Bash setting has 9, which is easier
DEPARTING = 0.2  # skewed seeds: one trained model in five goes to the other end

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclasses.dataclass(frozen=True)
class Spread:
    """Standard deviations on the logit scale, rounded from what the summaries of the tiny presets show (`spreads_of`).

    Attributes:
      shared: of a seed, common to all its models (they come from one base). The bases themselves show none beyond sampling.
      own: of one trained model: .50 to .62 for students that transfer, 0 to .5 for controls, so that a placebo with .6
        is harder than a real one.
      family: of a task family, the same for every model of every seed.
      interaction: of a family in one model. A summary shows only both together, about .35.
    """

    shared: float = 0.2
    own: float = 0.6
    family: float = 0.3
    interaction: float = 0.2


@dataclasses.dataclass(frozen=True)
class Arm:
    """One condition: the models that a recipe yields.

    Attributes:
      location: logit of a typical model's rate on a typical family.
      own: standard deviation of trained models about it, logit.
      departs_to: where one model in five goes instead (a seed that fails to transfer), logit; None for none.
    """

    location: float
    own: float
    departs_to: float | None = None


def family_sizes() -> np.ndarray:
    """Tasks per family."""
    return np.bincount(np.arange(TASKS) % FAMILIES)


def draw(
    arms: Sequence[Arm], spread: Spread, runs: int, pairs: int, seeds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the behaviour [runs, pairs, seeds, arms, families], and the families' effects [runs, families].

    A run stands for a whole experiment: all its seeds meet the same families, and all pairs of one seed share its base.
    """
    shape = (runs, pairs, seeds)
    models = np.stack([_models(arm, shape, rng) for arm in arms], axis=-1)
    models += spread.shared * rng.standard_normal((runs, 1, seeds, 1))
    families = spread.family * rng.standard_normal((runs, FAMILIES))
    logits = models[..., None] + families[:, None, None, None, :]
    logits += spread.interaction * rng.standard_normal(logits.shape)
    return special.expit(logits), families


def _models(arm: Arm, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    locations = np.full(shape, arm.location)
    if arm.departs_to is not None:
        locations[rng.random(shape) < DEPARTING] = arm.departs_to
    return locations + arm.own * rng.standard_normal(shape)


def rates(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Observed rates over all tasks, one sample per task: [..., families] -> [...]."""
    return rng.binomial(family_sizes(), probabilities).sum(axis=-1) / TASKS


def items(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Observed 0/1 items, family by family: [..., families] -> [..., tasks]."""
    each = np.repeat(probabilities, family_sizes(), axis=-1)
    return (rng.random(each.shape) < each).astype(np.float64)


def family_names() -> np.ndarray:
    """The family of each task, in the order of `items`."""
    return np.repeat([f"family{index}" for index in range(FAMILIES)], family_sizes())


def mean_expit(location: Any, sd: float) -> np.ndarray:
    """The mean of expit(location + sd·Z), Z standard normal, by Gauss-Hermite quadrature; any shape of locations."""
    return np.asarray(special.expit(np.asarray(location)[..., None] + sd * _NODES) @ _WEIGHTS)


def true_rate(arm: Arm, spread: Spread, families: np.ndarray) -> np.ndarray:
    """The mean rate over seeds on families with these effects [..., families] -> [...]: what an interval over seeds is of."""
    sd = float(np.sqrt(spread.shared**2 + arm.own**2 + spread.interaction**2))
    means = mean_expit(arm.location + families, sd)
    if arm.departs_to is not None:
        means = (1 - DEPARTING) * means + DEPARTING * mean_expit(arm.departs_to + families, sd)
    return np.asarray(means @ (family_sizes() / TASKS))


def arm_with_rate(arm: Arm, spread: Spread, target: float) -> Arm | None:
    """The arm moved so that its true rate on typical families is `target`; None where its departing models forbid that."""
    typical = np.zeros(FAMILIES)

    def off(location: float) -> float:
        return float(true_rate(dataclasses.replace(arm, location=location), spread, typical)) - target

    if off(-12.0) > 0 or off(12.0) < 0:
        return None
    return dataclasses.replace(arm, location=float(optimize.brentq(off, -12.0, 12.0, xtol=1e-10)))  # pyright: ignore


def spreads_of(summary: Mapping[str, Any], families: int) -> list[dict[str, Any]]:
    """What one `summary.json` shows of `Spread`: {"condition", "rate", "own", "family"} per condition with 2 seeds or more.

    own: the variance over seeds of the empirical logit log((x+.5)/(n-x+.5)) less its mean sampling variance
    1/(x+.5) + 1/(n-x+.5) (Gart and Zweifel 1967, Biometrika 54:181-187), at least 0; it includes what a base shares.
    family: from the design effect D, the squared ratio of the clustered to the independent standard error: D = 1 +
    family²·p(1-p)·n/G for G families (to first order); None where the rate is too near 0 or 1 to tell.

    Args:
      summary: of `summary.build_summary`.
      families: how many ambiguous evaluation families its setting has.
    """
    found = []
    for name, condition in summary["conditions"].items():
        seeds = condition["per_seed"]
        if len(seeds) < 2:
            continue
        n = np.array([seed["n"] for seed in seeds], dtype=np.float64)
        observed = np.array([seed["behaviour_rate"] for seed in seeds])
        hits = observed * n
        sampling = np.mean(1 / (hits + 0.5) + 1 / (n - hits + 0.5))
        variance = np.log((hits + 0.5) / (n - hits + 0.5)).var(ddof=1) - sampling
        rate = float(observed.mean())
        family = None
        if 0.02 < rate < 0.98:
            clustered = np.array([np.subtract(*seed["ci95"][::-1]) for seed in seeds]) / special.stdtrit(
                families - 1, 0.975
            )
            alone = np.array([np.subtract(*seed["ci95_independent"][::-1]) for seed in seeds]) / special.ndtri(0.975)
            excess = max(0.0, float(np.mean(np.maximum(1.0, (clustered / alone) ** 2))) - 1)
            family = float(np.sqrt(excess * families / (n.mean() * rate * (1 - rate))))
        found.append({"condition": name, "rate": rate, "own": float(np.sqrt(max(0.0, variance))), "family": family})
    return found
