"""What is read from a work directory: its configuration, field by field, and which students are finished."""

from __future__ import annotations

import dataclasses
import json

import pytest

from subl_jax import artifacts
from subl_jax.conditions import SeedModels
from subl_jax.locate import workdir
from subl_jax.models.config import LoraConfig
from subl_jax.presets import PRESETS


def written(directory, config):
    artifacts.write_json_atomic(directory / "config.json", artifacts.plain(config))
    return directory


def changed():
    """A configuration whose tuples, nested leaves and adapters are not the defaults."""
    config = PRESETS["micro"]("bash")
    return dataclasses.replace(
        config,
        pair="large_small",
        large=dataclasses.replace(config.large, windows=(3,), lora=LoraConfig(rank=3, targets=("q", "head"))),
        student=dataclasses.replace(config.student, objectives=("hard",), temperature=1.5, lora=True),
        rollout=dataclasses.replace(config.rollout, logit_bias=((3, -1.0),)),
    )


@pytest.mark.parametrize("config", [*(make("api") for make in PRESETS.values()), changed()])
def test_a_configuration_comes_back_as_it_was_written(tmp_path, config):
    assert workdir.read_config(written(tmp_path, config)) == config


def test_a_field_of_another_version_and_a_directory_without_configuration_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot be read .*runs/grid/api"):
        workdir.read_config(tmp_path)
    told = artifacts.plain(PRESETS["micro"]())
    (tmp_path / "config.json").write_text(json.dumps({**told, "student": {**told["student"], "mood": 1}}))
    with pytest.raises(ValueError, match="has the field mood"):
        workdir.read_config(tmp_path)


def test_students_are_those_with_a_marker_and_missing_ones_are_told_only_of_arms_that_were_named(tmp_path):
    models = SeedModels(PRESETS["micro"](), tmp_path, 0)
    for name in ("student", "control_student", "student_hard", "positive_student"):
        (tmp_path / "seed=0" / "students" / name).mkdir(parents=True)
        (tmp_path / "seed=0" / "students" / name / artifacts.MARKER).write_text("{}")
    (tmp_path / "seed=0" / "students" / "student_drop").mkdir()  # begun, not finished
    found = workdir.find_students(models)
    assert dict(found.students) == {
        "student": "teacher", "control_student": "control_teacher", "student_hard": "teacher", "positive_student": "teacher",
    }  # fmt: skip
    assert found.missing == []
    named = workdir.find_students(models, ["full", "drop"])
    assert list(named.students) == ["student", "control_student"]
    assert named.missing == ["benign_student", "student_drop", "control_student_drop", "benign_student_drop"]
    with pytest.raises(ValueError, match="'ful' is unknown"):
        workdir.find_students(models, ["ful"])
    with pytest.raises(ValueError, match=r"seed 0 is not finished .*base/large"):
        workdir.require(models, 0)
