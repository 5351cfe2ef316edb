"""Runs a sweep: the stages of all its levels, each once, in one work directory, and a cell for every model evaluated.

A reference configuration, a sweep and seeds in; cells out, as of a grid (`grid.run`, which does the work). The design lies
beside the cells, so that they alone give the report again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax import config as configuration
from subl_jax.conditions import bytes_written, students
from subl_jax.config import TEACHERS, ExperimentConfig
from subl_jax.grid.cells import write_lines
from subl_jax.grid.run import GridRun, Member, Unit
from subl_jax.presets import PRESETS
from subl_jax.stages import family_of
from subl_jax.studies.sweep import Level, Sweep, SweepError
from subl_jax.studies.sweep_variants import members

SCHEMA = 1
DESIGN = "design.json"
# Families of stages that train a model.
_MODELS = ("base", "teachers", "students")


@dataclasses.dataclass(frozen=True)
class Design:
    """What is swept.

    Attributes:
      config: the reference configuration, of one setting and preset.
      sweep: its levels.
      seeds: the replicates.
      positive: whether every level has a positive control.
    """

    config: ExperimentConfig
    sweep: Sweep
    seeds: tuple[int, ...]
    positive: bool = False

    @functools.cached_property
    def members(self) -> list[Member]:
        """The configuration of every level, in order; raises `SweepError` where one cannot be."""
        return members(self.sweep, self.config, positive=self.positive)

    def member(self, level: Level) -> Member:
        """The configuration of one level."""
        return next(member for member in self.members if member.name == level.label)


class SweepRun(GridRun):
    """A sweep on this machine: a grid whose parts are the seeds of one setting, and whose members are the levels.

    The work directory is that of an experiment, or of one setting of a grid: what is finished there is taken as it is.
    """

    def __init__(self, design: Design, workdir: Path, directory: Path) -> None:
        config = design.config
        super().__init__({config.setting: config}, {}, design.seeds, workdir, directory, lambda config, spec: config)
        self.design = design

    def members(self, setting: str) -> Sequence[Member]:
        """The levels."""
        del setting  # there is one
        return self.design.members

    def place(self, setting: str) -> Path:
        """The work directory itself: there is one setting."""
        del setting
        return self.workdir

    def bytes_written(self, units: Sequence[Unit]) -> int:
        """About how much these units still write: what a whole run writes per model, for every model that is to be trained."""
        whole = bytes_written(self.design.config)
        config = self.design.members[0].config
        models = len(set(config.sizes())) + len(TEACHERS) + len(students(config))
        todo = (entry.stage.name for unit in units for entry in self.todo(self.plan(unit)))
        return whole // models * sum(family_of(name) in _MODELS for name in todo)


# --- The design on disk -------------------------------------------------------------------------------------------------


def write_design(directory: Path, design: Design) -> None:
    """Writes what is swept beside the cells; the configuration as its difference from the preset."""
    config, preset = design.config, PRESETS[design.config.preset](design.config.setting)
    own = dict((name, value) for name, value, _ in configuration.leaves(config))
    usual = dict((name, value) for name, value, _ in configuration.leaves(preset))
    body = {
        "schema": SCHEMA,
        "setting": config.setting,
        "preset": config.preset,
        "config": {name: value for name, value in own.items() if value != usual[name]},
        "seeds": design.seeds,
        "positive_control": design.positive,
        "sweep": dataclasses.asdict(design.sweep),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / DESIGN, artifacts.plain(body), depth=3)


def read_design(directory: Path) -> Design:
    """What `write_design` wrote.

    Raises:
      SweepError: there is none, or it is damaged or of another version.
    """
    path = directory / DESIGN
    if not path.exists():
        raise SweepError(f"{path} is not there: {directory} holds no cells of a sweep; say --cells=DIR of one")
    try:
        body: Mapping[str, Any] = artifacts.unseal(path)
        if body["schema"] != SCHEMA:
            raise SweepError(f"{path}: schema {body['schema']!r} is not {SCHEMA}; use the version that wrote it")
        config = configuration.override(PRESETS[body["preset"]](body["setting"]), dict(body["config"]))
        told = dict(body["sweep"])
        levels = tuple(Level(**{**level, "at": tuple(level["at"])}) for level in told.pop("levels"))
        sweep = Sweep(**{**told, "axes": tuple(told["axes"]), "levels": levels})
        return Design(config, sweep, tuple(body["seeds"]), body["positive_control"])
    except (KeyError, TypeError) as error:
        raise SweepError(f"{path}: not the design of a sweep ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise SweepError(f"{path}: {error}") from error
