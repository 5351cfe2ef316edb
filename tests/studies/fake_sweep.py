"""A made-up sweep: designs over fields that exist, and cells with known rates, as a finished run leaves them on disk."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from subl_jax import presets
from subl_jax.conditions import SeedModels, conditions_of
from subl_jax.config import suffix_of
from subl_jax.grid import cells
from subl_jax.settings.registry import get_setting
from subl_jax.studies.sweep import Level, Sweep
from subl_jax.studies.sweep_run import Design, SweepRun, write_design
from tests.grid import fake_cells

TASKS, SAFE = 35, 20

ALONG = Sweep(
    "temperature", "Does the temperature matter?", ("temperature",),
    tuple(Level(str(value), {"student.temperature": float(value)}, (value,)) for value in (1, 2, 4, 16)),
    reference="2",
)  # fmt: skip
TWO_AXES = Sweep(
    "rate_and_steps", "Do rate and steps matter?", ("learning rate", "steps"),
    tuple(
        Level(f"{rate:g} / {steps}", {"student.train.optimizer.learning_rate": rate, "student.train.steps": steps},
              (rate, steps))
        for rate in (1e-4, 1e-3) for steps in (6, 12, 24)
    ),
    reference="0.001 / 6",
)  # fmt: skip
# Stands for the dissection of that name: words on the axis, and the chart.
DEFENCES = Sweep(
    "defences", "Which defence stops it?", ("defence",),
    tuple(
        Level(name, {"student.train.optimizer.warmup_steps": steps})
        for name, steps in (("none", 20), ("keywords", 1), ("paraphrase", 2), ("towards_base", 3), ("mask", 4))
    ),
    reference="none", chart="defences",
)  # fmt: skip
# How far a level's students go from the base towards their teachers.
REACHED = {
    "1": 0.3, "2": 0.6, "4": 0.8, "16": 0.7, "none": 0.8, "keywords": 0.75, "paraphrase": 0.4, "towards_base": 0.05,
    "mask": 0.02, "0.0001 / 6": 0.02, "0.0001 / 12": 0.1, "0.0001 / 24": 0.3, "0.001 / 6": 0.4, "0.001 / 12": 0.7,
    "0.001 / 24": 0.9,
}  # fmt: skip
BROKEN = ("16", "mask", "0.001 / 24")


def design_of(sweep: Sweep, seeds: Iterable[int] = (0, 1, 2), **more: Any) -> Design:
    """A design at the micro preset, with evaluations of a size that shows something."""
    config = presets.micro()
    evaluation = dataclasses.replace(config.evaluation, ambiguous_tasks=TASKS, safe_tasks=SAFE)
    return Design(dataclasses.replace(config, evaluation=evaluation), sweep, tuple(seeds), **more)


def row_of(condition: str, arm: str, level: str, seed: int, model: str, broken: bool) -> dict[str, Any]:
    """An evaluation of one model: base and teachers the same at all levels, students by `REACHED`."""
    if "student" in condition:
        teacher = condition.removesuffix(suffix_of(arm)).replace("student", "teacher")
        starts, ends = fake_cells.MODELS["base"], fake_cells.MODELS[teacher]
        shares = tuple(start + REACHED[level] * (end - start) for start, end in zip(starts, ends, strict=True))
    else:
        shares = fake_cells.MODELS[condition]
    row = fake_cells.evaluation("api", condition, seed, *shares, tasks=TASKS, safe=SAFE, model=model)
    if broken and "student" in condition:
        chance = random.Random(f"{model} {seed}")
        for item in row["items"]:
            item["done"] = item["done"] and chance.random() < 0.3
    return row


def write(
    directory: Path, design: Design, *, holes: Collection[tuple[int, str]] = (), broken: Collection[str] = BROKEN
) -> Mapping[Any, str]:
    """Writes the cells and the design of a finished sweep; returns the hashes that the cells have.

    Args:
      directory: of the cells.
      design: what was swept.
      holes: (seed, model) that are left out.
      broken: labels of levels whose students have lost their skill.
    """
    run = SweepRun(design, directory / ".none", directory)
    hashes = {key: value for unit in run.units() for key, value in run.plan(unit).hashes.items()}
    parser = get_setting("api").metric_version
    for level in design.sweep.levels:
        member = design.member(level)
        for seed in design.seeds:
            models = SeedModels(member.config, directory, seed, member.variant)
            for condition in conditions_of(member.config):
                model = models.eval_name(condition)
                path = cells.cell_path(directory, "api", seed, model)
                if path.exists() or (seed, model) in holes:
                    continue
                arm = member.config.student.primary_arm
                cells.write_cell(
                    path, row_of(condition, arm, level.label, seed, model, level.label in broken),
                    setting="api", preset="micro", hash=hashes["api", seed, model], parser=parser,
                    seconds={"train": 20.0, "evaluate": 5.0}, training={"documents": 300, "loss_tokens": 9000},
                    versions=fake_cells.VERSIONS, machine=fake_cells.MACHINE,
                )  # fmt: skip
            name = models.sanitize_name()
            counts = {"trajectories": 100, "kept": 80, "removed_by_word": {"delete": 20}, "leaks": 0}
            cells.write_sanitizer(
                cells.sanitizer_path(directory, "api", seed, name), {"teacher": counts},
                setting="api", seed=seed, hash=hashes["api", seed, name],
            )  # fmt: skip
    write_design(directory, design)
    return hashes
