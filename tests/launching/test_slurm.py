"""The launcher in a real Slurm on this machine; `make test-slurm` installs one and runs these."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subl_jax.launching import slurm_follow
from tests.launching import slurm_cluster
from tests.launching.slurm_cluster import launch

COUNTING = str(Path(__file__).parent / "counting.py")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm_cluster.SlurmCluster]:
    missing = slurm_cluster.missing()
    if missing:
        if os.environ.get("SUBL_SLURM_REQUIRED"):
            pytest.fail(f"Slurm is not installed ({', '.join(missing)}); see make setup-slurm")
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}); make setup-slurm does it")
    with slurm_cluster.SlurmCluster() as running:
        running.environment.update(JAX_PLATFORMS="cpu", XLA_FLAGS="")
        yield running


class Submitted:
    """A job of two tasks that the launcher submitted."""

    def __init__(
        self, cluster: slurm_cluster.SlurmCluster, folder: Path, *command: str, flags: tuple[str, ...] = ()
    ) -> None:
        self._cluster, self._logs = cluster, folder / "logs"
        done = launch("--tasks_per_node=2", f"--logs={self._logs}", *flags, command=command, env=cluster.environment)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.splitlines()[0].removeprefix("job ")

    def log(self, task: str = "") -> str:
        path = self._logs / f"subl-{self.number}{task and '-'}{task}.log"
        return path.read_text() if path.exists() else ""

    def state(self) -> dict[str, str]:
        done = self._cluster.run("scontrol", "show", "job", "--oneliner", self.number)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def until(self, there: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not there():
            logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in self._logs.glob("*"))
            assert time.monotonic() < end, f"{self.state()}\n{logs}"
            time.sleep(0.1)

    def end(self, seconds: float = 90) -> dict[str, str]:
        self.until(lambda: slurm_follow.code_of(self.state()) is not None, seconds)
        return self.state()

    def signal(self, *arguments: str) -> None:
        self._cluster.run("scancel", *arguments, self.number)


def counting(folder: Path, steps: int) -> tuple[str, ...]:
    folder.mkdir(exist_ok=True)
    return ("python", COUNTING, str(folder), str(steps), "0.05")


@pytest.fixture(scope="module")
def uninterrupted(cluster: slurm_cluster.SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The result of a job that nobody disturbed, submitted with --wait."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = counting(folder / "result", 100)
    done = launch("--tasks_per_node=2", "--wait", f"--logs={folder}", command=command, env=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0] process 0 is done" in done.stdout and "COMPLETED" in done.stdout
    assert [len(list(folder.glob(f"subl-*-{task}.log"))) for task in range(3)] == [1, 1, 0]
    return json.loads((folder / "result" / "result.json").read_text())


@pytest.mark.slurm
def test_two_tasks_find_each_other_and_the_job_succeeds(uninterrupted: dict) -> None:
    assert uninterrupted["processes"] == 2
    assert uninterrupted["step"] == 100


@pytest.mark.slurm
def test_a_job_that_is_asked_to_stop_saves_is_requeued_and_goes_on_to_the_same_result(
    cluster: slurm_cluster.SlurmCluster, uninterrupted: dict, tmp_path: Path
) -> None:
    submitted = Submitted(cluster, tmp_path, *counting(tmp_path / "result", 100))
    submitted.until(lambda: "begins at step 0" in submitted.log("0") and "begins at step 0" in submitted.log("1"))
    time.sleep(1.5)
    submitted.signal("--signal=TERM")
    end = submitted.end()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "exit code 143; requeueing" in submitted.log()
    for task in ("0", "1"):
        assert f"process {task} was asked 1 times" in submitted.log(task)
        assert submitted.log(task).count("begins at step") == 2  # appended, not overwritten
    assert json.loads((tmp_path / "result" / "result.json").read_text()) == uninterrupted


_ENDS = textwrap.dedent("""
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open(os.path.join(sys.argv[1], os.environ["SLURM_PROCID"]), "a").write("x")
    if os.environ["SLURM_PROCID"] == "1":
        time.sleep(0.5)
        {end}
    time.sleep(60)
    """)


@pytest.mark.slurm
def test_a_failure_ends_the_other_task_and_the_job_with_its_code(
    cluster: slurm_cluster.SlurmCluster, tmp_path: Path
) -> None:
    """srun itself says 143 here: the task that it ended counts more than the one that failed."""
    command = ("python", "-c", _ENDS.format(end="sys.exit(3)"), str(tmp_path))
    submitted = Submitted(cluster, tmp_path, *command, flags=("--sbatch=--comment=it's two words",))
    assert "Comment=it's two words" in cluster.run("scontrol", "show", "job", submitted.number).stdout
    end = submitted.end()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0")


@pytest.mark.slurm
def test_a_task_that_is_killed_requeues_the_job_a_bounded_number_of_times(
    cluster: slurm_cluster.SlurmCluster, tmp_path: Path
) -> None:
    command = ("python", "-c", _ENDS.format(end="os.kill(os.getpid(), 9)"), str(tmp_path))
    submitted = Submitted(cluster, tmp_path, *command, flags=("--max_requeues=1",))
    end = submitted.end()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "1")
    assert "not requeued, after 1 restarts" in submitted.log()
    assert [(tmp_path / task).read_text() for task in "01"] == ["xx", "xx"]


@pytest.mark.slurm
def test_a_job_that_is_cancelled_stays_cancelled(cluster: slurm_cluster.SlurmCluster, tmp_path: Path) -> None:
    submitted = Submitted(cluster, tmp_path, *counting(tmp_path / "result", 2000))
    submitted.until(lambda: "begins at step 0" in submitted.log("0"))
    submitted.signal()
    end = submitted.end()
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0")
    assert "requeueing" not in submitted.log()


@pytest.mark.slurm
def test_the_time_limit_is_announced_to_the_tasks_and_requeues_the_job(
    cluster: slurm_cluster.SlurmCluster, tmp_path: Path
) -> None:
    """Slurm may send the announcement up to a minute early, and the shortest limit is a minute."""
    flags = ("--time=1", "--warning_s=40", "--max_requeues=1")
    submitted = Submitted(cluster, tmp_path, *counting(tmp_path / "result", 100_000), flags=flags)
    submitted.until(lambda: submitted.state()["Restarts"] == "1", seconds=90)
    assert "exit code 143; requeueing" in submitted.log()
    assert json.loads((tmp_path / "result" / "saved.json").read_text())["step"] > 0
    submitted.signal()


@pytest.mark.slurm
def test_the_experiment_under_slurm_is_stopped_requeued_and_ends_as_an_undisturbed_one(
    cluster: slurm_cluster.SlurmCluster, tmp_path: Path
) -> None:
    def command(name: str) -> tuple[str, ...]:
        return ("python", "-m", "experiments.api_deletion", "--preset=micro", f"--workdir={tmp_path / name}")

    def conditions(name: str) -> dict:
        return json.loads((tmp_path / name / "summary.json").read_text())["conditions"]

    # Three starts of the same programs: what one has compiled, the others read.
    cluster.environment.update(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )
    straight = Submitted(cluster, tmp_path, *command("straight"))
    assert straight.end(seconds=400)["JobState"] == "COMPLETED"
    stopped = Submitted(cluster, tmp_path, *command("stopped"))
    # Both train once a step is written down: from there on SIGTERM is answered by a checkpoint.
    metrics = tmp_path / "stopped" / "seed=0" / "metrics.jsonl"
    stopped.until(lambda: metrics.exists() and metrics.stat().st_size > 0, seconds=240)
    stopped.signal("--signal=TERM")
    end = stopped.end(seconds=400)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert "stopped by SIGTERM at step" in stopped.log("0")
    assert conditions("stopped") == conditions("straight")
