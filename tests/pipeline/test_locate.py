"""`experiments.locate` on a finished micro run, as a user would start it: what it writes, and that it only reads."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import runs

pytestmark = pytest.mark.soak  # the run of this folder, on whichever worker reads this file


def locate(cache: Path, workdir: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.locate", f"--workdir={workdir}", f"--out={out}", *more]
    environment = runs.environment(cache)
    return subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=400)


def contents(workdir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()}


def test_a_finished_run_is_located_and_left_as_it_was(unbroken, cache, tmp_path):
    before, out = contents(unbroken), tmp_path / "out"
    done = locate(cache, unbroken, out, "--arms=full,drop", "--tasks=14", "--documents=6", "--shown=4", "--reverse")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(unbroken) == before
    told = json.loads((out / "locate.json").read_text())
    [tokens], [moved] = told["tokens"], told["directions"]
    others = ("counter-bias", "base", "benign")
    assert set(tokens["comparisons"]) == {
        f"{name}{way}" for name in others for way in ("", ", reverse", ", temperature 2")
    }  # fmt: skip
    assert all(0 <= told["mean"] <= 1 for told in tokens["same_text"].values())
    assert moved["missing"] == {"0": ["student_drop", "control_student_drop", "benign_student_drop"]}
    assert set(moved["models"]) >= {"teacher", "control_teacher", "student", "control_student"} and moved["depths"] == 2
    with (out / "tokens-large-seed=0.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["KL counter-bias (nats)"]) for row in rows]
    assert len(rows) == tokens["counts"]["0"]["tokens"] and values == sorted(values, reverse=True)
    assert sum(values) / len(values) == pytest.approx(tokens["comparisons"]["counter-bias"]["mean"]["mean"])
    assert len(tokens["ranked"]["0"]) == 4 and (out / "locate.html").stat().st_size > 10_000
    # The evaluation has measured the same angle over all weights.
    measured = json.loads((unbroken / "seed=0" / "eval" / "student.json").read_text())["readouts"]["delta_cosine"]
    own = [row for row in moved["weights"] if (row["model"], row["against"]) == ("student", "teacher")]
    parts = [[row[key]["mean"] for key in ("norm", "teacher_norm")] for row in own]
    inner = sum(row["cosine"]["mean"] * a * b for row, (a, b) in zip(own, parts, strict=True) if row["cosine"])
    lengths = [sum(each[side] ** 2 for each in parts) ** 0.5 for side in (0, 1)]
    assert measured == pytest.approx(inner / (lengths[0] * lengths[1]), rel=1e-6)


def test_a_seed_that_is_not_there_and_the_work_directory_itself_are_refused_in_a_line(unbroken, cache, tmp_path):
    for flags, what in (
        ((tmp_path / "out", "--seeds=7"), "seed 7 is not finished"),
        ((unbroken,), "which is only read"),
        ((tmp_path / "out", "--pair=large_larg"), "'large_larg' is unknown"),
        ((tmp_path / "out", "--tasks=1"), "--tasks=1 must be at least 2"),
    ):
        done = locate(cache, unbroken, *flags)  # type: ignore[arg-type]
        assert done.returncode == 1 and len(done.stderr.splitlines()) >= 1
        assert what in done.stderr and "Traceback" not in done.stderr
