"""Stages on disk: what each depends on, where its output lies, and whether it is already there.

A list of stages in order comes in. Their hashes are known before any of them runs, so a work directory of another
configuration is refused before any work is done, and a finished stage is never run again.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from subl_jax import artifacts
from subl_jax.distill.preemption import leave_if_asked
from subl_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: unique, `seed=N/family/which`; `--stage` takes it, or the family ("students") for all of them.
      directory: where its output and its marker lie.
      key: the part of the configuration that it depends on.
      inputs: names of the stages that it reads.
      run: makes the output; its result is kept in the marker (figures that the summary needs). Of several processes all
        run it, and the first writes what they share.
      alone: of several processes only the first runs it, since it uses no device.
    """

    name: str
    directory: Path
    key: Mapping[str, Any]
    inputs: tuple[str, ...]
    run: Callable[[], Mapping[str, Any] | None]
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage with the hashes of its inputs, and its marker if it is finished."""

    stage: Stage
    inputs: Mapping[str, str]
    marker: artifacts.Marker | None


def plan(stages: Sequence[Stage]) -> list[Planned]:
    """Hashes every stage and looks each up; runs nothing.

    Raises:
      WorkdirMismatch: a finished stage of another configuration stands in a stage's place.
      ValueError: a stage reads one that does not stand before it.
    """
    hashes: dict[str, str] = {}
    planned = []
    for stage in stages:
        unknown = [name for name in stage.inputs if name not in hashes]
        if unknown:
            raise ValueError(f"stage {stage.name} reads {unknown[0]}, which does not stand before it")
        inputs = {name: hashes[name] for name in stage.inputs}
        hashes[stage.name] = artifacts.output_hash(stage.name, stage.key, inputs)
        planned.append(Planned(stage, inputs, artifacts.lookup(stage.directory, stage.name, stage.key, inputs)))
    return planned


def run(
    stages: Sequence[Stage],
    only: str | None = None,
    *,
    wanted: Collection[str] | None = None,
    finished: Callable[[Stage, artifacts.Marker], None] | None = None,
) -> dict[str, artifacts.Marker]:
    """Runs what is not finished, in order, and returns every marker.

    Args:
      stages: all stages of the run.
      only: a stage name or family; stages behind the last match are left alone (those before it run if unfinished).
      wanted: names of the stages to run; the others are left alone, finished or not. None: all.
      finished: told of every stage that has just been run.

    Raises:
      ValueError: `only` names no stage.
      ProcessError: processes see different work directories.
      Preempted: SIGTERM came while the last step of a training ran.
    """
    planned = plan(stages)
    _one_directory([entry.stage.name for entry in planned if entry.marker is not None])
    if only is not None:
        matching = [i for i, e in enumerate(planned) if only in (e.stage.name, family_of(e.stage.name))]
        if not matching:
            families = sorted({family_of(stage.name) for stage in stages})
            raise ValueError(f"--stage={only} names no stage; use one of {', '.join(families)}")
        planned = planned[: matching[-1] + 1]
    markers = {}
    for entry in planned:
        stage = entry.stage
        if entry.marker is not None:
            markers[stage.name] = entry.marker
            continue
        if wanted is not None and stage.name not in wanted:
            continue
        logging.info("stage %s", stage.name)
        stage.directory.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        extra = stage.run() if processes.is_first() or not stage.alone else None
        processes.barrier(f"stage {stage.name}")  # what each has written is there
        if processes.is_first():
            artifacts.complete(
                stage.directory,
                stage=stage.name,
                key=stage.key,
                inputs=entry.inputs,
                seconds=time.perf_counter() - began,
                extra=extra or {},
            )
        processes.barrier(f"marker of {stage.name}")
        marker = _seen(entry)
        if marker is None:
            raise processes.ProcessError(
                f"the first process has finished {stage.name}, and {stage.directory} does not show it here: --workdir must "
                "be on a file system that all processes share"
            )
        markers[stage.name] = marker
        if finished is not None:
            finished(stage, marker)
        leave_if_asked(stage.name)
    return markers


# What a network file system may keep of what it has seen, in seconds, and how often it is asked.
_LATE_S, _ASKED_EVERY_S = 60.0, 0.5


def _seen(entry: Planned) -> artifacts.Marker | None:
    """The marker of a stage that is finished; a network file system may show it late where it had been looked for before."""
    stage, until = entry.stage, time.monotonic() + _LATE_S
    while True:
        marker = artifacts.lookup(stage.directory, stage.name, stage.key, entry.inputs)
        if marker is not None or time.monotonic() > until:
            return marker
        time.sleep(_ASKED_EVERY_S)
        os.listdir(stage.directory.parent)  # which has it look again


def _one_directory(finished: list[str]) -> None:
    """Refuses processes that do not see the same finished stages."""
    seen = processes.gather("finished stages", finished)
    for rank, others in enumerate(seen):
        differing = sorted(set(others) ^ set(seen[0]))
        if differing:
            raise processes.ProcessError(
                f"process {rank} sees other finished stages than the first ({', '.join(differing[:3])}): --workdir must be on "
                "a file system that all processes share"
            )


def family_of(name: str) -> str:
    """What `--stage` calls a group of stages: the first part of the name behind the seed, whichever size or variant it is."""
    return re.split("[@~]", next(part for part in name.split("/") if not part.startswith("seed=")))[0]
