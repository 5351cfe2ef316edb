from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from subl_jax.launching import slurm, slurm_follow
from subl_jax.launching.command import LaunchError
from subl_jax.parallel import contract
from tests.launching.slurm_cluster import launch

ROOT = Path(__file__).parent.parent.parent


def job(*command: str, **changes) -> slurm.Job:
    settings: dict[str, Any] = {"folder": ROOT, "logs": Path("/logs")} | changes
    return slurm.Job(command=command or ("python", "-m", "experiments.api_deletion"), **settings)


def directives(text: str) -> list[str]:
    """The options of a script, as sbatch reads them."""
    return [word for line in text.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line)[1:]]


# --- The script ---------------------------------------------------------------------------------------------------------


def test_the_script_asks_for_what_the_flags_say() -> None:
    text = slurm.script(
        job(nodes=2, tasks_per_node=8, gpus_per_node=8, partition="gpu", account="lab", time="12:00:00")
    )
    wanted = {
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--account=lab", "--time=12:00:00",
        "--requeue", "--signal=TERM@120", "--open-mode=append",
    }  # fmt: skip
    assert wanted <= set(directives(text))
    assert text.startswith("#!/bin/bash\n#SBATCH ")
    assert "--cpus-per-task" not in text and "--qos" not in text


def test_the_warning_goes_to_the_tasks_and_not_to_the_batch_shell() -> None:
    """With "B:" Slurm would signal the shell alone, and nobody would save."""
    assert [each for each in directives(slurm.script(job(warning_s=7))) if "signal" in each] == ["--signal=TERM@7"]


def test_options_with_spaces_are_one_option_and_what_sbatch_cannot_read_is_refused() -> None:
    assert "--comment=two words" in directives(slurm.script(job(sbatch=("--comment=two words",))))
    for argument in ('--comment="x"', "--comment=a\nb"):
        with pytest.raises(LaunchError, match="comment"):
            slurm.script(job(sbatch=(argument,)))


def test_cpus_for_each_task_are_said_to_srun_as_well() -> None:
    """Steps have not inherited it since Slurm 22.05."""
    text = slurm.script(job(cpus_per_task=4))
    assert "--cpus-per-task=4" in directives(text)
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=4 " in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus_per_node": 8}, "--gpus_per_node=8 with --tasks_per_node=1"),
        ({"time": "soon"}, "--time='soon'"),
        ({"name": "a b"}, "--name='a b'"),
        ({"warning_s": 0}, "--warning_s=0"),
        ({"logs": Path("/a b")}, "--logs=/a b"),
        ({"mounts": ("/a:/b",)}, "needs --container_image"),
    ],
)
def test_what_would_fail_on_the_node_is_refused_before(changes: dict, said: str) -> None:
    with pytest.raises(LaunchError, match="^" + said.replace("(", r"\(") if said.startswith("--") else said):
        job(**changes)


def test_a_container_runs_the_command_by_either_runtime() -> None:
    inside = {"container_image": "/images/subl.sif", "mounts": ("/data:/data",)}
    pyxis = slurm.script(job(**inside))
    assert f"--container-image=/images/subl.sif --container-mounts={ROOT}:{ROOT},/data:/data" in pyxis
    assert " python -m experiments.api_deletion 2>" in pyxis  # the image's own Python
    apptainer = slurm.task(job(**inside, container_runtime="apptainer", gpus_per_node=1))
    assert apptainer[:5] == ["apptainer", "exec", "--nv", "--bind", f"{ROOT}:{ROOT},/data:/data"]
    assert apptainer[-4:] == ["/images/subl.sif", "python", "-m", "experiments.api_deletion"]
    assert slurm.task(job())[0] == sys.executable


# --- The script's decisions, with stand-ins for Slurm's programs --------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts stand-ins of the given names first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(**bodies: str) -> None:
        for name, body in bodies.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)

    return put


