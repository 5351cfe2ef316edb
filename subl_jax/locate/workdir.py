"""A finished work directory as it is looked into: its configuration, its models by condition, and what its students read.

Nothing is written there, and what is not finished is named rather than waited for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts, data
from subl_jax.conditions import SeedModels
from subl_jax.config import OBJECTIVES, STUDENT_OF, TEACHERS, ExperimentConfig, suffix_of
from subl_jax.data.matching import match_arms
from subl_jax.models.config import LoraConfig
from subl_jax.presets import PRESETS
from subl_jax.trajectory import Trajectory


def read_config(workdir: Path) -> ExperimentConfig:
    """The configuration that a work directory was made with. What its version did not know has its default.

    Raises:
      ValueError: there is none, or it has fields that this version does not know.
    """
    path = workdir / "config.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({artifacts.reason(error)}); name a directory that an experiment has made, of a grid one "
            "of its settings, e.g. --workdir=runs/grid/api"
        ) from error
    if told.get("preset") not in PRESETS:
        raise ValueError(f"{path} has preset {told.get('preset')!r}, which is none of {', '.join(PRESETS)}")
    return _told(PRESETS[told["preset"]](told["setting"]), told, str(path))


def _told(default: Any, told: Mapping[str, Any], where: str) -> Any:
    """A configuration dataclass with the values of its JSON form."""
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    unknown = sorted(set(told) - set(fields))
    if unknown:
        raise ValueError(
            f"{where} has the field {unknown[0]}, which this version does not know; use the one that wrote it"
        )
    changes = {
        name: _told(fields[name], value, where) if dataclasses.is_dataclass(fields[name]) else _value(name, value)
        for name, value in told.items()
    }
    return dataclasses.replace(default, **changes)


def _value(name: str, value: Any) -> Any:
    """A leaf from JSON, which has no tuples; adapters are the one leaf that may be a dataclass or None."""
    if name == "lora" and isinstance(value, Mapping):
        return LoraConfig(**{key: _value(key, each) for key, each in value.items()})
    return tuple(_value(name, each) for each in value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Found:
    """The students of one seed and pair that are there.

    Attributes:
      students: condition -> the teacher that it was distilled from.
      missing: conditions that were asked for by name and are not finished.
    """

    students: Mapping[str, str]
    missing: Sequence[str]


def find_students(models: SeedModels, arms: Sequence[str] = ()) -> Found:
    """The finished students of a seed and pair, in the order of the tables.

    Args:
      models: of the seed and pair.
      arms: objectives; without any, all that are there. Of arms that are named, what is missing is told.

    Raises:
      ValueError: an arm that there is not.
    """
    unknown = [arm for arm in arms if arm not in OBJECTIVES]
    if unknown:
        raise ValueError(f"--arms: {unknown[0]!r} is unknown, use some of {', '.join(OBJECTIVES)}")
    students: dict[str, str] = {}
    missing: list[str] = []
    for arm in arms or OBJECTIVES:
        for teacher in TEACHERS if arm != "positive" else ("teacher",):
            condition = "positive_student" if arm == "positive" else STUDENT_OF[teacher] + suffix_of(arm)
            if finished(models.root / "students" / models.student_name(condition)):
                students[condition] = teacher
            elif arms:
                missing.append(condition)
    return Found(students, missing)


def finished(directory: Path) -> bool:
    """Whether a stage is finished: its marker is written last."""
    return (directory / artifacts.MARKER).is_file()


def require(models: SeedModels, seed: int) -> None:
    """Refuses a seed whose teachers, trajectories or filter are not finished.

    Raises:
      ValueError: names what is missing.
    """
    places = [models.base_dir(size) for size in models.sizes] + [models.teacher_dir(name) for name in TEACHERS]
    places += [models.trajectories_dir(name) for name in TEACHERS] + [models.root / models.sanitize_name()]
    lacking = [str(place.relative_to(models.workdir)) for place in places if not finished(place)]
    if lacking:
        raise ValueError(
            f"seed {seed} is not finished in {models.workdir}: {', '.join(lacking)} missing; run the experiment up to "
            "--stage=students, or leave the seed out of --seeds"
        )


def clean_documents(models: SeedModels) -> Mapping[str, list[Trajectory]]:
    """What the students read: by teacher, the trajectories that survive every filter, cut to equal loss tokens.

    They are as the teacher wrote them, in the teacher's tokens also where the student has a tokenizer of its own.
    """
    arms = {name: data.read(models.trajectories_dir(name) / "dataset") for name in TEACHERS}
    return match_arms(arms, models.surviving()).documents
