"""The sweep's command as a user starts it: what it refuses and announces, and that a killed sweep goes on to the same cells."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subl_jax import artifacts
from tests.pipeline import runs

MICRO = (
    "--preset=micro", "--vary=student.temperature=2,4", "--seeds=0", "--config.base.train.steps=4",
    "--config.teacher.train.steps=2", "--config.student.train.steps=3", "--config.base.safe_tasks=16",
    "--config.base.ambiguous_tasks=8", "--config.base.benign_tasks=8", "--config.evaluation.ambiguous_tasks=14",
    "--config.evaluation.safe_tasks=6",
)  # fmt: skip


def started(*flags: str, cache: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *flags],
        cwd=runs.ROOT, env=runs.environment(cache or Path("/nonexistent")), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(*flags: str, cache: Path | None = None) -> tuple[int, str, str]:
    process = started(*flags, cache=cache)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=W"], "say what varies: either --vary=.* or --dissection=NAME, of objective"),
        (["--workdir=W", "--dissection=defense"], r"--dissection=defense is unknown.*did you mean defences\?"),
        (["--workdir=W", "--dissection=dose", "--vary=student.temperature=1,2"], "say what varies: either"),
        (["--vary=student.temperature=1,2"], "--workdir is not given"),
        (["--workdir=W", "--vary=student.temprature=1,2"], r"did you mean student.temperature\?"),
        (["--workdir=W", "--vary=setting=api,bash"], "setting cannot be varied: two settings share no task"),
        (["--workdir=W", "--vary=student.temperature=1,2", "--config.setting=bash"], "use --setting"),
        (
            ["--workdir=W", "--vary=student.temperature=1,2", "--config.student.objectives=full,hard"],
            "a level has one arm",
        ),
        (["--workdir=W", "--vary=student.temperature=1,2", "--preset=paper"], "--config.teacher.checkpoint names none"),
        (["--workdir=W", "--preset=micro", "--vary=student.adapter.rank=4,8"], "add --config.student.lora=true"),
        (["--report_only"], "--report_only needs --cells"),
        (["--report_only", "--cells=W"], "holds no cells of a sweep"),
        (["--report_only", "--cells=W", "--vary=student.temperature=1,2"], "--vary does nothing with --report_only"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_is_written(tmp_path, flags, message):
    code, out, err = ended(*(flag.replace("=W", f"={tmp_path / 'sweep'}") for flag in flags))
    assert code == 1 and out == "", err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert not (tmp_path / "sweep").exists()


def test_a_grids_root_is_told_from_the_work_directory_of_one_of_its_settings(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "config.json").write_text("{}")
    code, _, err = ended(f"--workdir={tmp_path}", "--vary=student.temperature=1,2")
    assert code == 1 and f"use --workdir={tmp_path / 'api'}" in err


def test_a_dry_run_announces_levels_stages_and_costs_and_writes_nothing(tmp_path):
    code, out, err = ended("--dry_run", f"--workdir={tmp_path / 'sweep'}", *MICRO)
    assert code == 0, err
    assert re.search(r"^  2  student  \(reference\)$", out, re.M) and re.search(
        r"^  4  student~temperature=4$", out, re.M
    )
    # A base, 3 teachers with rollouts, a sanitizer, 6 students, 10 evaluations; tokenizer and audit.
    assert "26 stages to run in 1 parts" in out and "seed=0/students/student~temperature=4, " in out
    assert not (tmp_path / "sweep").exists()


def contents(directory: Path) -> dict[str, object]:
    """The cells without what depends on the clock."""
    found = {}
    for path in sorted(directory.glob("api/seed=*/*.json")):
        body = artifacts.unseal(path)
        found[path.name] = {name: value for name, value in body.items() if name not in ("seconds", "training", "seal")}
    return found


@pytest.mark.soak
def test_a_killed_sweep_goes_on_to_the_same_cells_and_is_reported_without_its_work_directory(tmp_path):
    whole, again, cache = tmp_path / "whole", tmp_path / "again", tmp_path / "cache"
    code, out, err = ended(f"--workdir={whole}", *MICRO, cache=cache)
    assert code == 0 and "missing:" not in out, err[-3000:]
    expected = contents(whole / "cells" / "temperature")
    assert len(expected) == 4 + 6 + 1 and "student~temperature=4.json" in expected
    # Killed while the second level's control student is trained: what was finished before is there.
    shutil.copytree(whole, again)
    shutil.rmtree(again / "cells")
    for family in ("students", "eval"):
        for path in (again / "seed=0" / family).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = started(f"--workdir={again}", *MICRO, cache=cache)
    until = time.monotonic() + 900
    while not (again / "seed=0" / "students" / "control_student~temperature=4").exists():
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (again / "cells" / "temperature" / "sweep.json").exists()
    code, out, err = ended(f"--workdir={again}", *MICRO, cache=cache)
    assert code == 0, err[-3000:]
    assert contents(again / "cells" / "temperature") == expected
    # The cells alone, elsewhere, give the same document.
    moved = shutil.copytree(again / "cells" / "temperature", tmp_path / "moved")
    written = json.loads((moved / "sweep.json").read_text())
    for name in ("sweep.json", "sweep.csv", "sweep.html"):
        (moved / name).unlink()
    shutil.rmtree(moved / "figures")
    shutil.rmtree(again)
    code, _, err = ended("--report_only", f"--cells={moved}")
    assert code == 0, err
    assert json.loads((moved / "sweep.json").read_text()) == written
    assert (moved / "sweep.csv").exists() and (moved / "figures" / "rates.svg").exists()
    # Everything is there: nothing is run, and the report is made again.
    code, out, err = ended(f"--workdir={whole}", *MICRO, cache=cache)
    assert code == 0 and "every cell is there: nothing is to be run" in out, err
