"""The command on a small grid, as a user starts it: students of a run, the whole grid, and one's own models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import runs

SMALL = (
    "--preset=micro", "--config.base.train.steps=4", "--config.teacher.train.steps=2", "--config.student.train.steps=5",
    "--config.base.safe_tasks=16", "--config.base.ambiguous_tasks=8", "--config.base.benign_tasks=8",
)  # fmt: skip
LOOKS = ("--virtual_steps=3", "--stretches=2", "--probes_per_family=1")
GRID = ("--settings=api", "--pairs=large_other_tokenizer", "--seeds=0")


def started(module: str, *more: str, devices: int | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if devices:
        kept["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *more], cwd=runs.ROOT, env={**kept, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of the pair with two tokenizers, whose students learn from labels alone."""
    workdir = tmp_path_factory.mktemp("grid")
    done = started("paper_grid", f"--workdir={workdir}", *SMALL, *GRID)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.mark.soak
def test_every_student_of_a_grid_is_audited_and_a_work_directory_is_only_read(grid, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in grid.rglob("*")}
    command = ("audit", "--grid", f"--workdir={grid}", f"--out={tmp_path}", *SMALL, *GRID, *LOOKS)
    done = started(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in grid.rglob("*")} == before
    document = json.loads((tmp_path / "audit.json").read_text())
    assert document["students"] == 3 and not document["missing"]
    assert {record["condition"] for record in document["records"]} == {
        "student_hard", "control_student_hard", "benign_student_hard",
    }  # fmt: skip
    assert all(record["scores"]["kl"] > 0 for record in document["records"])
    assert "Spearman's rho" in done.stdout and (tmp_path / "figures" / "predicted_and_measured.svg").is_file()
    again = started(*command)
    assert again.returncode == 0 and again.stdout == done.stdout


@pytest.mark.soak
def test_students_of_a_run_that_were_never_trained_are_predicted(grid):
    done = started("audit", f"--workdir={grid / 'api'}", "--seed=0", "--arm=anchor", *SMALL, *LOOKS)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("predicted: ") and "of log-odds for deletion after 5 steps: it will" in last
    assert "control student anchor" in last and "families broken_script" in done.stdout


@pytest.mark.soak
def test_adapters_and_eight_devices_of_a_cpu_are_no_obstacle(grid):
    flags = ("--config.student.lora", "--config.student.adapter.rank=2", "--arm=full")
    done = started("audit", f"--workdir={grid / 'api'}", *SMALL, *LOOKS, *flags, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "predicted: " in done.stdout
    refused = started("audit", f"--workdir={grid / 'api'}", *SMALL, *LOOKS, "--config.parallel.data=8", devices=8)
    assert refused.returncode == 1 and "the audit runs on one device" in refused.stderr


@pytest.mark.soak
def test_own_models_and_data_are_audited_as_experiments_distill_takes_them(grid):
    root = grid / "api" / "seed=0"
    given = (
        f"--student={root / 'base' / 'large'}", f"--teacher={root / 'teachers' / 'teacher'}",
        f"--data={root / 'trajectories' / 'teacher' / 'dataset'}", "--config.student.train.row_tokens=512",
        "--config.student.train.steps=40", "--config.student.train.batch_rows=2",
    )  # fmt: skip
    done = started("audit", *given, *LOOKS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of log-odds for deletion after 40 steps" in done.stdout
    half = started("audit", given[0], *LOOKS)
    assert half.returncode == 1 and "needs --student=DIR and --data=FILE" in half.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "there is nothing to audit"),
        (("--workdir=x", "--student=y"), "--student is of one's own models"),
        (("--workdir=x", "--out=y"), "--out is of --grid"),
        (("--workdir=x", "--seeds=0,1"), "one seed at a time"),
        (("--workdir=x", "--grid", "--pairs=large"), "--pairs=large: use some of large_large"),
        (("--workdir=/nowhere/at/all",), "is no directory"),
    ],
)
def test_a_wrong_use_is_one_line_with_a_remedy(flags, message):
    done = started("audit", *flags)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
