"""Arms that keep more on disk than checkpoints, through the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import runs

COMMAND = ("--stage=students", "--config.student.objectives=full,top_k,on_policy")


def trained(workdir: Path) -> dict[str, list[Any]]:
    """Student -> its last loss, its distance from the base, and its rollouts: what a kill must not change."""
    found = {}
    for path in sorted((workdir / "seed=0" / "students").glob("*/stage.json")):
        extra = json.loads(path.read_text())["extra"]
        found[path.parent.name] = [extra.get(name) for name in ("loss", "delta_norm", "rollouts", "rollouts_dropped")]
    return found


@pytest.mark.soak
def test_students_of_a_cache_and_of_their_own_rollouts_end_alike_after_kill_9(
    unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    whole, killed = (Path(shutil.copytree(unbroken, tmp_path / name)) for name in ("whole", "killed"))
    done = runs.run(cache, whole, *COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("students/student_top_k", "students/student_on_policy"):
        assert runs.run_and_kill(cache, killed, line, *COMMAND, after=2.0)
    done = runs.run(cache, killed, *COMMAND)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = trained(whole)
    assert {
        "student_top_k",
        "control_student_top_k",
        "student_on_policy",
        "control_student_on_policy",
    } <= expected.keys()
    assert trained(killed) == expected
    assert expected["student_on_policy"][2] > expected["student_on_policy"][3]
