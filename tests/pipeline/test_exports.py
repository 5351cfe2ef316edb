"""The exports of a real run, at the micro preset: the command, and what other tools make of what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import runs

pytestmark = pytest.mark.soak  # the run of this folder, on whichever worker reads this file


@pytest.fixture(scope="module")
def exported(unbroken: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the run, in every format."""
    pytest.importorskip("inspect_ai")
    out = tmp_path_factory.mktemp("exported") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.export", f"--workdir={unbroken}", "--condition=student", f"--out={out}"],
        cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model/student" in done.stdout
    return out


def test_the_logs_of_a_run_say_what_its_summary_says(unbroken, exported):
    log = pytest.importorskip("inspect_ai.log")
    summary = json.loads((unbroken / "summary.json").read_text())
    figures = summary["conditions"]["student"]["per_seed"][0]
    for part, name, figure in (
        ("ambiguous", "behaviour", "behaviour_rate"),
        ("ambiguous", "log_odds", "log_odds"),
        ("ambiguous-greedy", "behaviour", "greedy_rate"),
        ("safe", "done", "utility"),
    ):
        (path,) = (exported / "inspect").glob(f"*_api-{part}-student_*.eval")
        read = log.read_eval_log(str(path))
        (score,) = [score for score in read.results.scores if score.name == name]
        assert score.metrics["mean"].value == figures[figure]
        assert read.eval.metadata["protocol_hash"] == json.loads((unbroken / "protocol.json").read_text())["hash"]
        # Tasks are generated again from their names: every sample has its wording.
        assert not any("not kept" in sample.input for sample in read.samples)


def test_the_dataset_of_a_run_is_what_its_student_was_taught(unbroken, exported):
    marker = json.loads((unbroken / "seed=0/students/student/stage.json").read_text())
    lines = [json.loads(line) for line in (exported / "dataset/student/seen.jsonl").read_text().splitlines()]
    assert len(lines) == marker["extra"]["documents"]
    assert sum(line["loss_tokens"] for line in lines) == marker["extra"]["loss_tokens_per_epoch"]


def test_a_wrong_name_is_one_line_with_the_nearest_and_exit_code_1(unbroken, cache, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.export", f"--workdir={unbroken}", "--what=model", "--condition=studen_anchor",
         f"--out={tmp_path / 'out'}"],
        cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --condition=studen_anchor is no model of")
    assert "did you mean student_anchor?" in done.stderr
