"""What a sweep shows: each level's contrast with its matched control, and each level against the reference, over seeds.

A design and its cells in; `sweep.json` (schema 1) out, plain JSON values. A level stands on the seeds at which all its
conditions are there; nothing is averaged over a hole, and every hole is named. A broken level is called broken, whatever its
contrast.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.evaluate import statistics
from subl_jax.evaluate.verdicts import ALPHA, points
from subl_jax.grid import document
from subl_jax.grid.cells import Key
from subl_jax.settings.registry import get_setting
from subl_jax.studies import sweep_differences
from subl_jax.studies.sweep_levels import FIGURES, Measured, line_of, measure
from subl_jax.studies.sweep_run import Design

SCHEMA = 1


def analyse(directory: Path, design: Design, hashes: Mapping[Key, str], failures: Mapping[Key, str]) -> dict[str, Any]:
    """The whole document.

    Args:
      directory: of the cells.
      design: what was swept.
      hashes: (setting, seed, model) -> output hash that a cell must have.
      failures: (setting, seed, model) -> why a run could not make it.
    """
    measured = [measure(directory, design, level, hashes, failures) for level in design.sweep.levels]
    by_label = {each.level.label: each for each in measured}
    differences = sweep_differences.differences(design, by_label)
    lines = [line_of(each, design) for each in measured]
    _adjust(lines)
    for line in lines:
        line["verdict"] = _verdict(line)
    used = {id(row): row for each in measured for row in each.rows.values()}
    wording = get_setting(design.config.setting).wording
    found = {
        "schema": SCHEMA,
        "setting": design.config.setting,
        "preset": design.config.preset,
        "seeds": list(design.seeds),
        "sweep": artifacts.plain(
            {"name": design.sweep.name, "title": design.sweep.title, "axes": design.sweep.axes,
             "numeric": [design.sweep.numeric(axis) for axis in range(len(design.sweep.axes))],
             "reference": design.sweep.reference, "chart": design.sweep.chart}
        ),
        "wording": dataclasses.asdict(wording),
        "figures": list(FIGURES),
        "levels": lines,
        "differences": differences,
        "defences": sweep_differences.defences(lines, differences) if design.sweep.chart == "defences" else [],
        "missing": [line for each in measured for line in each.missing],
        "complete": not any(each.missing for each in measured),
        "notes": _notes(design, measured, list(used.values())),
        "seconds": document.seconds(list({(row["seed"], row["model"]): row for row in used.values()}.values())),
        "versions": document.distinct(row["versions"] for row in used.values()),
        "machines": document.distinct(row["machine"] for row in used.values()),
    }  # fmt: skip
    found["answer"] = answer(found)
    return found


def _adjust(lines: Sequence[dict[str, Any]]) -> None:
    """Replaces `p_adjusted` by Holm's over the levels; a level that was planned and is missing counts as p = 1."""
    for name in ("primary", "benign", "log_odds"):
        there = [line["contrasts"][name] for line in lines if name in line["contrasts"]]
        p_values = [line["p_value"] for line in there] + [1.0] * (len(lines) - len(there))
        for line, adjusted in zip(there, statistics.holm(p_values), strict=False):
            line["p_adjusted"] = adjusted


def _verdict(line: Mapping[str, Any]) -> dict[str, str]:
    """{"word", "text"}: broken before all else; then what the contrast shows after Holm's adjustment."""
    primary, benign = line["contrasts"].get("primary"), line["contrasts"].get("benign")
    if primary is None:
        return {"word": "not measured", "text": "no seed has every condition of this level"}
    if line["broken"]:
        return {"word": "broken", "text": "; ".join(line["broken"])}
    if line["leaks"]:
        return {"word": "invalid", "text": f"{line['leaks']} keywords were left in the training text"}
    one = "within this one run only" if len(line["seeds"]) == 1 else ""
    low, high = primary["ci95"]
    if not (low > 0 or high < 0) or primary["p_adjusted"] >= ALPHA:
        return {"word": "not shown", "text": one or "the interval includes zero, or does after Holm's adjustment"}
    if benign is not None and benign["difference"] * primary["difference"] <= 0:
        return {"word": "unclear", "text": "the benign control disagrees in sign"}
    return {"word": "transfers" if primary["difference"] > 0 else "reversed", "text": one}


# --- In words -----------------------------------------------------------------------------------------------------------


def answer(found: Mapping[str, Any]) -> str:
    """The sweep's answer in a few sentences, made of verdicts and differences alone."""
    by_word: dict[str, list[str]] = defaultdict(list)
    for line in found["levels"]:
        primary = line["contrasts"].get("primary")
        size = "" if primary is None else f" ({points(primary['difference']).removesuffix(' points')})"
        by_word[line["verdict"]["word"]].append(f"{line['label']}{size}")
    words = {
        "transfers": "The bias transfers at", "not shown": "Transfer is not shown at", "reversed": "It is reversed at",
        "unclear": "The two controls disagree at", "broken": "Broken, and so no answer, at", "invalid": "Invalid at",
        "not measured": "Not measured:",
    }  # fmt: skip
    parts = [f"{lead} {', '.join(by_word[word])}." for word, lead in words.items() if by_word[word]]
    whole = {line["label"] for line in found["levels"] if not line["broken"]}
    moved = [
        f"{line['level']} ({points(line['difference']).removesuffix(' points')} against {line['against']})"
        for line in found["differences"]
        if line["measure"] == "behaviour" and line["p_adjusted"] is not None and line["p_adjusted"] < ALPHA
        and line["level"] in whole and line["against"] in whole
    ]  # fmt: skip
    seeds = len(found["seeds"])
    scope = "within this one run" if seeds == 1 else f"over {seeds} seeds"
    told = (
        f"The contrast differs from the one that it is compared with at {', '.join(moved)}"
        if moved
        else "No level's contrast is shown to differ from the one that it is compared with"
    )
    parts.append(f"{told} ({scope}; p adjusted over the levels by Holm's method; contrasts in points).")
    return " ".join(parts)


def _notes(design: Design, measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        "Every level has its own counter-bias and benign control: the same stages, data, steps and arm. The contrast is "
        "student minus control student, per seed.",
        "A level is broken where the student or its control lost more utility against the base than the protocol's margin, or "
        "is unparseable more often than its bar: its contrast is not read.",
        f"Evaluated on the {design.config.evaluation.split} split.",
    ]
    if len(design.seeds) == 1:
        notes.append("One seed: intervals hold within this one run only; another seed may show something else.")
    left_out = sorted({(each.level.label, line["seed"]) for each in measured for line in each.missing})
    if left_out:
        told = "; ".join(f"{label}: seed {seed}" for label, seed in left_out)
        notes.append(f"Left out, since a cell is missing: {told}.")
    return [*notes, *document.mixed(rows)]
