"""Runs a grid: the stages of all its pairs, each once, and a cell on disk for every model that was evaluated.

Configurations, pairs, seeds and a work directory in; cells out, one by one as they come, so that a killed run has lost only
what it was at. What pairs share (bases, teachers, trajectories, their evaluations) is computed once, by hash. A cell that
is there already, from this machine or another, is not computed again, nor is what only it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from subl_jax import artifacts, stages
from subl_jax.conditions import bytes_written, check_mesh, conditions_of
from subl_jax.config import ExperimentConfig
from subl_jax.grid import cells, cost
from subl_jax.grid.pairs import PairSpec
from subl_jax.groundwork import groundwork
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.registry import get_setting
from subl_jax.stages import Planned, Stage

# Tasks of the first seed that the report's episode browser shows, of those that an evaluation keeps whole.
EXAMPLE_TASKS = 4
# (setting, seed): what one process works on at a time, since its pairs share nearly everything.
Unit = tuple[str, int]


class GridError(ValueError):
    """A grid that cannot be run as asked; one line with the remedy."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A model that is measured: its stages, where its row will lie, and the cell that it becomes."""

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
    """

    unit: Unit
    planned: list[Planned]
    evaluated: list[Evaluated]
    sanitizers: Mapping[str, str]

    @property
    def hashes(self) -> dict[cells.Key, str]:
        """(setting, seed, model or sanitizer) -> the output hash that its cell must have."""
        setting, seed = self.unit
        by_stage = {entry.stage.name: _hash(entry) for entry in self.planned}
        found = {(setting, seed, one.model): by_stage[one.stage] for one in self.evaluated}
        return found | {(setting, seed, name): by_stage[stage] for stage, name in self.sanitizers.items()}


def _hash(entry: Planned) -> str:
    return artifacts.output_hash(entry.stage.name, entry.stage.key, entry.inputs)


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

    def config(self, setting: str, spec: PairSpec) -> ExperimentConfig:
        """The configuration of one pair: who teaches whom, and with which arms, each with both controls."""
        config = self._for_pair(self.configs[setting], spec)
        arms = (*spec.arms, *(("positive",) if spec.positive else ()))
        student = dataclasses.replace(config.student, objectives=arms, benign_objectives=spec.arms)
        return dataclasses.replace(config, student=student)

    def bytes_written(self, units: Sequence[Unit]) -> int:
        """About how much these units write, nothing of it being there."""
        per_seed = {
            setting: sum(bytes_written(self.config(setting, spec)) for spec in specs)
            for setting, specs in self.pairs.items()
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
            (unit[0], entry.stage.name, entry.marker) for unit in self.units() for entry in self.plan(unit).planned
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
        setting, workdir = get_setting(setting_name), self.workdir / setting_name
        merged: dict[str, Stage] = {}
        evaluated: dict[str, Evaluated] = {}
        sanitizers: dict[str, str] = {}
        for spec in self.pairs[setting_name]:
            config = self.config(setting_name, spec)
            check_mesh(config)
            run = SeedPipeline(config, setting, workdir, seed)
            own = [*groundwork(config, setting, workdir, self.seeds), *run.stages()]
            for stage in own:
                known = merged.setdefault(stage.name, stage)
                found = artifacts.differences(artifacts.plain(known.key), artifacts.plain(stage.key))
                if found or known.inputs != stage.inputs:
                    told = artifacts.describe(found, "one pair", spec.name) or f"{known.inputs} and {stage.inputs}"
                    raise GridError(f"stage {stage.name} is not one for all pairs: {told}")
            sanitizers[f"seed={seed}/{run.models.sanitize_name()}"] = run.models.sanitize_name()
            for condition in conditions_of(config):
                name = run.models.eval_name(condition)
                stage = merged[f"seed={seed}/eval/{name}"]
                acted = run.models.trajectories_dir(condition).name if "teacher" in condition else None
                evaluated.setdefault(
                    name,
                    Evaluated(
                        stage.name, stage.inputs[0], run.models.eval_path(condition), setting_name, seed, name,
                        None if acted is None else f"seed={seed}/trajectories/{acted}",
                    ),
                )  # fmt: skip
        return SeedWork(unit, stages.plan(list(merged.values())), list(evaluated.values()), sanitizers)

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
        if needed and by_name["audit"].marker is None:
            needed |= {"audit", *by_name["audit"].stage.inputs}
        return [entry for entry in work.planned if entry.stage.name in needed]

    def _is_there(self, work: SeedWork, name: str) -> bool:
        """Whether the cell (or the sanitizer's counts) of that name is there, whole, and of this configuration."""
        setting, seed = work.unit
        wanted = work.hashes[setting, seed, name]
        if name in work.sanitizers.values():
            found, _ = cells.load_sanitizers(self.cells, [_wanted(setting, seed, "sanitize", name, wanted)])
            return bool(found)
        try:
            return cells.read_cell(cells.cell_path(self.cells, setting, seed, name))["hash"] == wanted
        except cells.CellError:
            return False

    def run(self, unit: Unit, finished: Callable[[Stage, artifacts.Marker], None] | None = None) -> None:
        """Runs one unit and writes its cells as they come.

        Args:
          unit: which.
          finished: told of every stage that has been run.

        Raises:
          GridError: another process is at it.
        """
        setting_name, seed = unit
        workdir = self.workdir / setting_name
        workdir.mkdir(parents=True, exist_ok=True)
        with only_here(workdir / f".seed={seed}.lock", f"seed {seed} of {setting_name}"):
            with shared_stages(workdir / ".shared.lock"):
                work = self.replan(unit)
                shared = [entry.stage.name for entry in self.todo(work) if "/" not in entry.stage.name]
                stages.run([entry.stage for entry in work.planned], wanted=shared, finished=finished)
            work = self.replan(unit)
            self._write_cells(work)

            def after(stage: Stage, marker: artifacts.Marker) -> None:
                self._write_cells(self.replan(unit))
                if finished is not None:
                    finished(stage, marker)

            todo = [entry.stage.name for entry in self.todo(work)]
            stages.run([entry.stage for entry in work.planned], wanted=todo, finished=after)

    def replan(self, unit: Unit) -> SeedWork:
        """The plan with the markers that are there by now."""
        work = self.plan(unit)
        return dataclasses.replace(work, planned=stages.plan([entry.stage for entry in work.planned]))

    def _write_cells(self, work: SeedWork) -> None:
        """Writes every cell whose evaluation is finished and which is not there yet."""
        setting_name, seed = work.unit
        markers = {entry.stage.name: entry.marker for entry in work.planned}
        written = False
        for one in work.evaluated:
            evaluation, source = markers[one.stage], markers[one.source]
            if evaluation is None or self._is_there(work, one.model):
                continue
            seconds = {"evaluate": evaluation.seconds}
            if source is not None:  # gone with the machine that trained it, where only its row was kept
                seconds["train"] = source.seconds
            acted = markers.get(one.rollout or "")
            if acted is not None:
                seconds["rollout"] = acted.seconds
            cells.write_cell(
                cells.cell_path(self.cells, setting_name, seed, one.model),
                json.loads(one.row.read_text(encoding="utf-8")),
                setting=setting_name,
                preset=self.configs[setting_name].preset,
                hash=evaluation.output_hash,
                parser=get_setting(setting_name).metric_version,
                seconds={name: round(value, 2) for name, value in seconds.items()},
                training={} if source is None else _figures(source.extra),
                versions=evaluation.versions,
                machine=machine(),
            )
            written = True
        for stage, name in work.sanitizers.items():
            marker = markers[stage]
            if marker is not None and not self._is_there(work, name):
                path = cells.sanitizer_path(self.cells, setting_name, seed, name)
                counts = marker.extra["arms"]
                cells.write_sanitizer(path, counts, setting=setting_name, seed=seed, hash=marker.output_hash)
        if written and seed == self.seeds[0]:
            self._write_examples(work)

    def _write_examples(self, work: SeedWork) -> None:
        """Whole conversations of a few tasks, by every model whose row lies here; fewer than are there change nothing."""
        setting_name, seed = work.unit
        episodes: dict[str, dict[str, Any]] = {}
        for one in work.evaluated:
            if one.row.is_file():
                for example in json.loads(one.row.read_text(encoding="utf-8"))["examples"]:
                    episodes.setdefault(example["task_id"], {})[one.model] = example
        path = self.cells / setting_name / "episodes.json"
        with contextlib.suppress(cells.CellError):
            known = cells.read_episodes(path)
            if known["seed"] == seed and len(known["tasks"][0]["episodes"]) > len(next(iter(episodes.values()), {})):
                return
        if episodes:
            cells.write_episodes(path, seed, _telling(episodes))


_EPISODE = ("messages", "action", "tool", "turn", "done")


def _telling(episodes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The tasks on which models differ most: a task on which all do the same shows nothing."""

    def differing(task: str) -> int:
        return len({(example["action"], example["tool"]) for example in episodes[task].values()})

    return [
        {
            "task_id": task,
            "prompt": next(iter(episodes[task].values()))["prompt"],
            "episodes": {
                model: {name: example[name] for name in _EPISODE} for model, example in episodes[task].items()
            },
        }
        for task in sorted(episodes, key=lambda task: (-differing(task), task))[:EXAMPLE_TASKS]
    ]


def _wanted(setting: str, seed: int, condition: str, model: str, expected: str) -> cells.Wanted:
    return cells.Wanted(setting, "", seed, condition, model, expected)


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


def machine() -> str:
    """What this runs on, in words: accelerator, processor, cores."""
    import jax

    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}, "
    return f"{kind}{_processor()}, {len(os.sched_getaffinity(0))} cores"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def only_here(path: Path, what: str) -> Iterator[None]:
    """Holds a lock that no other process on this file system holds; it ends with the process, however that ends.

    Raises:
      GridError: another one holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise GridError(
                f"{what} is being run by {file.read().strip() or 'another process'}; give each process a part of its own with "
                "--index and --of, or wait for it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def shared_stages(path: Path) -> Iterator[None]:
    """One process after the other: the stages of a setting that all its seeds share."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process, which makes what all seeds share")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
