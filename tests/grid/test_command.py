"""The command of the grid as a user starts it: what it refuses, what it announces, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipeline import runs

MICRO = (
    "--preset=micro", "--settings=api", "--pairs=large_small,large_other_tokenizer", "--seeds=0",
    "--config.base.train.steps=4", "--config.teacher.train.steps=2", "--config.student.train.steps=3",
    "--config.base.safe_tasks=16", "--config.base.ambiguous_tasks=8", "--config.base.benign_tasks=8",
    "--config.evaluation.ambiguous_tasks=7", "--config.evaluation.safe_tasks=6",
)  # fmt: skip


def started(*flags: str, cache: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.paper_grid", *flags],
        cwd=runs.ROOT, env=runs.environment(cache or Path("/nonexistent")), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(*flags: str, cache: Path | None = None) -> tuple[int, str, str]:
    process = started(*flags, cache=cache)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=W", "--pairs=large_smal"], "--pairs: 'large_smal' is unknown.*did you mean large_small"),
        (["--workdir=W", "--pairs=api:large_small"], "--pairs names no pair of bash"),
        (["--workdir=W", "--settings=bsh"], "--settings: 'bsh' is unknown.*did you mean bash"),
        (["--workdir=W", "--seeds=0,0"], "--seeds=0,0 must be different"),
        (["--workdir=s3://bucket/grid"], "--workdir=s3://bucket/grid is an address"),
        (["--workdir=W", "--preset=paper"], "--large_checkpoint names none"),
        ([], "--workdir is not given"),
        (["--report_only"], "--workdir is not given; say where the cells lie, or say --cells"),
        (["--report_only", "--cells=W"], "is no directory; say where the cells lie"),
        (["--workdir=W", "--settings="], "--settings is empty"),
        (
            ["--workdir=W", "--settings=api", "--pairs=large_large,bash:large_small"],
            "bash, which is not in --settings=api",
        ),
        (["--workdir=W", "--config.student.objectives=anchor"], "--config.student.objectives is set by the grid"),
        (["--workdir=W", "--config.pair=small_small"], "--config.pair is set by the grid.*use --pairs"),
        (["--workdir=W", "--dry_run", "--record_costs=F"], "--dry_run runs nothing"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_run_is_refused_in_one_line_before_anything_is_written(tmp_path, flags, message):
    code, out, err = ended(*(flag.replace("=W", f"={tmp_path / 'grid'}") for flag in flags))
    assert code == 1 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), err
    assert not (tmp_path / "grid").exists()


def test_a_dry_run_announces_stages_and_power_and_writes_nothing(tmp_path):
    code, out, err = ended(
        "--dry_run",
        f"--workdir={tmp_path / 'grid'}",
        "--preset=micro",
        "--settings=api",
        "--pairs=large_small,small_small",
    )
    assert code == 0, err
    # Per seed: 2 bases, 6 teachers, 7 rollouts, 2 sanitizers, 13 students, 20 evaluations; once: tokenizer and audit.
    assert f"{5 * (2 + 6 + 7 + 2 + 13 + 20) + 2} stages to run in 5 parts" in out
    assert "Power with 5 seeds" in out and "Holm's first step over 2 pairs" in out
    assert not (tmp_path / "grid").exists()


# --- A grid, interrupted ----------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_killed_grid_goes_on_keeps_its_cells_and_is_reported_without_its_work_directory(tmp_path):
    work, cells, cache = tmp_path / "work", tmp_path / "cells", tmp_path / "cache"
    flags = (*MICRO, f"--workdir={work}", f"--cells={cells}")
    first = started(*flags, cache=cache)
    until = time.monotonic() + 400
    # The first evaluated students are there: kill whatever is under way.
    while len(list(cells.glob("api/seed=0/*student*.json"))) < 2:
        assert first.poll() is None and time.monotonic() < until, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {path: (path.read_bytes(), os.stat(path).st_mtime_ns) for path in cells.glob("api/seed=0/*.json")}
    assert len(before) >= 4

    code, out, err = ended(*flags, cache=cache)
    assert code == 0, err[-3000:]
    assert "large_small" in out and "large_other_tokenizer" in out and "missing:" not in out
    after = {path.name for path in cells.glob("api/seed=0/*.json")}
    students = [f"{name}@large_small" for name in ("student", "control_student", "benign_student")]
    students += [f"{name}_hard@{pair}" for name in ("student", "control_student", "benign_student")
                 for pair in ("large_small", "large_other_tokenizer")]  # fmt: skip
    wanted = [
        "base@small",
        "base@other_tokenizer",
        "teacher",
        "control_teacher",
        "benign_teacher",
        *students,
        "sanitize",
    ]
    assert after == {f"{name}.json" for name in wanted}
    for path, (content, changed) in before.items():
        assert path.read_bytes() == content and os.stat(path).st_mtime_ns == changed, f"{path} was made again"
    document = json.loads((cells / "grid.json").read_text())
    assert document["complete"] and document["missing"] == []
    assert len(document["cells"]) == 10 + 7  # base, three teachers, and the students of two arms or one
    by_model = {(cell["pair"], cell["model"]): cell for cell in document["cells"]}
    other = by_model["large_other_tokenizer", "student_hard@large_other_tokenizer"]
    assert other["divergence_from_teacher"] is None and other["delta_cosine"] is None  # other tokens, another shape
    assert by_model["large_small", "student@large_small"]["divergence_from_teacher"] > 0
    assert (cells / "report.html").stat().st_size < 5_000_000
    assert list((cells / "figures").glob("*.svg")) and list((cells / "figures").glob("*.csv"))

    # Another machine has the cells and nothing else: nothing is to be run, and one that is damaged is named.
    code, out, _ = ended("--dry_run", *MICRO, f"--workdir={tmp_path / 'elsewhere'}", f"--cells={cells}", cache=cache)
    assert code == 0 and "nothing is to be run" in out
    damaged = cells / "api" / "seed=0" / "student_hard@large_small.json"
    text = damaged.read_text()
    damaged.write_text(text[: len(text) // 2])
    code, out, _ = ended("--report_only", *MICRO, f"--cells={cells}", cache=cache)
    assert code == 0
    assert "student_hard@large_small: corrupted" in " ".join(out.split())
    document = json.loads((cells / "grid.json").read_text())
    assert not document["complete"]
    assert [line["model"] for line in document["missing"]] == ["student_hard@large_small"]
    assert next(row for row in document["rows"] if row["pair"] == "large_small")["conditions"] == {}

    # Where the row is still at hand the cell is written again at once, and no stage is run.
    code, out, err = ended(*flags, cache=cache)
    assert code == 0 and "nothing is to be run" in out and "stages.py" not in err, err[-2000:]
    assert json.loads((cells / "grid.json").read_text())["complete"]
