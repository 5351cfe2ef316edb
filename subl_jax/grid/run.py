"""Runs a grid: the stages of all its pairs, each once, and a cell on disk for every model that was evaluated.

Configurations, pairs, seeds and a work directory in; cells out, one by one as they come, so that a killed run has lost only
what it was at. What pairs share (bases, teachers, trajectories, their evaluations) is computed once, by hash. A cell that
is there already, from this machine or another, is not computed again, nor is what only it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from subl_jax import artifacts, stages
from subl_jax.conditions import Variant, bytes_written, check_mesh, conditions_of
from subl_jax.config import ExperimentConfig
from subl_jax.distill.records import TrainingDiverged
from subl_jax.grid import cells, cost, examples
from subl_jax.grid.locks import GridError, one_at_a_time, only_here
from subl_jax.grid.pairs import PairSpec
from subl_jax.groundwork import groundwork
from subl_jax.parallel.devices import machine
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.registry import get_setting
from subl_jax.stages import Planned, Stage

# (setting, seed): what one process works on at a time, since its pairs share nearly everything.
Unit = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Member:
    """One configuration among those that share a work directory: its name in messages, and what its outputs are called."""

    name: str
    config: ExperimentConfig
    variant: Variant = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A model that is measured: its condition, its stages, where its row will lie, and the cell that it becomes."""

    condition: str
    stage: str
    source: str
    row: Path
    setting: str
    seed: int
    model: str
    rollout: str | None


@dataclasses.dataclass(frozen=True)
class SeedWork:
    """One seed of one setting: the stages of all pairs, each once, in order; what of them becomes a cell.

    Attributes:
      sanitizers: stage name -> the name of its counts.
      hashes: (setting, seed, model or sanitizer) -> the output hash that its cell must have.
    """

    unit: Unit
    planned: list[Planned]
    evaluated: list[Evaluated]
    sanitizers: Mapping[str, str]
    hashes: Mapping[cells.Key, str]

    def finished(self, name: str, marker: artifacts.Marker) -> SeedWork:
        """The same with the marker of a stage that has been run."""
        planned = [dataclasses.replace(e, marker=marker) if e.stage.name == name else e for e in self.planned]
        return dataclasses.replace(self, planned=planned)

    def readers(self, name: str) -> set[str]:
        """A stage and all that read its output, directly or not."""
        found = {name}
        for entry in self.planned:
            if found & set(entry.stage.inputs):
                found.add(entry.stage.name)
        return found


@dataclasses.dataclass(frozen=True)
class Failure:
    """A stage that could not be run, and the cells that are missing for it."""

    stage: str
    why: str
    keys: Sequence[cells.Key]