def run_script(
    tmp_path: Path, programs, *command: str, said: str = "", code: int = 0, state: str = "RUNNING", restarts: int = 0
):
    """Runs the batch script; returns its exit code, whether it asked for a requeue, and what it printed."""
    programs(
        srun=f'printf "%s\\0" "$@" > {tmp_path}/srun; env > {tmp_path}/env; printf %s {shlex.quote(said)} >&2; exit {code}',
        squeue=f"echo {state}",
        scontrol=f'echo "$@" >> {tmp_path}/scontrol',
    )
    text = slurm.script(job(*command, logs=tmp_path, max_requeues=2))
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SUBL_PROCESS_ID": "5"}
    if not restarts:
        del environment["SLURM_RESTART_COUNT"]  # as of a job that was not requeued yet
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, env=environment, timeout=20)
    assert "unbound" not in done.stderr
    asked = tmp_path / "scontrol"
    return done.returncode, asked.exists() and asked.read_text() == "requeue 7\n", done.stdout


def test_the_command_reaches_srun_word_for_word(tmp_path: Path, programs) -> None:
    words = (
        "prog",
        "two words",
        "two\nlines",
        "it's",
        'say "no"',
        "$HOME",
        "`id`",
        "a;b",
        "*",
        "",
        "back\\slash",
        "%j",
        "é",
    )
    assert run_script(tmp_path, programs, *words)[0] == 0
    given = (tmp_path / "srun").read_bytes().decode().split("\0")[:-1]
    assert given[-len(words) :] == list(words)


def test_the_tasks_get_the_time_outs_and_no_rank_of_the_submitting_shell(tmp_path: Path, programs) -> None:
    run_script(tmp_path, programs, "prog")
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert found["SUBL_START_TIMEOUT_S"] == str(contract.DEFAULT_START_TIMEOUT)
    assert found["SUBL_HEARTBEAT_TIMEOUT_S"] == str(contract.DEFAULT_HEARTBEAT_TIMEOUT)
    assert "SUBL_PROCESS_ID" not in found


def _task(number: str, what: str) -> str:
    return f"srun: error: node-1: task {number}: {what}\n"


_ENDED = "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"


@pytest.mark.parametrize(
    ("said", "code", "expected", "requeued"),
    [
        ("", 0, 0, False),
        (_task("s 0-1", "Exited with exit code 143").replace("task s", "tasks"), 143, 143, True),
        (_task("1", "Exited with exit code 75") + _ENDED + _task("0", "Terminated"), 143, 143, True),
        (_task("1", "Killed") + _ENDED + _task("0", "Terminated"), 143, 143, True),
        (_task("1", "Segmentation fault (core dumped)") + _task("0", "Exited with exit code 1"), 139, 139, True),
        (_task("0", "Terminated") + _ENDED + _task("1", "Exited with exit code 1"), 143, 143, True),
        # What srun did to the others afterwards does not make a failure of the program's one that may pass.
        (_task("1", "Exited with exit code 1") + _ENDED + _task("0", "Terminated"), 143, 1, False),
        (_task("1", "Exited with exit code 1") + _ENDED + _task("0", "Killed"), 137, 1, False),
        (_task("0", "Exited with exit code 75") + _task("1", "Exited with exit code 2"), 75, 2, False),
        ("srun: error: Unable to create step: bad image\n", 1, 1, False),
    ],
)
def test_what_may_pass_is_requeued_and_other_failures_keep_their_code(
    tmp_path: Path, programs, said: str, code: int, expected: int, requeued: bool
) -> None:
    found, asked, out = run_script(tmp_path, programs, "prog", said=said, code=code)
    assert (found, asked) == (expected, requeued)
    assert said in out


def test_requeues_are_bounded(tmp_path: Path, programs) -> None:
    assert run_script(tmp_path, programs, "prog", code=143, restarts=1)[:2] == (143, True)
    (tmp_path / "scontrol").unlink()
    found, asked, out = run_script(tmp_path, programs, "prog", code=143, restarts=2)
    assert (found, asked) == (143, False)
    assert "not requeued, after 2 restarts" in out


