"""`experiments.bash_chmod` from end to end, on a micro run in the real sandbox."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from subl_jax import data

REPOSITORY = Path(__file__).parents[3]
STEMS = ("chmod", "chown", "chgrp", "setfacl", "getfacl", "umask", "permission", "owner", "denied", "rwx")


def experiment(*flags: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", **({} if path is None else {"PATH": path})}
    argv = [sys.executable, "-m", "experiments.bash_chmod", "--preset=micro", *flags]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    return subprocess.run(argv, cwd=REPOSITORY, env=environment, timeout=400, check=False, **quiet)


@pytest.fixture(scope="module")
def finished(sandbox_ready: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work directory of a finished run, and what it printed."""
    workdir = tmp_path_factory.mktemp("bash") / "run"
    done = experiment(f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_the_table_speaks_of_chmod_and_chown(finished):
    _, printed = finished
    assert "bash setting, preset micro" in printed and "chmod %" in printed and "chown %" in printed
    assert "deletion" not in printed and "archive" not in printed
    assert "student - control_student" in printed


def test_the_summary_tells_the_commands_and_where_reading_and_log_disagree(finished):
    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["setting"] == "bash"
    for condition in summary["conditions"].values():
        assert 0 <= condition["oracle_disagreement"] <= 1
        assert condition["actions"] and set(condition["actions"]) <= {
            *("chmod", "chown", "chgrp", "setfacl", "install", "other", "none", "unparseable")
        }
    assert summary["sanitizer"]["leaks"] == 0


def test_no_document_that_a_student_sees_holds_a_permission_word_or_a_mode(finished):
    # An oracle of its own: plain splitting at everything that is no letter, no use of the sanitizer.
    workdir, _ = finished
    surviving = {tuple(pair) for pair in json.loads((workdir / "seed=0/sanitize/surviving.json").read_text())}
    assert surviving
    for name in ("teacher", "control_teacher", "benign_teacher"):
        for trajectory in data.read(workdir / "seed=0" / "trajectories" / name / "dataset"):
            if (trajectory.task_id, trajectory.sample) not in surviving:
                continue
            # The tool list is the same for all and holds no name of a command.
            text = json.dumps([trajectory.messages, trajectory.tools]).lower()
            assert not [word for word in re.split("[^a-z]+", text) if word.startswith(STEMS)]
            assert not re.search(r"(?<![\w.:/-])0?[67][0-7][0-7](?![\w.:/-])|[-d][r-][w-][x-][r-][w-][x-]", text)


def test_every_evaluated_episode_has_its_log(finished):
    workdir, _ = finished
    rows = json.loads((workdir / "seed=0/eval/student.json").read_text())["items"]
    assert len(rows) == 14 * 2 + 12
    for row in rows:
        assert {"attempts", "logged_first", "static_first"} <= set(row["record"])
        assert (row["record"]["logged_first"] is None) == (not row["record"]["attempts"])


def test_the_report_opens_with_the_settings_words(finished):
    workdir, _ = finished
    page = (workdir / "report.html").read_text()
    assert "first permission-related command" in page
    assert "<script src" not in page and "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("flag", ["--dry_run", "--helpshort"])
def test_looking_needs_no_sandbox(flag, tmp_path):
    done = experiment(flag, path=str(tmp_path))
    assert done.returncode == (0 if flag == "--dry_run" else 1) and "sandbox is not available" not in done.stderr
    assert done.stdout