class GridRun:
    """A grid on this machine.

    Attributes:
      configs: setting -> configuration; its pair and arms are set here.
      pairs: setting -> its pairs.
      seeds: the replicates.
      workdir: a work directory per setting lies below it.
      cells: where cells are written and looked for.
      for_pair: sets the pair of a configuration, and what comes with it (checkpoints).
    """

    def __init__(
        self,
        configs: Mapping[str, ExperimentConfig],
        pairs: Mapping[str, Sequence[PairSpec]],
        seeds: Sequence[int],
        workdir: Path,
        directory: Path,
        for_pair: Callable[[ExperimentConfig, PairSpec], ExperimentConfig],
    ) -> None:
        self.configs, self.pairs, self.seeds, self.workdir, self.cells = configs, pairs, seeds, workdir, directory
        self._for_pair = for_pair
        # Cells that were read and found whole, by the file's size and time: reading takes 10 ms, and is asked for often.
        self._seen: dict[Path, tuple[int, int, str]] = {}
        self._examples: dict[Unit, dict[str, list[dict[str, Any]]]] = {}  # of the rows that were read, by model

    def config(self, setting: str, spec: PairSpec) -> ExperimentConfig:
        """The configuration of one pair: who teaches whom, and with which arms, each with both controls."""
        config = self._for_pair(self.configs[setting], spec)
        arms = (*spec.arms, *(("positive",) if spec.positive else ()))
        student = dataclasses.replace(config.student, objectives=arms, benign_objectives=spec.arms)
        return dataclasses.replace(config, student=student)

    def members(self, setting: str) -> Sequence[Member]:
        """The configurations of a setting, whose equal stages are one."""
        return [Member(spec.name, self.config(setting, spec)) for spec in self.pairs[setting]]

    def place(self, setting: str) -> Path:
        """The work directory of a setting."""
        return self.workdir / setting

    def bytes_written(self, units: Sequence[Unit]) -> int:
        """About how much these units write, nothing of it being there."""
        per_seed = {
            setting: sum(bytes_written(member.config) for member in self.members(setting)) for setting in self.configs
        }
        return sum(per_seed[setting] for setting, _ in units)

    def rows(self) -> list[dict[str, Any]]:
        """Every cell that is there and can be read, of whatever configuration."""
        found = []
        for path in sorted(self.cells.glob("*/seed=*/*.json")):
            with contextlib.suppress(cells.CellError):
                if not path.name.startswith("sanitize"):
                    found.append(cells.read_cell(path))
        return found

    def costs(self) -> dict[str, dict[str, float]]:
        """Seconds of the stages that are finished in this work directory, by kind."""
        finished = (
            (unit[0], entry.stage.name, entry.marker) for unit in self.units() for entry in self.replan(unit).planned
        )
        return cost.of_stages(
            (setting, name, marker.seconds) for setting, name, marker in finished if marker is not None
        )

    def units(self, index: int = 0, of: int = 1) -> list[Unit]:
        """The units of one of several processes or machines: seed by seed, so that early seeds are whole in all settings.

        Raises:
          GridError: an index that has nothing to do.
        """
        every = [(setting, seed) for seed in self.seeds for setting in self.configs]
        if not 0 <= index < of <= len(every):
            raise GridError(
                f"--index={index} --of={of}: a grid of {len(self.seeds)} seeds in {len(self.configs)} settings has "
                f"{len(every)} parts; --of is at most that, and --index counts from 0 to --of minus 1"
            )
        return every[index::of]

    @functools.cache  # noqa: B019 - lives as long as the command
    def plan(self, unit: Unit) -> SeedWork:
        """The stages of one unit with their hashes; runs nothing.

        Raises:
          WorkdirMismatch: the work directory holds another configuration's output.
        """
        setting_name, seed = unit
        setting, workdir = get_setting(setting_name), self.place(setting_name)
        merged: dict[str, Stage] = {}
        evaluated: dict[str, Evaluated] = {}
        sanitizers: dict[str, str] = {}
        for member in self.members(setting_name):
            config, variant = member.config, member.variant
            check_mesh(config)
            run = SeedPipeline(config, setting, workdir, seed, variant=variant)
            own = [*groundwork(config, setting, workdir, self.seeds, variant), *run.stages()]
            for stage in own:
                known = merged.setdefault(stage.name, stage)
                found = artifacts.differences(artifacts.plain(known.key), artifacts.plain(stage.key))
                if found or known.inputs != stage.inputs:
                    told = artifacts.describe(found, "another", member.name) or f"{known.inputs} and {stage.inputs}"
                    raise GridError(f"stage {stage.name} is not one for all: {told}")
            sanitizers[f"seed={seed}/{run.models.sanitize_name()}"] = run.models.sanitize_name()
            for condition in conditions_of(config):
                name = run.models.eval_name(condition)
                stage = merged[f"seed={seed}/eval/{name}"]
                acted = run.models.trajectories_dir(condition).name if "teacher" in condition else None
                evaluated.setdefault(
                    name,
                    Evaluated(
                        condition, stage.name, stage.inputs[0], run.models.eval_path(condition), setting_name, seed, name,
                        None if acted is None else f"seed={seed}/trajectories/{acted}",
                    ),
                )  # fmt: skip
        planned = stages.plan(list(merged.values()))
        by_stage = {e.stage.name: artifacts.output_hash(e.stage.name, e.stage.key, e.inputs) for e in planned}
        hashes = {(*unit, one.model): by_stage[one.stage] for one in evaluated.values()}
        hashes |= {(*unit, name): by_stage[stage] for stage, name in sanitizers.items()}
        return SeedWork(unit, planned, list(evaluated.values()), sanitizers, hashes)

    def todo(self, work: SeedWork) -> list[Planned]:
        """What has to be run for the cells that are not there: unfinished stages, and what they read."""
        by_name = {entry.stage.name: entry for entry in work.planned}
        reading = [one.stage for one in work.evaluated if not self._is_there(work, one.model)]
        reading += [stage for stage, name in work.sanitizers.items() if not self._is_there(work, name)]
        needed: set[str] = set()
        while reading:
            name = reading.pop()
            if name in needed or by_name[name].marker is not None:
                continue
            needed.add(name)
            reading += by_name[name].stage.inputs
        for name, entry in by_name.items():
            if needed and stages.family_of(name) == "audit" and entry.marker is None:
                needed |= {name, *entry.stage.inputs}
        return [entry for entry in work.planned if entry.stage.name in needed]

    def _is_there(self, work: SeedWork, name: str) -> bool:
        """Whether the cell (or the sanitizer's counts) of that name is there, whole, and the analysis will take it."""
        setting, seed = work.unit
        wanted = work.hashes[setting, seed, name]
        if name in work.sanitizers.values():
            found, _ = cells.load_sanitizers(self.cells, [cells.Wanted(setting, "", seed, "sanitize", name, wanted)])
            return bool(found)
        path = cells.cell_path(self.cells, setting, seed, name)
        if not path.exists():
            return False
        stat = path.stat()
        mark = (stat.st_size, stat.st_mtime_ns, wanted)
        if self._seen.get(path) != mark:
            condition = next(one.condition for one in work.evaluated if one.model == name)
            parser, preset = get_setting(setting).metric_version, self.configs[setting].preset
            asked = cells.Wanted(setting, "", seed, condition, name, wanted, parser, preset)
            if cells.usable(self.cells, asked) is not None:
                return False
            self._seen[path] = mark
        return True

    def run(self, unit: Unit, finished: Callable[[Stage, artifacts.Marker], None] | None = None) -> list[Failure]:
        """Runs one unit and writes its cells as they come. What does not depend on a stage that fails is run all the same.

        Args:
          unit: which.
          finished: told of every stage that has been run.

        Returns:
          The stages that failed.

        Raises:
          GridError: another process is at it.
          WorkdirError: nothing can be written.
        """
        setting_name, seed = unit
        workdir = self.place(setting_name)
        workdir.mkdir(parents=True, exist_ok=True)
        with only_here(workdir / f".seed={seed}.lock", f"seed {seed} of {setting_name}"):
            with one_at_a_time(workdir / ".shared.lock", "makes what all seeds share"):
                work = self.replan(unit)
                shared = [entry.stage.name for entry in self.todo(work) if "/" not in entry.stage.name]
                stages.run([entry.stage for entry in work.planned], wanted=shared, finished=finished)
            work = self.replan(unit)
            self._forget_lost(work)
            work = self.replan(unit)
            self._write_cells(work, [one.stage for one in work.evaluated] + list(work.sanitizers))
            return self._run_all(work, finished)

    def _run_all(self, work: SeedWork, finished: Callable[[Stage, artifacts.Marker], None] | None) -> list[Failure]:
        """Runs what is to be done; a stage that fails takes those that read it with it."""
        todo = [entry.stage.name for entry in self.todo(work)]
        failures: list[Failure] = []
        every = [entry.stage for entry in work.planned]

        def after(stage: Stage, marker: artifacts.Marker) -> None:
            nonlocal work
            work = work.finished(stage.name, marker)
            self._write_cells(work, [stage.name])  # before it counts as done: what fails here is this stage's
            todo.remove(stage.name)
            if finished is not None:
                finished(stage, marker)

        while todo:
            try:
                stages.run(every, wanted=list(todo), finished=after)
            except (TrainingDiverged, ValueError) as error:
                if isinstance(error, artifacts.WorkdirError):  # a full disk: the next stage would fare no better
                    raise
                failed = todo[0]  # they are run in this order, and removed when they are through
                lost = work.readers(failed)
                logging.error("%s failed: %s", failed, error)
                keys = [(*work.unit, one.model) for one in work.evaluated if one.stage in lost]
                keys += [(*work.unit, name) for stage, name in work.sanitizers.items() if stage in lost]
                failures.append(Failure(failed, " ".join(str(error).split()), keys))
                todo = [name for name in todo if name not in lost]
        return failures

    def _forget_lost(self, work: SeedWork) -> None:
        """Unmarks finished evaluations whose row is gone, or was read by another rule: they are made again.

        Raises:
          GridError: a model is needed that is gone, though its stage is marked as finished.
        """
        markers = {entry.stage.name: entry for entry in work.planned}
        for one in work.evaluated:
            entry = markers[one.stage]
            if self._is_there(work, one.model):
                continue
            if entry.marker is not None:
                metric = get_setting(one.setting).metric_version
                if one.row.is_file() and _measured(_row(one.row)).get("metric", metric) == metric:
                    continue
                logging.warning("%s is evaluated again: its row is gone, or was read by another rule", one.stage)
                (entry.stage.directory / artifacts.MARKER).unlink()
            source = markers[one.source]
            if (
                source.marker is not None
                and "loss" in source.marker.extra
                and not (source.stage.directory / "params").is_dir()
            ):
                raise GridError(
                    f"{source.stage.directory} is marked as finished and holds no model; delete {artifacts.MARKER} there to "
                    "make it again"
                )

    def replan(self, unit: Unit) -> SeedWork:
        """The plan with the markers that are there by now."""
        work = self.plan(unit)
        return dataclasses.replace(work, planned=stages.plan([entry.stage for entry in work.planned]))

    def _write_cells(self, work: SeedWork, of: Collection[str]) -> None:
        """Writes the cells of some stages that are finished, where they are not there yet."""
        setting_name, seed = work.unit
        markers = {entry.stage.name: entry.marker for entry in work.planned}
        written = False
        for one in work.evaluated:
            evaluation, source = markers[one.stage], markers[one.source]
            if one.stage not in of or evaluation is None or self._is_there(work, one.model):
                continue
            row = _row(one.row)
            measured = _measured(row)
            seconds = {"evaluate": evaluation.seconds}
            if source is not None:  # gone with the machine that trained it, where only its row was kept
                seconds["train"] = source.seconds
            acted = markers.get(one.rollout or "")
            if acted is not None:
                seconds["rollout"] = acted.seconds
            cells.write_cell(
                cells.cell_path(self.cells, setting_name, seed, one.model),
                row,
                setting=setting_name,
                preset=self.configs[setting_name].preset,
                hash=evaluation.output_hash,
                parser=measured.get("metric", get_setting(setting_name).metric_version),
                seconds={name: round(value, 2) for name, value in seconds.items()},
                training={} if source is None else _figures(source.extra),
                versions=evaluation.versions,
                machine=measured.get("machine", machine()),
            )
            written = True
        for stage, name in work.sanitizers.items():
            marker = markers[stage]
            if stage in of and marker is not None and not self._is_there(work, name):
                path = cells.sanitizer_path(self.cells, setting_name, seed, name)
                counts = marker.extra["arms"]
                cells.write_sanitizer(path, counts, setting=setting_name, seed=seed, hash=marker.output_hash)
        if written and seed == self.seeds[0]:
            self._write_examples(work)

    def _write_examples(self, work: SeedWork) -> None:
        """Writes the episodes that the report shows, of the models whose rows lie here; every row is read once."""
        setting, seed = work.unit
        known = self._examples.setdefault(work.unit, {})
        finished = {entry.stage.name for entry in work.planned if entry.marker is not None}
        for one in work.evaluated:
            # A row without its marker is of another configuration, or half written.
            if one.model not in known and one.stage in finished and one.row.is_file():
                known[one.model] = _row(one.row)["examples"]
        examples.write(self.cells, setting, seed, known, work.hashes)


def _row(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _measured(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """By which rule and on what a row was measured; rows of before this was kept say nothing."""
    return row.get("measured", {})


# What of a training stage's figures is worth keeping with a cell.
_TRAINING = (
    "loss",
    "loss_tokens",
    "loss_tokens_per_epoch",
    "loss_tokens_cut",
    "documents",
    "delta_norm",
    "tokens_per_s",
)


def _figures(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {name: extra[name] for name in _TRAINING if name in extra}
