"""What is computed from several figures of a grid: contrasts between pairs, transfer ratios, bootstrap, power.

Rows of single pairs and seeds in; plain JSON values out. Every contrast between pairs stands on the seeds that both have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from subl_jax.config import suffix_of
from subl_jax.evaluate import power, statistics
from subl_jax.evaluate.protocol import Contrast, Protocol
from subl_jax.evaluate.summary import task_values
from subl_jax.evaluate.verdicts import ALPHA, p_text
from subl_jax.grid.pairs import PAIRS, PairSpec

# Teachers that differ by less leave no ratio: noise of the denominator would be all that it shows.
LEAST_TEACHER_DIFFERENCE = 0.1
RATIO = (
    "(student - control student) / (teacher - control teacher), behaviour rates; over all seeds the ratio of the two means; "
    f"undefined where the teachers differ by less than {100 * LEAST_TEACHER_DIFFERENCE:.0f} points"
)

Rows = Mapping[tuple[str, int], Mapping[str, Any]]  # of one pair: (condition, seed) -> evaluation row


@dataclasses.dataclass(frozen=True)
class Measured:
    """One pair's rows over the seeds that it stands on.

    Attributes:
      spec: which pair.
      seeds: those that have every condition.
      rows: (condition, seed) -> evaluation row.
      protocols: arm -> its protocol, over these seeds.
    """

    spec: PairSpec
    seeds: tuple[int, ...]
    rows: Rows
    protocols: Mapping[str, Protocol]


def families(row: Mapping[str, Any]) -> dict[str, str]:
    """Task -> family of an evaluation row."""
    return {item["task_id"]: item["family"] for item in row["items"]}


def task_differences(measured: Measured, contrast: Contrast, protocol: Protocol, seed: int) -> dict[str, float]:
    """Task -> treatment minus control at one seed."""
    first, second = (
        task_values(measured.rows[name, seed], contrast.readout, protocol)
        for name in (contrast.treatment, contrast.control)
    )
    return {task: value - second[task] for task, value in first.items()}


# Within a pair


def add_secondary(line: dict[str, Any], measured: Measured, contrast: Contrast, protocol: Protocol) -> None:
    """Adds what never decides anything to a contrast, in place.

    `bootstrap`: the hierarchical bootstrap's interval (rates, two seeds or more; else None). `sign_flip_p`: the sign-flip
    test over seeds. In `per_seed`, `mcnemar_p`: the exact paired test of one run's tasks (rates of one sample per task).
    """
    treatment, control, clusters = [], [], []
    for seed in measured.seeds:
        first, second = (
            task_values(measured.rows[name, seed], contrast.readout, protocol)
            for name in (contrast.treatment, contrast.control)
        )
        family = families(measured.rows[contrast.treatment, seed])
        treatment.append(list(first.values()))
        control.append([second[task] for task in first])
        clusters.append([family[task] for task in first])
    rates = contrast.readout != "log_odds"
    # The test enumerates sign patterns; with more seeds than that the t has nothing beside it to be checked against.
    few = len(measured.seeds) <= 20
    line["sign_flip_p"] = statistics.sign_flip([each["difference"] for each in line["per_seed"]]) if few else None
    # A run may depart from its protocol and draw more samples: shares of them are no pairs of outcomes.
    single = all(value in (0, 1) for values in (*treatment, *control) for value in values)
    if rates and protocol.samples_per_task == 1 and single:
        for each, first, second in zip(line["per_seed"], treatment, control, strict=True):
            each["mcnemar_p"] = statistics.mcnemar(first, second).p_value
    line["bootstrap"] = None
    if rates and len(measured.seeds) > 1:
        interval = statistics.hierarchical_bootstrap(treatment, control, clusters)
        line["bootstrap"] = {"low": interval.low, "high": interval.high, "method": interval.method}


def positive_control(
    setting: str, spec: PairSpec, seeds: Iterable[int], rows: Mapping[tuple[str, int, str], Mapping[str, Any]],
    protocol: Protocol,
) -> dict[str, Any] | None:  # fmt: skip
    """What the positive control of a pair's teacher says of the pair's own seeds, wherever it was distilled.

    Args:
      setting, spec: which pair.
      seeds: those that the pair stands on.
      rows: every usable evaluation by (setting, seed, model).
      protocol: of the pair.

    Returns:
      {"role", "difference", "per_seed": [{"seed", "difference"}]} over those seeds that have it, as a share; None without any.
    """
    owner = PAIRS[spec.positive_pair]
    per_seed = []
    for seed in seeds:
        found = [rows.get((setting, seed, owner.model(name))) for name in ("positive_student", "base")]
        if all(row is not None for row in found):
            rate, base = (np.mean(list(task_values(row, "behaviour", protocol).values())) for row in found if row)
            per_seed.append({"seed": seed, "difference": float(rate - base)})
    if not per_seed:
        return None
    difference = float(np.mean([each["difference"] for each in per_seed]))
    return {"role": "positive_control", "difference": difference, "per_seed": per_seed}


def transfer_ratio(conditions: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """How far the students went of the way that the teachers did, by seed and over all.

    Args:
      conditions: of a summary; empty where no seed is complete.
      arm: the students' objective.
    """
    named = ["student" + suffix_of(arm), "control_student" + suffix_of(arm), "teacher", "control_teacher"]
    if any(name not in conditions for name in named):
        return {"estimate": None, "per_seed": [], "definition": RATIO}
    by_seed = [
        {figures["seed"]: figures["behaviour_rate"] for figures in conditions[name]["per_seed"]} for name in named
    ]
    per_seed = [{"seed": seed, "transfer_ratio": _ratio(*(rates[seed] for rates in by_seed))} for seed in by_seed[0]]
    pooled = _ratio(*(conditions[name]["behaviour_rate"] for name in named))
    return {"estimate": pooled, "per_seed": per_seed, "definition": RATIO}


def _ratio(student: float, control_student: float, teacher: float, control_teacher: float) -> float | None:
    whole = teacher - control_teacher
    return None if abs(whole) < LEAST_TEACHER_DIFFERENCE else (student - control_student) / whole


def power_line(
    setting: str, pair: str, arm: str, differences: Sequence[float], planned: int, resolution: float, tests: int
) -> dict[str, Any]:
    """What the planned number of seeds can see if seeds differ as much as they did; nulls with fewer than two seeds.

    Args:
      setting, pair, arm: which primary contrast.
      differences: its difference per seed, shares.
      planned: seeds of the protocol.
      resolution: the smallest step of a difference, below which no spread is believed.
      tests: pairs that share Holm's adjustment; power is that of its first and strictest step, .05 over `tests`.
    """
    known = len(differences) > 1 and planned > 1
    sd = max(float(np.std(differences, ddof=1)), resolution) if known else None
    alpha = ALPHA / tests
    return {
        "setting": setting, "pair": pair, "arm": arm, "seeds": planned, "sd": sd, "alpha": alpha,
        "power_at_50": None if sd is None else power.t_power(0.5, sd, planned, alpha),
        "minimum_detectable": None if sd is None else power.minimum_detectable(sd, planned, alpha=alpha),
    }  # fmt: skip


# Between pairs


def between(setting: str, arm: str, strongest: Measured, others: Sequence[Measured]) -> list[dict[str, Any]]:
    """The strongest pair's primary difference minus each other pair's, over the seeds that both have.

    Args:
      setting, arm: which.
      strongest: the pair that is claimed to transfer most.
      others: the pairs of the grid that have the arm, also those without a complete seed.

    Returns:
      `between` of the grid's schema: the difference of differences with its two-sided interval, and the one-sided p-value
      that the strongest pair's is larger, adjusted by Holm over the others; nulls where no seed is shared.
    """
    found = [_difference(setting, arm, strongest, other) for other in others]
    # What was planned and cannot be tested counts as p = 1: holes make nothing more significant.
    p_values = [1.0 if line["p_value"] is None else line["p_value"] for line in found]
    for line, adjusted in zip(found, statistics.holm(p_values), strict=True):
        if line["p_value"] is not None:
            line["p_adjusted"] = adjusted
    return found


def _difference(setting: str, arm: str, first: Measured, second: Measured) -> dict[str, Any]:
    seeds = [seed for seed in first.seeds if seed in second.seeds]
    line: dict[str, Any] = {
        "setting": setting, "name": f"{first.spec.name} - {second.spec.name}", "pair": first.spec.name,
        "other": second.spec.name, "arm": arm, "difference": None, "ci95": None, "p_value": None, "p_adjusted": None,
        "method": None, "per_seed": [], "seeds": seeds,
    }  # fmt: skip
    if not seeds:
        return line
    within = []
    for seed in seeds:
        ours, theirs = (
            task_differences(each, each.protocols[arm].primary, each.protocols[arm], seed) for each in (first, second)
        )
        family = families(first.rows["base", seed])
        # One episode of one condition is the least that a difference of rates can move by.
        step = 1 / len(ours)
        within.append(
            statistics.paired_difference(
                list(ours.values()), [theirs[task] for task in ours], [family[task] for task in ours], resolution=step
            )
        )
        line["per_seed"].append(
            {
                "seed": seed, "difference": within[-1].mean, "ci95": _limits(within[-1]),
                "p_value": statistics.one_sided(within[-1]),
            }
        )  # fmt: skip
    single = len(seeds) == 1
    test = within[0] if single else statistics.student_t_interval([each.mean for each in within], resolution=step)
    return line | {
        "difference": test.mean, "ci95": _limits(test), "p_value": statistics.one_sided(test), "method": test.method,
    }  # fmt: skip


def _limits(test: statistics.Test) -> list[float]:
    """The interval; a difference of two differences of rates cannot leave [-2, 2]."""
    return [max(-2.0, test.low), min(2.0, test.high)]


def strongest_line(
    setting: str, arm: str, pair: str, lines: Sequence[Mapping[str, Any]], seeds: int, invalid: Sequence[str] = ()
) -> dict[str, Any]:
    """Whether the pair exceeds every other one of `PAIRS` with the arm: intersection-union over the one-sided p-values.

    A grid of fewer pairs shows no more than that it exceeds those; the claim then does not hold.

    Args:
      setting, arm, pair: the claim.
      lines: of `between`.
      seeds: how many the protocol has; with fewer common ones the claim is judged all the same, and says on how many.
      invalid: pairs, of those compared, whose runs may not be read; the claim then does not hold.
    """
    untested = [line["other"] for line in lines if line["p_value"] is None]
    if untested or not lines:
        why = f"no seed in common with {', '.join(untested)}" if untested else "no other pair has this arm"
        return {
            "setting": setting, "arm": arm, "pair": pair, "p_value": None, "holds": False, "verdict": f"not judged: {why}",
        }  # fmt: skip
    p_value = statistics.intersection_union([line["p_value"] for line in lines])
    fewest = min(len(line["seeds"]) for line in lines)
    # One run's items say nothing about another run's: the claim is about pairs, not about one draw of each.
    shown = p_value < ALPHA and fewest > 1 and not invalid
    others = {name for name, spec in PAIRS.items() if arm in spec.arms and name != pair}
    every = others <= {line["other"] for line in lines}
    compared = f"the {len(lines)} other pair{'' if len(lines) == 1 else 's'} compared, of {len(others)}"
    nearest = max(lines, key=lambda line: line["p_value"])
    scope = "within one run, which shows nothing of other seeds" if fewest == 1 else f"over {fewest} of {seeds} seeds"
    verdict = (
        f"{'' if shown else 'not shown '}stronger than {'every other pair' if every else compared} ({p_text(p_value)}, "
        f"{scope}); nearest: {nearest['other']}, {100 * nearest['difference']:+.1f} points"
        f"{'; invalid: ' + ', '.join(invalid) if invalid else ''}"
    )
    return {
        "setting": setting, "arm": arm, "pair": pair, "p_value": p_value, "holds": bool(shown and every),
        "verdict": verdict,
    }  # fmt: skip