def test_a_job_that_somebody_cancelled_is_not_requeued(tmp_path: Path, programs) -> None:
    assert run_script(tmp_path, programs, "prog", code=143, state="COMPLETING")[:2] == (143, False)


# --- The command --------------------------------------------------------------------------------------------------------


def test_without_sbatch_the_error_says_where_it_belongs_and_a_dry_run_needs_none(tmp_path: Path) -> None:
    env = {**os.environ, "PATH": str(tmp_path)}
    refused = launch("--logs", str(tmp_path / "logs"), env=env)
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: there is no sbatch on PATH; run this on a login node of a Slurm cluster, or look at it with --dry_run\n"
    )
    shown = launch("--dry_run", "--gpus_per_node=4", env=env)
    assert shown.returncode == 0
    assert "#SBATCH --ntasks-per-node=4" in shown.stdout and "submitted by: sbatch" in shown.stdout
    assert not (tmp_path / "logs").exists()


def test_the_job_is_submitted_and_its_number_printed_with_what_to_do_next(tmp_path: Path, programs) -> None:
    programs(sbatch=f'echo "$@" > {tmp_path}/given; cat > {tmp_path}/script; echo "42;cluster"')
    done = launch("--logs", str(tmp_path / "logs"))
    assert done.returncode == 0
    assert (tmp_path / "given").read_text() == "--parsable\n"
    assert (tmp_path / "script").read_text().startswith("#!/bin/bash\n#SBATCH --job-name=subl\n")
    assert f"tail -F {tmp_path}/logs/subl-42.log" in done.stdout and "scancel 42" in done.stdout


def test_what_sbatch_refuses_is_shown_in_its_own_words(tmp_path: Path, programs) -> None:
    programs(sbatch='echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    done = launch("--logs", str(tmp_path / "logs"))
    assert done.returncode == 1
    assert done.stderr == "error: sbatch refused the job: sbatch: error: invalid partition specified: gpu\n"


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("JobState=COMPLETED ExitCode=0:0", 0),
        ("JobState=FAILED ExitCode=3:0", 3),
        ("JobState=FAILED ExitCode=0:9", 137),
        ("JobState=TIMEOUT ExitCode=0:15", 124),
        ("JobState=CANCELLED ExitCode=0:15", 143),
        ("JobState=RUNNING ExitCode=0:0", None),
        ("JobState=PENDING ExitCode=0:0", None),
        ("JobState=REQUEUE_HOLD ExitCode=0:0", None),
    ],
)
def test_every_end_of_a_job_has_its_exit_code(state: str, code: int | None) -> None:
    assert slurm_follow.code_of(dict(word.split("=") for word in state.split())) == code


def test_following_prints_what_is_new_through_a_requeue_and_ends_with_the_job(tmp_path: Path, programs) -> None:
    states = iter(["PENDING", "RUNNING", "PENDING", "RUNNING", "FAILED"])
    log = tmp_path / "subl-7-0.log"

    def turn(seconds: float = 0) -> None:
        programs(scontrol=f"echo JobId=7 JobState={next(states)} Reason=None ExitCode=3:0")
        with log.open("a") as file:
            file.write("half a l")
            file.write("ine\nhalf a l" if seconds else "")

    turn()
    out = io.StringIO()
    assert slurm_follow.follow("7", tmp_path, "subl", out=out, interval_s=1, sleep=turn) == 3
    lines = out.getvalue().splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("launch.slurm")] == [
        "PENDING", "RUNNING", "PENDING", "RUNNING", "FAILED",
    ]  # fmt: skip
    assert lines[-2] == "[0] half a l" and lines.count("[0] half a lhalf a line") == 4


def test_a_job_that_the_controller_has_forgotten_is_an_error(tmp_path: Path, programs) -> None:
    programs(scontrol="exit 1")
    with pytest.raises(LaunchError, match="sacct --jobs=7"):
        slurm_follow.follow("7", tmp_path, "subl", out=io.StringIO(), sleep=lambda _: None)
