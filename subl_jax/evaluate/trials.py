"""The statistics tried on made-up experiments: coverage of each interval, false positives of each test and claim.

In: a level of rates, how trained models spread about it, seeds, and how many experiments to make up. Out: tables of shares,
each with what it promises. Every decision is made by the functions of `evaluate.statistics` that analyse real runs; the truth
is that of `evaluate.simulated_runs`, whose spreads are those of the tiny presets' real runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import special

from subl_jax.evaluate import simulated_runs, statistics
from subl_jax.evaluate.simulated_runs import TASKS, Arm, Spread

ALPHA = 0.05
PAIRS = 7
SEEDS = (3, 5, 8)
LEVELS = {"near 0": 0.03, "middle": 0.60, "near 100": 0.97}
# quiet: trained models of a recipe differ by nothing but their items, as the controls' do; normal: they spread like the
# students'; skewed: besides, one in five goes to the other end (fails to transfer, or transfers where none should).
SHAPES = ("quiet", "normal", "skewed")
MARGIN = 0.08  # of equivalence, protocol.Targets.control_margin
BOOTSTRAP_SHARE = 3  # one experiment in so many is also bootstrapped, which is slow
BOOTSTRAP_DRAWS = 500
STEP = 1 / TASKS  # the resolution of a rate

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Share:
    """So many of so many, and what it promises: "covers" (at least 1 - alpha), "errs" (at most alpha), or "no promise"."""

    hits: int
    n: int
    kind: str

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.n

    @property
    def fails(self) -> bool:
        """Whether it misses 1 - alpha (coverage) or alpha (errors) by over three Monte-Carlo standard errors."""
        error = 3 * math.sqrt(ALPHA * (1 - ALPHA) / self.n)
        missing = {"covers": 1 - ALPHA - self.value, "errs": self.value - ALPHA, "no promise": 0.0}[self.kind]
        return missing > error


class _Tally:
    """Counts of hits by name; `row` turns them into shares."""

    def __init__(self, kind: str):
        self._kind = kind
        self._kinds: dict[str, str] = {}
        self._hits: dict[str, int] = defaultdict(int)
        self._n: dict[str, int] = defaultdict(int)

    def add(self, name: str, hit: bool, kind: str | None = None) -> None:
        self._kinds[name] = kind or self._kind
        self._hits[name] += bool(hit)
        self._n[name] += 1

    def row(self) -> Row:
        return {name: Share(self._hits[name], n, self._kinds[name]) for name, n in self._n.items()}


def _covers(found: statistics.Interval | statistics.Test, truth: float) -> bool:
    return bool(found.low <= truth <= found.high)


def _arm(level: str, shape: str, spread: Spread) -> Arm:
    other = "middle" if level == "near 0" else "near 0"
    return Arm(
        float(special.logit(LEVELS[level])),
        0.0 if shape == "quiet" else spread.own,
        float(special.logit(LEVELS[other])) if shape == "skewed" else None,
    )


def _spread(shape: str, spread: Spread) -> Spread:
    return dataclasses.replace(spread, shared=0.0, own=0.0) if shape == "quiet" else spread


# Within one run


def within_run(level: str, clustered: bool, runs: int, rng: np.random.Generator, spread: Spread) -> tuple[Row, Row]:
    """Coverage of the intervals within one run, and errors of the tests within one run, at one level of rates.

    The truth of a run is what its two models would do on other families of the same kind. Errors are counted under two
    placebos: one model evaluated twice, and two models trained alike, which differ as seeds do.
    """
    if not clustered:
        spread = dataclasses.replace(spread, family=0.0, interaction=0.0)
    covered, erred = _Tally("covers"), _Tally("errs")
    names = simulated_runs.family_names()
    between = math.hypot(spread.family, spread.interaction)
    arm, control = _arm(level, "normal", spread), _arm("near 0", "quiet", spread)
    models = arm.location + arm.own * rng.standard_normal((runs, 2))  # the treatment, and another one trained alike
    family = spread.family * rng.standard_normal((runs, 1, simulated_runs.FAMILIES))
    logits = np.concatenate([models, np.full((runs, 1), control.location)], axis=1)[..., None] + family
    logits = logits + spread.interaction * rng.standard_normal(logits.shape)
    # The treatment, itself once more, the one trained alike, and the control.
    chances = special.expit(logits)[:, [0, 0, 1, 2]]
    truth = simulated_runs.mean_expit(models[:, 0], between)
    difference = truth - simulated_runs.mean_expit(control.location, between)
    for item, rate, gap in zip(simulated_runs.items(chances, rng), truth, difference, strict=True):
        hits = int(item[0].sum())
        covered.add("Wilson", _covers(statistics.wilson(hits, TASKS), rate))
        covered.add("Clopper-Pearson", _covers(statistics.clopper_pearson(hits, TASKS), rate))
        covered.add("clustered", _covers(statistics.cluster_interval(item[0], names), rate))
        covered.add(
            "paired clustered", _covers(statistics.paired_difference(item[0], item[3], names, resolution=STEP), gap)
        )
        for title, other in (("same model", item[1]), ("trained alike", item[2])):
            erred.add(f"McNemar: {title}", statistics.mcnemar(item[0], other).p_value <= ALPHA)
            found = statistics.paired_difference(item[0], other, names, resolution=STEP)
            erred.add(f"paired: {title}", found.p_value <= ALPHA)
    head = {"level": level, "families differ": "yes" if clustered else "no"}
    return head | covered.row(), head | erred.row()


# Over seeds


def coverage(level: str, shape: str, seeds: int, runs: int, rng: np.random.Generator, spread: Spread) -> Row:
    """Coverage of the true mean difference between a treatment and a quiet control near 0, by the intervals over seeds."""
    covered = _Tally("covers")
    spread = _spread(shape, spread)
    arms = (_arm(level, shape, spread), _arm("near 0", "quiet", spread))
    chances, families = simulated_runs.draw(arms, spread, runs, 1, seeds, rng)
    truth = np.subtract(*(simulated_runs.true_rate(arm, spread, families) for arm in arms))
    observed = simulated_runs.items(chances[:, 0], rng)  # [runs, seeds, arms, tasks]
    differences = np.subtract(*np.moveaxis(observed.mean(axis=-1), -1, 0))
    names = [simulated_runs.family_names()] * seeds
    for index in range(runs):
        found = statistics.student_t_interval(differences[index], resolution=STEP)
        covered.add("Student's t (primary)", _covers(found, truth[index]))
        if index % BOOTSTRAP_SHARE == 0:
            first, second = list(observed[index, :, 0]), list(observed[index, :, 1])
            drawn = statistics.hierarchical_bootstrap(first, second, names, draws=BOOTSTRAP_DRAWS, seed=rng)
            covered.add("hierarchical bootstrap", _covers(drawn, truth[index]))
            # One "task" per seed leaves nothing but the seeds to resample.
            means = observed[index].mean(axis=-1).tolist()
            first, second = ([[seed[arm]] for seed in means] for arm in (0, 1))
            drawn = statistics.hierarchical_bootstrap(
                first, second, [["all tasks"]] * seeds, draws=BOOTSTRAP_DRAWS, seed=rng
            )
            covered.add("bootstrap of seeds", _covers(drawn, truth[index]))
    return {"level": level, "shape": shape, "seeds": seeds} | covered.row()


def placebo(level: str, shape: str, seeds: int, runs: int, rng: np.random.Generator, spread: Spread) -> tuple[Row, Row]:
    """Errors of the tests over seeds where no pair differs from its controls: per contrast and per table, and of "strongest".

    The whole procedure claims a transfer where Holm's adjusted p is at most .05, the interval lies above zero, and the
    contrast with the second (benign) control agrees in sign.
    """
    erred, claimed = _Tally("errs"), _Tally("errs")
    spread = _spread(shape, spread)
    arms = [_arm(level, shape, spread)] * 3  # treatment, control, benign
    chances, _ = simulated_runs.draw(arms, spread, runs, PAIRS, seeds, rng)
    observed = simulated_runs.rates(chances, rng)
    differences, benign = observed[..., 0] - observed[..., 1], observed[..., 0] - observed[..., 2]
    for table, signs in zip(differences, benign.mean(axis=-1), strict=True):
        tests = [statistics.student_t_interval(pair, resolution=STEP) for pair in table]
        p_values = [test.p_value for test in tests]
        for p_value in p_values:
            erred.add("t, one contrast", p_value <= ALPHA)
        erred.add("sign flip", statistics.sign_flip(table[0]) <= ALPHA)
        erred.add("any of 7, unadjusted", min(p_values) <= ALPHA, "no promise")
        adjusted = statistics.holm(p_values)
        erred.add("any of 7, Holm", min(adjusted) <= ALPHA)
        erred.add(
            "whole procedure",
            any(p <= ALPHA and t.low > 0 and sign > 0 for p, t, sign in zip(adjusted, tests, signs, strict=True)),
        )
        for count in (PAIRS, 2):
            best = int(np.argmax(table[:count].mean(axis=1)))
            claimed.add(f"{count} equal, named before", strongest_p(table, 0, range(count)) <= ALPHA)
            p_value = strongest_p(table, best, range(count))
            claimed.add(f"{count} equal, best-looking", p_value <= ALPHA)
            claimed.add(f"{count} equal, best-looking, p doubled", 2 * p_value <= ALPHA)
    head = {"level": level, "shape": shape, "seeds": seeds}
    return head | erred.row(), head | claimed.row()


def strongest_p(table: np.ndarray, pair: int, pairs: Sequence[int]) -> float:
    """The intersection-union p that one pair's mean difference exceeds every other's; table [pairs, seeds]."""
    return statistics.intersection_union(
        [
            statistics.one_sided(statistics.student_t_interval(table[pair] - table[other], resolution=STEP))
            for other in pairs
            if other != pair
        ]
    )


def equivalence(level: str, shape: str, seeds: int, runs: int, rng: np.random.Generator, spread: Spread) -> Row | None:
    """Errors of the equivalence claim where the true difference is exactly the margin; None where none can be."""
    spread = dataclasses.replace(_spread(shape, spread), family=0.0)  # else the truth would lie about the margin only
    control = _arm(level, "normal" if shape == "skewed" else shape, spread)
    rate = float(simulated_runs.true_rate(control, spread, np.zeros(simulated_runs.FAMILIES)))
    target = rate - MARGIN if level == "near 100" else rate + MARGIN
    arm = simulated_runs.arm_with_rate(_arm(level, shape, spread), spread, target)
    if arm is None:
        return None
    chances, _ = simulated_runs.draw((arm, control), spread, runs, 1, seeds, rng)
    observed = simulated_runs.rates(chances, rng)[:, 0]
    erred = _Tally("errs")
    for differences in observed[..., 0] - observed[..., 1]:
        test = statistics.student_t_interval(differences, resolution=STEP)
        p_value = statistics.equivalence_p(test, MARGIN)
        erred.add("TOST at the margin", p_value <= ALPHA)
        erred.add("TOST at alpha/2", p_value <= ALPHA / 2)
    return erred.row()


# All of it


def simulate(
    runs: int, seed: int, spread: Spread | None = None, advance: Callable[[], None] | None = None
) -> dict[str, list[Row]]:
    """All tables: {"coverage within a run", "errors within a run", "coverage over seeds", "errors over seeds", "claims"}.

    Args:
      runs: made-up experiments per line.
      seed: of all of them; each line has a generator of its own.
      spread: see `Spread`; the tiny presets' by default.
      advance: called after each line.
    """
    if runs < 10:
        raise ValueError(f"runs={runs} says nothing; use at least 10, or the default of 2000")
    spread = Spread() if spread is None else spread
    tables: dict[str, list[Row]] = defaultdict(list)
    for number, (level, shape, seeds) in enumerate(LINES):
        rng = np.random.default_rng([seed, number])
        if seeds is None:
            covered, erred = within_run(level, shape == "clustered", runs, rng, spread)
            tables["coverage within a run"].append(covered)
            tables["errors within a run"].append(erred)
        else:
            tables["coverage over seeds"].append(coverage(level, shape, seeds, runs, rng, spread))
            erred, claimed = placebo(level, shape, seeds, runs, rng, spread)
            tables["errors over seeds"].append(erred)
            tables["claims"].append(claimed | (equivalence(level, shape, seeds, runs, rng, spread) or {}))
        if advance is not None:
            advance()
    return dict(tables)


def _lines() -> Iterator[tuple[str, str, int | None]]:
    """(level, shape, seeds) of every line; within a run there are no seeds, and the shape says whether families differ."""
    for level in LEVELS:
        for shape in ("independent", "clustered"):
            yield level, shape, None
    for level in LEVELS:
        for shape in SHAPES:
            for seeds in SEEDS:
                yield level, shape, seeds


LINES = tuple(_lines())
