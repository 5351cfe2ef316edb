"""The audit of a grid: every student that has a measured cell is audited, and one small file is kept for each.

A grid's work directory and its cells in; records with predictions, baselines and what was measured, out. A second call audits
what is not there yet. Neither the work directory nor the cells are written to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from subl_jax import artifacts
from subl_jax.conditions import Condition, students
from subl_jax.config import ExperimentConfig
from subl_jax.forecast.audit import RunAudit
from subl_jax.forecast.candidate import AuditError
from subl_jax.forecast.merit import AUDIT
from subl_jax.forecast.prediction import DECAY
from subl_jax.forecast.virtual import VirtualConfig
from subl_jax.grid import cells as grid_cells
from subl_jax.grid.pairs import PairSpec
from subl_jax.metrics.progress import progress
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.interface import Setting

SCHEMA = 1
# What students are measured by: the shift of the mean log-odds, and of the rate of the behaviour.
MEASURES = {"log_odds": "shift of the log-odds (nats)", "behaviour": "shift of the behaviour rate"}


@dataclasses.dataclass(frozen=True)
class Student:
    """One student of a grid: its pair's configuration, its condition, and the names of its model and of its base's."""

    setting: Setting
    config: ExperimentConfig
    seed: int
    pair: str
    condition: Condition
    model: str
    base: str


def students_of(
    configs: Mapping[str, Sequence[tuple[PairSpec, ExperimentConfig]]],
    seeds: Sequence[int],
    setting: Callable[[str], Setting],
) -> list[Student]:
    """Every student of a grid, seed by seed.

    Args:
      configs: setting -> its pairs with their configurations (`grid.run.GridRun.config`).
      seeds: the replicates.
      setting: gives a setting by name.
    """
    return [
        Student(setting(name), config, seed, spec.name, condition, spec.model(condition.name), spec.model("base"))
        for seed in seeds
        for name, pairs in configs.items()
        for spec, config in pairs
        for condition in students(config)
    ]


def measured(directory: Path, wanted: Sequence[Student]) -> tuple[dict[grid_cells.Key, dict[str, float]], list[str]]:
    """What the cells say: per student its shift from its base, by `MEASURES`; and why others have none, a line each.

    Args:
      directory: of the cells.
      wanted: the students.
    """
    asked = []
    for each in wanted:
        for condition, model in ((each.condition.name, each.model), ("base", each.base)):
            asked.append(
                grid_cells.Wanted(
                    each.setting.name,
                    each.pair,
                    each.seed,
                    condition,
                    model,
                    None,
                    each.setting.metric_version,
                    each.config.preset,
                )  # fmt: skip
            )
    loaded = grid_cells.load(directory, list(dict.fromkeys(asked)))
    values = {key: _read_out(row) for key, row in loaded.rows.items()}
    found, lacking = {}, []
    for each in wanted:
        keys = [(each.setting.name, each.seed, model) for model in (each.model, each.base)]
        if all(key in values for key in keys):
            student, base = (values[key] for key in keys)
            found[keys[0]] = {name: student[name] - base[name] for name in MEASURES}
    for line in loaded.missing:
        lacking.append(f"{line['setting']} seed {line['seed']} {line['model']}: {line['why']}")
    return found, list(dict.fromkeys(lacking))


def _read_out(row: Mapping[str, Any]) -> dict[str, float]:
    """Means over the sampled ambiguous episodes of a row."""
    items = [item for item in row["items"] if (item["kind"], item["mode"]) == ("ambiguous", "sampled")]
    return {
        "log_odds": float(np.mean([item["log_odds"] for item in items])),
        "behaviour": float(np.mean([item["action"] == "biased" for item in items])),
    }


def audit_all(
    wanted: Sequence[Student],
    workdir: Path,
    out: Path,
    spec: VirtualConfig,
    *,
    until: Callable[[], bool] = lambda: False,
) -> tuple[dict[grid_cells.Key, dict[str, Any]], list[str]]:
    """Audits the students, or reads what an earlier call has written.

    Args:
      wanted: the students; those of one setting, seed and pair one after the other share most work.
      workdir: a work directory per setting lies below it; it is read alone.
      out: gets <setting>/seed=<N>/<model>.json.
      spec: how far is looked.
      until: asked before every student; true ends the audit there.

    Returns:
      Records by (setting, seed, model), and why some students have none.
    """
    records: dict[grid_cells.Key, dict[str, Any]] = {}
    lacking: list[str] = []
    shared: RunAudit | None = None
    with progress(len(wanted), "audit", unit="student") as shown:
        for each in wanted:
            key = (each.setting.name, each.seed, each.model)
            path = grid_cells.cell_path(out, *key)
            mark = artifacts.digest([SCHEMA, DECAY, spec, each.config.student, each.pair, each.condition])
            known = _kept(path, mark)
            if known is None and until():
                lacking.append(f"{key[0]} seed {key[1]} {key[2]}: the time was up")
                continue
            if known is None:
                if shared is None or (shared.run.setting, shared.run.seed, shared.run.config) != (
                    each.setting, each.seed, each.config,
                ):  # fmt: skip
                    run = SeedPipeline(each.config, each.setting, workdir / each.setting.name, each.seed)
                    shared = RunAudit(run, spec)
                try:
                    known = shared.record(each.condition)
                except (AuditError, artifacts.WorkdirMismatch) as error:
                    logging.warning("%s: %s", each.model, error)
                    lacking.append(f"{key[0]} seed {key[1]} {key[2]}: {error}")
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                body = {"schema": SCHEMA, "mark": mark, **known}
                grid_cells.write_lines(path, body, depth=2)
                known = {**artifacts.plain(body)}
            records[key] = known
            shown.advance()
    return records, lacking


def _kept(path: Path, mark: str) -> dict[str, Any] | None:
    """The record of an earlier call of the same audit; None where it has to be made (again)."""
    if not path.exists():
        return None
    try:
        body = artifacts.unseal(path)
    except ValueError as error:
        logging.warning("%s is made again: %s", path, error)
        return None
    return body if body.get("mark") == mark else None


def joined(
    records: Mapping[grid_cells.Key, Mapping[str, Any]], values: Mapping[grid_cells.Key, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Audits beside what was measured, as `merit` takes them."""
    found = []
    for key, record in records.items():
        if key not in values:
            continue
        prediction = record["prediction"]
        scores = {AUDIT: prediction["shift"], "virtual_change": prediction["realised"], **record["baselines"]}
        names = ("setting", "pair", "seed", "condition", "arm", "teacher")
        found.append(
            {
                **{name: record[name] for name in names},
                "low": prediction["low"], "high": prediction["high"], "scores": scores, "measured": dict(values[key]),
            }
        )  # fmt: skip
    return found
