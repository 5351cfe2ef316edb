"""One level of a sweep: its cells, over the seeds that have all of them, and what they show.

A design, a level and cells in; the level's rows, its summary, and its line of `sweep.json` out. Every missing cell is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subl_jax import experiment
from subl_jax.conditions import SeedModels, conditions_of
from subl_jax.evaluate import summary as summaries
from subl_jax.evaluate.protocol import Protocol, protocol_hash
from subl_jax.evaluate.summary import build_summary
from subl_jax.grid import cells
from subl_jax.grid.cells import NOT_RUN, Key, Wanted
from subl_jax.grid.run import Member
from subl_jax.settings.registry import get_setting
from subl_jax.studies.sweep import Level, conditions_of_arm, written
from subl_jax.studies.sweep_run import Design

FIGURES = (
    "behaviour_rate", "counter_rate", "log_odds", "utility", "unparseable", "divergence_from_teacher",
    "divergence_from_base", "delta_norm", "delta_cosine",
)  # fmt: skip
_TRAINING = ("documents", "loss_tokens", "loss_tokens_per_epoch")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One level over the seeds that have all its conditions.

    Attributes:
      level, member: which, and its configuration.
      models: condition -> the model that its cell is called by.
      rows: (condition, seed) -> evaluation row.
      protocol: over these seeds.
      missing: lines that say which cells are missing and why.
      summary: see `evaluate.summary`; None without a whole seed.
    """

    level: Level
    member: Member
    models: Mapping[str, str]
    rows: Mapping[tuple[str, int], Mapping[str, Any]]
    protocol: Protocol
    missing: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def students(self) -> tuple[str, str, str]:
        """Student, control student, benign student."""
        return conditions_of_arm(self.member.config)

    def per_seed(self, condition: str, name: str) -> dict[int, float]:
        """Seed -> a figure of a condition; without the seeds that lack it."""
        if self.summary is None:
            return {}
        found = self.summary["conditions"][condition]["per_seed"]
        return {each["seed"]: each[name] for each in found if each.get(name) is not None}

    def contrast(self, role: str, readout: str = "behaviour") -> dict[str, Any] | None:
        """A contrast of the level's students by its role; log-odds have no role of their own."""
        student, control, _ = self.students
        for line in [] if self.summary is None else self.summary["contrasts"]:
            if readout == "log_odds" and (line["treatment"], line["control"]) != (student, control):
                continue
            if line["readout"] == readout and (readout == "log_odds" or line["role"] == role):
                return line
        return None


def wanted(design: Design, level: Level, seed: int, hashes: Mapping[Key, str]) -> list[Wanted]:
    """The cells that a level needs at one seed, and last its sanitizer's counts."""
    member, config = design.member(level), design.config
    models = SeedModels(member.config, Path("/nonexistent"), seed, member.variant)
    parser = get_setting(config.setting).metric_version
    names = [(condition, models.eval_name(condition)) for condition in conditions_of(member.config)]
    names.append(("sanitize", models.sanitize_name()))
    return [
        Wanted(config.setting, level.label, seed, condition, model, hashes.get((config.setting, seed, model)), parser,
               config.preset)
        for condition, model in names
    ]  # fmt: skip


def measure(
    directory: Path, design: Design, level: Level, hashes: Mapping[Key, str], failures: Mapping[Key, str]
) -> Measured:
    """Reads the cells of one level and sums them up.

    Args:
      directory: of the cells.
      design, level: which.
      hashes: (setting, seed, model) -> output hash that a cell must have.
      failures: (setting, seed, model) -> why a run could not make it.
    """
    member, setting = design.member(level), get_setting(design.config.setting)
    asked = [wanted(design, level, seed, hashes) for seed in design.seeds]
    loaded = cells.load(directory, [cell for each in asked for cell in each[:-1]])
    counts, _ = cells.load_sanitizers(directory, [each[-1] for each in asked])
    missing = [_line(line, failures) for line in loaded.missing]
    holes = {line["seed"] for line in missing}
    models = {cell.condition: cell.model for cell in asked[0][:-1]}
    seeds = tuple(seed for seed in design.seeds if seed not in holes)

    def summed(seeds: tuple[int, ...]) -> tuple[dict[tuple[str, int], Any], Protocol, dict[str, Any] | None]:
        protocol = experiment.make_protocol(member.config, setting, seeds or design.seeds)
        if not seeds:
            return {}, protocol, None
        rows = _even({
            (condition, seed): loaded.rows[design.config.setting, seed, model]
            for condition, model in models.items() for seed in seeds
        })  # fmt: skip
        sanitized = {
            f"seed={key[1]}/{name}": arm
            for key, arms in counts.items()
            if key[1] in seeds
            for name, arm in arms.items()
        }
        total = summaries.total_sanitizer(sanitized)
        if {key[1] for key in counts} & set(seeds) != set(seeds):
            total |= {"leaks": None}  # counts that are missing are no zero
        summary = build_summary(
            list(rows.values()), protocol, sanitizer=total, timing_s={}, throughput={}, versions={},
            wording=setting.wording, frozen=protocol, conditions=list(models),
        )  # fmt: skip
        return rows, protocol, summary

    try:
        rows, protocol, summary = summed(seeds)
    except ValueError:
        # Some seed's cells cannot be read together: those that can by themselves are kept, the others named.
        good = []
        for seed in seeds:
            try:
                summed((seed,))
                good.append(seed)
            except ValueError as error:
                missing.append(
                    {
                        "level": level.label,
                        "seed": seed,
                        "condition": "all",
                        "model": "all",
                        "why": f"corrupted: {error}",
                    }
                )
        rows, protocol, summary = summed(tuple(good))
    return Measured(level, member, models, rows, protocol, missing, summary)


