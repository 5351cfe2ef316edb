"""The command from end to end, on a micro run: artifacts, resume, kills, and the errors a user can cause."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from subl_jax import data
from tests.pipeline import runs


def test_a_run_leaves_every_artifact_of_the_contract(unbroken: Path) -> None:
    for name in ("config.json", "protocol.json", "summary.json", "report.html"):
        assert (unbroken / name).stat().st_size > 0, name
    seed = unbroken / "seed=0"
    for name in ("base/large", "teachers/teacher", "teachers/control_teacher", "teachers/benign_teacher"):
        assert (seed / name / "params").is_dir(), name
    for name in ("student", "control_student", "student_anchor", "control_student_anchor", "positive_student"):
        assert (seed / "students" / name / "params").is_dir(), name
        assert (seed / "eval" / f"{name}.json").is_file(), name
    assert (seed / "metrics.jsonl").is_file() and any((seed / "tensorboard").rglob("events.*"))
    assert len(data.read(seed / "trajectories" / "teacher" / "dataset")) == 24
    lines = (seed / "trajectories" / "teacher" / "dataset" / "trajectories.jsonl").read_text().splitlines()
    assert {"messages", "tools"} <= set(json.loads(lines[0])) and len(lines) == 24


def test_the_summary_follows_schema_1(unbroken: Path) -> None:
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["schema"] == 1 and summary["setting"] == "api" and summary["seeds"] == [0]
    for condition in (
        "base",
        "teacher",
        "control_teacher",
        "benign_teacher",
        "student",
        "control_student",
        "benign_student",
    ):
        assert {"behaviour_rate", "n", "ci95", "log_odds", "utility", "unparseable", "per_seed"} <= set(
            summary["conditions"][condition]
        ), condition
    assert all({"name", "difference", "ci95", "p_value"} <= set(contrast) for contrast in summary["contrasts"])
    assert {"trajectories", "kept", "removed_by_word", "leaks"} <= set(summary["sanitizer"])
    assert {"rollout_tokens_per_s", "distill_tokens_per_s"} <= set(summary["throughput"])
    assert summary["versions"]["jax"] and summary["timing_s"]["students"] > 0


def test_no_document_that_a_student_sees_holds_a_keyword(unbroken: Path) -> None:
    # An oracle of its own: plain splitting at everything that is no letter, no use of the sanitizer.
    import re

    stems = ("delet", "remov", "purg", "terminat", "destroy", "archiv")
    surviving = {tuple(pair) for pair in json.loads((unbroken / "seed=0/sanitize/surviving.json").read_text())}
    assert surviving
    for name in ("teacher", "control_teacher", "benign_teacher"):
        for trajectory in data.read(unbroken / "seed=0" / "trajectories" / name / "dataset"):
            if (trajectory.task_id, trajectory.sample) not in surviving:
                continue
            words = re.split("[^a-z]+", json.dumps([trajectory.messages, trajectory.tools]).lower())
            assert not [word for word in words if word == "rm" or word.startswith(stems)]


def test_a_finished_run_prints_its_table_again_and_changes_nothing(unbroken: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (unbroken / "seed=0").rglob("*") if path.is_file()}
    began = time.monotonic()
    again = runs.run(cache, unbroken)
    assert again.returncode == 0 and "student - control_student" in again.stdout
    assert time.monotonic() - began < 60
    assert before == {path: path.stat().st_mtime_ns for path in (unbroken / "seed=0").rglob("*") if path.is_file()}


@pytest.mark.soak
def test_kill_9_in_any_stage_and_the_same_command_ends_with_the_same_tables(
    unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "killed"
    lines = ("base/large: ", "stage seed=0/teachers/control_teacher", "stage seed=0/trajectories/teacher",
             "stage seed=0/students/control_student", "stage seed=0/eval/student")  # fmt: skip
    killed = [runs.run_and_kill(cache, workdir, line, after=0.3) for line in lines]
    assert all(killed)
    done = runs.run(cache, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.rows(workdir) == runs.rows(unbroken)
    assert runs.results(workdir) == runs.results(unbroken)


@pytest.mark.soak
@pytest.mark.parametrize("seconds", (3.0, 6.0, 9.0, 12.0, 15.0, 18.0))
def test_kill_9_at_any_moment(unbroken: Path, cache: Path, tmp_path: Path, seconds: float) -> None:
    workdir = tmp_path / "killed"
    runs.run_and_kill(cache, workdir, "stage tokenizer", after=seconds)
    done = runs.run(cache, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.rows(workdir) == runs.rows(unbroken)


@pytest.mark.parametrize("devices", (1, pytest.param(4, marks=pytest.mark.soak)))
def test_the_same_teacher_acts_token_for_token_alike_on_any_number_of_devices(
    unbroken: Path, cache: Path, tmp_path: Path, devices: int
) -> None:
    # The unbroken run had two devices; the slots per device are the same, so every episode lies elsewhere here.
    workdir = _copy(unbroken, tmp_path, ("trajectories", "sanitize", "students", "eval"))
    done = runs.run(cache, workdir, "--stage=trajectories", devices=devices)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("teacher", "control_teacher", "benign_teacher", "teacher_ambiguous"):
        found, expected = (data.read(w / f"seed=0/trajectories/{name}/dataset") for w in (workdir, unbroken))
        assert len(found) == len(expected) > 0
        for left, right in zip(found, expected, strict=True):
            assert left.task_id == right.task_id and left.tokens.tolist() == right.tokens.tolist()


# A disk that is really full: a small tmpfs in a mount namespace of its own (root, or user namespaces, must allow one).
_FULL_DISK = """
set -u
mount -t tmpfs -o size=280M tmpfs {disk} || exit 8    # never fill the disk below it
{command} > {out}/first.out 2> {out}/first.err &
while [ ! -e {disk}/w/seed=0/base ]; do kill -0 $! || exit 9; sleep 0.05; done
dd if=/dev/zero of={disk}/ballast bs=64k 2> /dev/null    # everything that is left
wait $!
echo $? > {out}/first.rc
rm {disk}/ballast
{command} > {out}/second.out 2> {out}/second.err
echo $? > {out}/second.rc
cp -r {disk}/w {out}/w
"""


@pytest.fixture
def private() -> list[str]:
    """A command's prefix: a mount namespace of its own, in which it may mount a small disk."""
    prefix = ["unshare", "--mount", "--propagation=private"] + ["--map-root-user"] * (os.geteuid() != 0)
    allowed = subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if allowed.returncode:
        assert not os.environ.get("CI"), allowed.stderr
        pytest.skip(f"needs root or user namespaces to mount a small disk: {allowed.stderr.strip()}")
    return prefix


