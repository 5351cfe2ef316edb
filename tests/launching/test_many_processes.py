"""The experiment as users start it, on two processes, beside the same on one: `python -m launch.local --processes=2 -- ...`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from subl_jax import data
from subl_jax.metrics.writers import read_metrics

pytestmark = pytest.mark.soak

REPOSITORY = Path(__file__).parents[2]
EXPERIMENT = ("-m", "experiments.api_deletion", "--preset=micro")
TRAJECTORIES = Path("seed=0") / "trajectories" / "teacher" / "dataset"


def run(*command: str) -> str:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def together(workdir: Path, *flags: str) -> str:
    return run("-m", "launch.local", "--processes=2", "--", "python", *EXPERIMENT, f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(*EXPERIMENT, f"--workdir={workdir}")
    return workdir


def test_two_processes_roll_out_the_episodes_of_one_from_the_same_teachers(alone: Path, tmp_path: Path) -> None:
    both = tmp_path / "run"
    shutil.copytree(alone, both)
    for made in ("trajectories", "sanitize", "students", "eval"):
        shutil.rmtree(both / "seed=0" / made)
    together(both, "--stage=trajectories")
    left, right = data.read(alone / TRAJECTORIES), data.read(both / TRAJECTORIES)
    assert len(left) == len(right) > 4
    assert len(list((both / TRAJECTORIES).glob("*array_record*"))) == 2  # each process has written its own
    for one, other in zip(left, right, strict=True):
        assert (one.task_id, one.sample, one.status) == (other.task_id, other.sample, other.status)
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


def test_a_whole_run_on_two_processes_is_that_of_one(alone: Path, tmp_path: Path) -> None:
    both = tmp_path / "run"
    assert "student - control_student" in together(both)  # the table, from the first process
    # One training step.
    first, second = (read_metrics(root / "seed=0" / "metrics.jsonl")[0] for root in (alone, both))
    assert (first["stage"], first["step"]) == (second["stage"], second["step"]) == ("base/large", 1)
    assert first["loss_tokens"] == second["loss_tokens"]
    for name in ("loss", "gradient_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)
    # Every record is there once, whichever process wrote it.
    records = [
        [(row["stage"], row["step"]) for row in read_metrics(root / "seed=0" / "metrics.jsonl")]
        for root in (alone, both)
    ]
    assert records[0] == records[1]
    # The whole: rates within each other's intervals, on as many items.
    one, two = (json.loads((root / "summary.json").read_text())["conditions"] for root in (alone, both))
    assert one.keys() == two.keys()
    for name, condition in one.items():
        other = two[name]
        assert other["n"] == condition["n"]
        assert condition["ci95"][0] <= other["behaviour_rate"] <= condition["ci95"][1]
        assert other["log_odds"] == pytest.approx(condition["log_odds"], abs=1e-3)
    assert not list((both / "seed=0").rglob(".*part-*"))


def test_a_finished_run_is_told_again_at_once_on_one_process(alone: Path, tmp_path: Path) -> None:
    both = tmp_path / "run"
    shutil.copytree(alone, both)
    before = {path: path.stat().st_mtime_ns for path in both.rglob("stage.json")}
    assert "student - control_student" in together(both)
    assert {path: path.stat().st_mtime_ns for path in both.rglob("stage.json")} == before