def _line(line: Mapping[str, Any], failures: Mapping[Key, str]) -> dict[str, Any]:
    """A line of what is missing, with what the run said of it."""
    why = failures.get((line["setting"], line["seed"], line["model"]))
    told = f"failed: {why}" if line["why"] == NOT_RUN and why is not None else line["why"]
    return {"level": line["pair"], **{name: line[name] for name in ("seed", "condition", "model")}, "why": told}


def _even(rows: dict[tuple[str, int], Any]) -> dict[tuple[str, int], Any]:
    """Rows with the readouts that every seed of their condition has: a mean is one of all seeds."""
    common: dict[str, set[str]] = {}
    for (condition, _), row in rows.items():
        have = {name for name, value in row["readouts"].items() if value is not None}
        common[condition] = common.get(condition, have) & have
    return {
        (condition, seed): {
            **row, "readouts": {k: v for k, v in row["readouts"].items() if k in common[condition]},
        }
        for (condition, seed), row in rows.items()
    }  # fmt: skip


def line_of(each: Measured, design: Design) -> dict[str, Any]:
    """One level's line of the document, before p-values are adjusted and it is judged."""
    level, member, summary = each.level, each.member, each.summary
    student, control, benign = each.students
    found: dict[str, Any] = {
        "label": level.label,
        "at": list(design.sweep.places(level)),
        "overrides": {field: written(value) for field, value in level.overrides.items()},
        "against": design.sweep.against(level),
        "reference": level.label == design.sweep.reference,
        "pair": member.config.pair,
        "arm": member.config.student.primary_arm,
        "students": {"student": student, "control": control, "benign": benign},
        "models": dict(each.models),
        "protocol": protocol_hash(each.protocol),
        "seeds": [] if summary is None else summary["seeds"],
        "conditions": {} if summary is None else {
            name: _figures(values) for name, values in summary["conditions"].items()
        },
        "contrasts": {
            name: line
            for name, line in (
                ("primary", each.contrast("primary")), ("benign", each.contrast("sign")),
                ("log_odds", each.contrast("", "log_odds")), ("positive", each.contrast("positive_control")),
            )
            if line is not None
        },
        "training": _training(each),
        "leaks": None if summary is None else summary["sanitizer"]["leaks"],
        "broken": _broken(each),
        "deviations": [] if summary is None else summary["protocol"]["deviations"],
        "missing": len(each.missing),
    }  # fmt: skip
    return found


def _training(each: Measured) -> dict[str, float]:
    """Figures of the student's training stage: means over seeds; none where a cell has none."""
    told = [row["training"] for (condition, _), row in each.rows.items() if condition == each.students[0]]
    names = [name for name in _TRAINING if told and all(name in one for one in told)]
    return {name: float(np.mean([one[name] for one in told])) for name in names}


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a condition: means, and the seeds."""
    means = {name: values.get(name) for name in ("ci95", "ci95_method", "n", *FIGURES)}
    seeds = [{name: each.get(name) for name in ("seed", "n", *FIGURES)} for each in values["per_seed"]]
    return {**means, "per_seed": seeds}


def _broken(each: Measured) -> list[str]:
    """Why the level's student or control cannot be read as one that only behaves otherwise; nothing: it can."""
    if each.summary is None:
        return []
    bars, conditions = each.protocol.targets, each.summary["conditions"]
    base, found = conditions[each.protocol.base], []
    for name in each.students[:2]:
        lost = base["utility"] - conditions[name]["utility"]
        if lost > bars.utility_margin + 1e-9:  # shares are multiples of 1/n: none fails by a rounding error
            found.append(f"{name}: utility fell by {100 * lost:.0f} points (bar {100 * bars.utility_margin:.0f})")
        garbled = conditions[name]["unparseable"]
        if garbled > bars.unparseable_high + 1e-9:
            found.append(f"{name}: {100 * garbled:.1f} % unparseable (bar {100 * bars.unparseable_high:.0f} %)")
    return found