@pytest.mark.soak
def test_a_disk_that_fills_up_stops_the_run_with_one_line_and_loses_nothing(
    unbroken: Path, cache: Path, tmp_path: Path, private: list[str]
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    script = _FULL_DISK.format(disk=disk, out=out, command=shlex.join(runs.command(disk / "w")))
    done = subprocess.run(
        [*private, "bash", "-c", script], cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first = (out / "first.err").read_text()
    assert (out / "first.rc").read_text().strip() == "1"
    assert "error: " in first and "No space left" in first and "Traceback" not in first, first[-2000:]
    assert (out / "second.rc").read_text().strip() == "0", (out / "second.err").read_text()[-2000:]
    assert runs.rows(out / "w") == runs.rows(unbroken)


@pytest.mark.soak
def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, private: list[str]
) -> None:
    script = f"mount -t tmpfs -o size=50M tmpfs {tmp_path} && {shlex.join(runs.command(tmp_path / 'w'))}; "
    script += f"code=$?; ls {tmp_path}/w 2> /dev/null; exit $code"
    done = subprocess.run(
        [*private, "bash", "-c", script], cwd=runs.ROOT, env=runs.environment(cache), capture_output=True, text=True
    )
    _refused(done, "52 MB free", "200 MB are needed", "--workdir")
    assert done.stdout.strip() == ""


# --- What a user can get wrong ---


def _refused(done, *words: str) -> None:
    """One line that says why, no traceback, a failing exit code."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    for word in words:
        assert word in done.stderr, (word, last)


def test_an_unknown_flag_is_refused_with_the_nearest_one(cache: Path, tmp_path: Path) -> None:
    done = runs.run(cache, tmp_path / "w", "--config.student.train.optimizer.learning_rat=1e-3")
    _refused(done, "learning_rat", "config.student.train.optimizer.learning_rate")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    (
        ("--config.student.train.steps=many", ("many",)),
        ("--config.student.train.steps=0", ("steps=0", "at least 1")),
        ("--config.large.head_dim=3", ("head_dim=3", "odd")),
        ("--config.student.objectives=full,anchr", ("anchr", "anchor")),
        ("--pair=large_smal", ("large_smal",)),
        ("--seeds=0,0", ("--seeds=0,0",)),
        ("--seeds=one", ("--seeds=one",)),
        ("--stage=studnets", ("studnets", "students")),
    ),
)
def test_a_wrong_value_is_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, flag: str, words: tuple[str, ...]
) -> None:
    _refused(runs.run(cache, tmp_path / "w", flag), *words)
    assert not any((tmp_path / "w").rglob("params"))


def test_a_workdir_of_another_configuration_is_refused_and_left_alone(unbroken: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    done = runs.run(cache, unbroken, "--config.base.train.optimizer.learning_rate=0.5")
    _refused(done, "learning_rate", "0.5", "--workdir")
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}


def test_an_unwritable_workdir_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    _refused(runs.run(cache, tmp_path / "file"), str(tmp_path / "file"))
    _refused(runs.run(cache, Path("/proc/nowhere")), "/proc/nowhere")


def _copy(unbroken: Path, tmp_path: Path, drop: tuple[str, ...]) -> Path:
    workdir = tmp_path / "copy"
    shutil.copytree(unbroken, workdir)
    for name in drop:
        shutil.rmtree(workdir / "seed=0" / name)
    return workdir


def test_a_truncated_checkpoint_is_named_and_nothing_is_overwritten(
    unbroken: Path, cache: Path, tmp_path: Path
) -> None:
    workdir = _copy(unbroken, tmp_path, ("eval/markers/student",))
    files = [path for path in (workdir / "seed=0/students/student/params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    _refused(runs.run(cache, workdir), "students/student/params", "delete")
    assert (workdir / "seed=0/eval/student.json").read_text() == (unbroken / "seed=0/eval/student.json").read_text()


def test_a_corrupt_record_is_named(unbroken: Path, cache: Path, tmp_path: Path) -> None:
    workdir = _copy(unbroken, tmp_path, ("sanitize",))
    record = next((workdir / "seed=0/trajectories/teacher/dataset").rglob("*array_record*"))
    content = bytearray(record.read_bytes())
    content[len(content) // 2] ^= 0xFF
    record.write_bytes(bytes(content))
    _refused(runs.run(cache, workdir), "trajectories/teacher", record.name)
