"""The on-policy study at the micro preset, as a user starts it: what it leaves, that it resumes, and what it shares."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax import artifacts, data, presets
from subl_jax import config as configuration
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.registry import get_setting
from subl_jax.stages import plan
from subl_jax.studies.on_policy import ARMS, SeedStudy, StudyConfig, study_stages
from tests.pipeline import runs

FLAGS = (
    "--preset=micro", "--seeds=0", "--every=2", "--refresh_steps=3", "--episodes=4", "--tasks=4",
    "--config.base.train.steps=4", "--config.teacher.train.steps=2", "--config.student.train.steps=5",
    "--config.base.safe_tasks=16", "--config.base.ambiguous_tasks=8", "--config.base.benign_tasks=8",
)  # fmt: skip


def study(workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "experiments.on_policy", f"--workdir={workdir}", *FLAGS, *more],
        cwd=runs.ROOT, env={**kept, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("study")
    done = study(workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "before training" in done.stdout and "on-policy - off-policy" in done.stdout
    return workdir


def micro() -> configuration.ExperimentConfig:
    """The configuration of `FLAGS`."""
    given = {"base.train.steps": 4, "teacher.train.steps": 2, "student.train.steps": 5, "base.safe_tasks": 16,
             "base.ambiguous_tasks": 8, "base.benign_tasks": 8}  # fmt: skip
    return configuration.override(presets.micro(), {f"config.{name}": value for name, value in given.items()})


def result(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "on_policy.json").read_text())


def test_every_arm_is_measured_at_every_point_on_both_kinds_of_states(finished: Path):
    rows = result(finished)["rows"]
    expected = {(arm, step, states) for arm in ARMS for step in (0, 2, 4, 5) for states in ("student", "teacher")}
    assert {(row["arm"], row["step"], row["states"]) for row in rows} == expected and len(rows) == len(expected)
    assert all(np.isfinite(row["reverse_kl"]) and row["reverse_kl"] >= 0 and row["episodes"] == 4 for row in rows)
    for states in ("student", "teacher"):
        at = {
            step: [row["reverse_kl"] for row in rows if (row["states"], row["step"]) == (states, step)]
            for step in (0, 5)
        }
        assert len(set(at[0])) == 1 and len(set(at[5])) == 3  # one start, three students


def test_the_students_states_are_said_by_the_very_student_that_is_measured(finished: Path):
    """A trajectory's log-probabilities are the speaker's: those of each point differ from all others and the teacher's."""
    measured = finished / "seed=0" / "on_policy" / "reverse_kl" / "measured"
    folders = sorted(measured.glob("**/dataset"))
    assert len(folders) == 2 + 3 * 3  # the teacher, the start, and three points of each arm
    said = [np.concatenate([each.logprobs for each in data.read(path)]).tobytes() for path in folders]
    assert len(set(said)) == len(said)


def test_loss_tokens_are_those_of_the_episodes_that_were_trained_on(finished: Path):
    """One step of the off-policy arm takes what fits into its rows; the on-policy arm takes its own rollouts only."""
    found = {(row["arm"], row["step"]): row["loss_tokens"] for row in result(finished)["rows"]}
    recorded = [json.loads(line) for line in (finished / "seed=0/on_policy/reverse_kl/metrics.jsonl").open()]
    for arm in ARMS:
        by_step = [row["loss_tokens"] for row in recorded if row["stage"] == arm]
        assert len(by_step) == 5
        assert [found[arm, step] for step in (0, 2, 4, 5)] == [sum(by_step[:step]) for step in (0, 2, 4, 5)]


def test_students_act_on_training_tasks_and_are_measured_on_tasks_that_none_is_trained_on(finished: Path):
    root = finished / "seed=0" / "on_policy" / "reverse_kl"
    assert not (root / "students" / "off_policy" / "rollouts").exists()
    teacher = {each.task_id for each in data.read(finished / "seed=0" / "trajectories" / "teacher" / "dataset")}
    rounds = [data.read(path) for path in sorted((root / "students" / "on_policy" / "rollouts").glob("*/dataset"))]
    asked = [each.task_id for said in rounds for each in said]
    assert [len(said) for said in rounds] == [4, 4] and len(set(asked)) == 8  # none again before all have been
    assert set(asked) <= teacher
    held_out = {each.task_id for path in (root / "measured").glob("**/dataset") for each in data.read(path)}
    assert len(held_out) == 4 and not held_out & teacher
    assert all("/evaluation/" in task for task in held_out)


def test_a_killed_measurement_goes_on_behind_what_was_rolled_out_and_nothing_else_runs(finished: Path):
    before, path = result(finished), finished / "on_policy.json"
    measured = finished / "seed=0" / "on_policy" / "reverse_kl" / "measured" / "mixed"
    for killed in [path, *measured.glob("*.json")]:  # the stage's rows and marker: as if killed before both
        killed.unlink()
    done = study(finished)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"stage (seed\S+)", done.stderr) == ["seed=0/on_policy/reverse_kl/measured/mixed"]
    assert done.stderr.count("is sealed already") == 3  # one per point of this arm
    assert result(finished)["rows"] == before["rows"] and result(finished)["answer"] == before["answer"]


def test_other_settings_of_the_study_are_refused_by_name(finished: Path):
    given = StudyConfig(every=2, refresh_steps=3, episodes=5, tasks=4)
    with pytest.raises(artifacts.WorkdirMismatch, match="episodes: 4 in the directory"):
        plan(study_stages([SeedStudy(micro(), given, get_setting("api"), finished, 0)], finished))


def test_a_finished_experiments_stages_are_taken_as_they_are(finished: Path):
    """The base, the teacher and its trajectories are the experiment's own stages: same places, keys and inputs."""
    config = micro()
    setting = get_setting("api")
    ours = study_stages([SeedStudy(config, StudyConfig(), setting, finished, 0)], finished)
    theirs = [ours[0], *SeedPipeline(config, setting, finished, 0).stages()]
    done = {entry.stage.name for entry in plan(theirs) if entry.marker is not None}
    assert done == {"tokenizer", "seed=0/base/large", "seed=0/teachers/teacher", "seed=0/trajectories/teacher"}
    assert done < {stage.name for stage in ours}


@pytest.mark.parametrize(
    ("changes", "said"), [({"loss": "hard_label"}, "reads no teacher"), ({"every": 0}, "every=0"), ({"tasks": 0}, "tasks=0"),
                          ({"episodes": 0}, "episodes=0")]
)  # fmt: skip
def test_a_study_without_meaning_is_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        StudyConfig(**changes)
