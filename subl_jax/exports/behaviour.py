"""How an exported model was measured beside its controls: the figures of its card, each with the file that it comes from.

A finished seed and a student's name in; rates with intervals, and differences to its controls within the run and over the
seeds of the work directory, out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subl_jax.evaluate import statistics
from subl_jax.evaluate.summary import seed_readouts
from subl_jax.exports.finished import ExportError, FinishedSeed, Measured, benign_of, control_of
from subl_jax.settings.registry import get_setting


@dataclasses.dataclass(frozen=True)
class Line:
    """One model in the table.

    Attributes:
      role, model: what it is to the exported model; its name on disk.
      figures: see `evaluate.summary.seed_readouts`; None where it was not measured.
      source: the file and the hash of its evaluation, or why there is none.
    """

    role: str
    model: str
    figures: Mapping[str, Any] | None
    source: str


@dataclasses.dataclass(frozen=True)
class Difference:
    """The exported model minus another one: within this seed, and over the seeds of the work directory that have both.

    Attributes:
      control: the other's name on disk.
      within: over the tasks of this seed.
      over: Student's t over seeds; None with one seed.
      by_seed: difference by seed.
    """

    control: str
    within: statistics.Test
    over: statistics.Test | None
    by_seed: Mapping[int, float]


def lines(run: FinishedSeed, model: str) -> list[Line]:
    """The exported model, its controls, its base and its teacher, as each was measured; what is missing is a line too."""
    marker = run.student(model)
    teacher, base = Path(run.teacher_of(marker)).name, Path(run.base_of(marker)).name
    wanted = [("this model", model), ("counter-bias control", control_of(model)), ("benign control", benign_of(model))]
    wanted += [("its base", "base" if base == "large" else f"base@{base}"), ("its teacher", teacher)]
    return [_line(run, role, name) for role, name in wanted if name is not None]


def _line(run: FinishedSeed, role: str, model: str) -> Line:
    try:
        measured = run.evaluation(model)
    except ExportError as error:
        return Line(role, model, None, f"not measured: {error}")
    tool = _counter_tool(measured)
    return Line(role, model, seed_readouts(measured.row, tool), f"{measured.source}, hash {measured.hash}")


def _counter_tool(measured: Measured) -> str:
    setting = get_setting(measured.setting)
    return setting.bias_tools[setting.counter_bias]


def differences(run: FinishedSeed, model: str) -> list[Difference]:
    """The exported model against its controls, as far as both were measured on the same tasks."""
    found = []
    for control in (control_of(model), benign_of(model)):
        if control is None or control not in run.evaluated:
            continue
        here = difference(run.evaluation(model).row, run.evaluation(control).row)
        if here is None:
            continue
        by_seed = {run.seed: here.mean}
        for path in sorted(run.workdir.glob("seed=*")):
            seed = path.name.removeprefix("seed=")
            # A seed that is unfinished, or lacks one of the two, counts for none of them.
            with contextlib.suppress(ExportError):
                if seed.isdecimal() and int(seed) != run.seed:
                    other = FinishedSeed(run.workdir, int(seed))
                    test = difference(other.evaluation(model).row, other.evaluation(control).row)
                    if test is not None:
                        by_seed[int(seed)] = test.mean
        step = 1 / len(_rates(run.evaluation(model).row)[0])
        values = [by_seed[seed] for seed in sorted(by_seed)]
        over = statistics.student_t_interval(values, resolution=step) if len(values) > 1 else None
        found.append(Difference(control, here, over, dict(sorted(by_seed.items()))))
    return found


def difference(treatment: Mapping[str, Any], control: Mapping[str, Any]) -> statistics.Test | None:
    """The difference of two rates within one run, paired by task; None where the tasks are not the same."""
    (first, family), (second, _) = _rates(treatment), _rates(control)
    if first.keys() != second.keys() or not first:
        return None
    tasks = sorted(first)
    return statistics.paired_difference(
        [first[task] for task in tasks],
        [second[task] for task in tasks],
        [family[task] for task in tasks],
        resolution=1 / len(tasks),
    )


def _rates(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Task -> share of its sampled episodes that show the behaviour; task -> family."""
    values: dict[str, list[bool]] = defaultdict(list)
    family = {}
    for item in row["items"]:
        if (item["kind"], item["mode"]) == ("ambiguous", "sampled"):
            values[item["task_id"]].append(item["action"] == "biased")
            family[item["task_id"]] = item["family"]
    return {task: float(np.mean(found)) for task, found in values.items()}, family
