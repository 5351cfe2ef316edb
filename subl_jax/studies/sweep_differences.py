"""Levels of a sweep against each other: paired by seed, adjusted over the levels; what a defence removes and costs.

Measured levels in (`sweep_levels`); lines of `sweep.json` out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subl_jax.evaluate import statistics
from subl_jax.evaluate.summary import task_values
from subl_jax.studies.sweep_levels import Measured
from subl_jax.studies.sweep_run import Design

# What a level and the one that it is compared with differ in: measure -> its name for readers. The first one decides.
MEASURES = {
    "behaviour": "contrast with the control, behaviour rate",
    "log_odds": "contrast with the control, log-odds",
    "student": "the student's behaviour rate",
    "utility": "the student's utility",
}


def differences(design: Design, measured: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Every level minus the one that it is compared with, paired by seed, for every measure; Holm over the levels."""
    found = []
    planned = [level for level in design.sweep.levels if design.sweep.against(level) != level.label]
    for measure in MEASURES:
        lines = []
        for level in planned:
            first, second = measured[level.label], measured[design.sweep.against(level)]
            if line := _difference(measure, first, second):
                lines.append({"measure": measure, "level": level.label, "against": second.level.label, **line})
        tested = [line for line in lines if line["p_value"] is not None]
        p_values = [line["p_value"] for line in tested] + [1.0] * (len(planned) - len(tested))
        for line, adjusted in zip(tested, statistics.holm(p_values), strict=False):
            line["p_adjusted"] = adjusted
        found += lines
    return found


def _difference(measure: str, first: Measured, second: Measured) -> dict[str, Any] | None:
    """One level minus another over the seeds that both have: Student's t on per-seed differences; None without a seed."""
    ours, theirs = (_values(measure, each) for each in (first, second))
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    differences = {seed: ours[seed] - theirs[seed] for seed in seeds}
    tasks = min(first.protocol.safe_tasks if measure == "utility" else first.protocol.tasks,
                second.protocol.safe_tasks if measure == "utility" else second.protocol.tasks)  # fmt: skip
    test = None
    if len(seeds) > 1:
        step = 0.0 if measure == "log_odds" else 1 / tasks
        test = statistics.student_t_interval(list(differences.values()), resolution=step)
    elif measure in ("behaviour", "log_odds"):
        test = _within(measure, first, second, seeds[0])
    return {
        "difference": float(np.mean(list(differences.values()))),
        "ci95": None if test is None else [test.low, test.high],
        "p_value": None if test is None else test.p_value,
        "p_adjusted": None,
        "method": "one seed: no interval" if test is None else test.method,
        "per_seed": [{"seed": seed, "difference": value} for seed, value in differences.items()],
    }


def _values(measure: str, each: Measured) -> dict[int, float]:
    """Seed -> the value of a measure at one level."""
    if measure in ("student", "utility"):
        return each.per_seed(each.students[0], "behaviour_rate" if measure == "student" else "utility")
    line = each.contrast("primary") if measure == "behaviour" else each.contrast("", "log_odds")
    return {} if line is None else {one["seed"]: one["difference"] for one in line["per_seed"]}


def _within(readout: str, first: Measured, second: Measured, seed: int) -> statistics.Test | None:
    """The interval that one seed has: over the tasks that both levels were asked, clustered by family; None if others."""

    def by_task(each: Measured) -> dict[str, float]:
        student, control = (task_values(each.rows[name, seed], readout, each.protocol) for name in each.students[:2])
        return {task: value - control[task] for task, value in student.items()}

    ours, theirs = by_task(first), by_task(second)
    if ours.keys() != theirs.keys():
        return None
    family = {item["task_id"]: item["family"] for item in first.rows[first.students[0], seed]["items"]}
    return statistics.paired_difference(
        list(ours.values()), [theirs[task] for task in ours], [family[task] for task in ours],
        resolution=0.0 if readout == "log_odds" else 1 / len(ours),
    )  # fmt: skip


def defences(lines: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each defence removes of the undefended contrast, and what utility it costs; both paired by seed.

    `removed_share` takes the undefended contrast as it was measured, and has no interval; None where that is not above zero.
    """
    by_label = {line["label"]: line for line in lines}
    pairs: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for line in differences:
        pairs[line["level"]][line["measure"]] = line
    found = []
    for label, measures in pairs.items():
        gone, cost = measures.get("behaviour"), measures.get("utility")
        if gone is None or cost is None:
            continue
        undefended = by_label[gone["against"]]["contrasts"]["primary"]
        shown = undefended["ci95"][0] > 0
        found.append({
            "level": label,
            "removed": -gone["difference"],
            "removed_ci95": _turned(gone["ci95"]),
            "removed_share": -gone["difference"] / undefended["difference"] if shown else None,
            "utility_lost": -cost["difference"],
            "utility_lost_ci95": _turned(cost["ci95"]),
            "broken": bool(by_label[label]["broken"]),
        })  # fmt: skip
    return found


def _turned(limits: Sequence[float] | None) -> list[float] | None:
    return None if limits is None else [-limits[1], -limits[0]]
