"""A run as a Slurm job: the batch script that starts one task per process, and what becomes of the job when one ends."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from subl_jax.launching.command import LaunchError, define_timeouts
from subl_jax.parallel import contract

RUNTIMES = ("pyxis", "apptainer")
# What Slurm takes for a time: minutes, minutes:seconds, hours:minutes:seconds, each with days before it.
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE")


@dataclasses.dataclass(frozen=True)
class Job:
    """One submission.

    Attributes:
      command: of every task.
      nodes, tasks_per_node: one task is one process of the run.
      gpus_per_node: 0 (a CPU run), or one for each task of the node.
      cpus_per_task: None: the partition's default.
      partition, account, qos, mem, constraint, time: handed to sbatch; None: the cluster's default.
      warning_s: seconds before the time limit at which the tasks are asked to save and end.
      max_requeues: how often the job may start again after it was asked to stop, lost a process, or one was killed.
      container_image, container_runtime, mounts: where the tasks run, if not on the node itself.
      sbatch: further arguments of sbatch, as they are.
      folder: where the job starts.
      logs: folder of the logs, seen by every node.
      start_timeout_s, heartbeat_timeout_s: see `parallel.contract`.
    """

    command: tuple[str, ...]
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    name: str = "subl"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    constraint: str | None = None
    time: str | None = None
    warning_s: int = 120
    max_requeues: int = 20
    container_image: str | None = None
    container_runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    folder: Path = Path()
    logs: Path = Path("slurm_logs")
    start_timeout_s: int = contract.DEFAULT_START_TIMEOUT
    heartbeat_timeout_s: int = contract.DEFAULT_HEARTBEAT_TIMEOUT

    def __post_init__(self) -> None:
        """Refuses what Slurm or JAX would refuse on the node, after hours in the queue."""
        if self.gpus_per_node not in (0, self.tasks_per_node):
            raise LaunchError(
                f"--gpus_per_node={self.gpus_per_node} with --tasks_per_node={self.tasks_per_node}: under Slurm JAX gives each "
                "task the one GPU of its number on the node; leave --tasks_per_node out, or make both equal"
            )
        if not re.fullmatch(r"[\w.+-]+", self.name):
            raise LaunchError(
                f"--name={self.name!r} becomes part of file names: letters, digits, '.', '_', '+', '-' only"
            )
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise LaunchError(
                f"--time={self.time!r} is no time of Slurm's; write e.g. 90 (minutes), 12:00:00 or 2-00:00:00"
            )
        # Slurm keeps the signal's time in 16 bits.
        if not 0 < self.warning_s <= 65535:
            raise LaunchError(f"--warning_s={self.warning_s} must be from 1 to 65535 seconds")
        if "%" in str(self.logs) or any(mark in str(self.logs) for mark in ' \\"'):
            raise LaunchError(
                f"--logs={self.logs}: Slurm reads spaces, quotes, '\\' and '%' in log names its own way; avoid them"
            )
        if self.mounts and not self.container_image:
            raise LaunchError(f"--mounts={','.join(self.mounts)} needs --container_image")


def define_flags() -> None:
    """Declares the flags; called by the program, not on import."""
    flags.DEFINE_integer("nodes", 1, "Nodes of the job.", lower_bound=1)
    flags.DEFINE_integer(
        "tasks_per_node", None, "Processes on each node; by default one for each GPU, or one.", lower_bound=1
    )
    flags.DEFINE_integer("gpus_per_node", 0, "GPUs of each node, one for each process; 0: a CPU run.", lower_bound=0)
    flags.DEFINE_integer(
        "cpus_per_task", None, "CPUs of each process; the partition's default if not given.", lower_bound=1
    )
    flags.DEFINE_string("name", "subl", "Name of the job and of its logs.")
    flags.DEFINE_string("partition", None, "Partition; the cluster's default if not given.")
    flags.DEFINE_string("account", None, "Account that the job is charged to.")
    flags.DEFINE_string("qos", None, "Quality of service.")
    flags.DEFINE_string("mem", None, "Memory of each node, e.g. 64G.")
    flags.DEFINE_string("constraint", None, "Features that the nodes must have, e.g. h100.")
    flags.DEFINE_string("time", None, "Time limit, e.g. 12:00:00; the run saves, and is requeued, shortly before it.")
    flags.DEFINE_integer("warning_s", 120, "Seconds before the time limit at which the run is asked to save.")
    flags.DEFINE_integer(
        "max_requeues",
        20,
        "How often the job may start again (asked to stop, lost a process, one killed).",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "container_image", None, "Image that the tasks run in: a registry's or a file, as the runtime has it."
    )
    flags.DEFINE_enum("container_runtime", "pyxis", RUNTIMES, "Slurm's pyxis plugin, or `apptainer exec`.")
    flags.DEFINE_list("mounts", [], "Folders that the container sees, as SOURCE:TARGET; the current one always.")
    flags.DEFINE_multi_string(
        "sbatch", [], "A further argument of sbatch, e.g. --sbatch=--reservation=ours; may be repeated."
    )
    flags.DEFINE_string("logs", "slurm_logs", "Folder of the logs, on a file system that every node sees.")
    define_timeouts(contract.DEFAULT_START_TIMEOUT)
    flags.DEFINE_bool("wait", False, "Follow the logs until the job ends, and exit with its code.")
    flags.DEFINE_bool("dry_run", False, "Print the script and the command line of sbatch, and submit nothing.")


def from_flags(command: Sequence[str]) -> Job:
    """The job that the flags describe."""
    values: dict[str, Any] = {
        field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Job) if field.name in flags.FLAGS
    }
    values["tasks_per_node"] = values["tasks_per_node"] or values["gpus_per_node"] or 1
    values["logs"] = Path(values["logs"]).absolute()
    values["mounts"], values["sbatch"] = tuple(values["mounts"]), tuple(values["sbatch"])
    return Job(command=tuple(command), folder=Path.cwd(), **values)


def arguments(job: Job) -> list[str]:
    """What sbatch is told, as the script's own `#SBATCH` lines carry it."""
    optional = {
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node or None,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "mem": job.mem,
        "constraint": job.constraint,
        "time": job.time,
    }
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.tasks_per_node}",
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
        "--requeue",
        # Without "B:": to the tasks, which save; the batch shell outlives them and decides what becomes of the job.
        f"--signal=TERM@{job.warning_s}",
        "--open-mode=append",
        f"--chdir={job.folder}",
        f"--output={job.logs}/%x-%j.log",
        *job.sbatch,
    ]


def task(job: Job) -> list[str]:
    """The command of one task, within its container if there is one."""
    command = list(job.command)
    if not job.container_image:
        return [sys.executable if command[0] in ("python", "python3") else command[0], *command[1:]]
    if job.container_runtime == "pyxis":
        return command
    binds = ",".join([f"{job.folder}:{job.folder}", *job.mounts])
    nvidia = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *nvidia, "--bind", binds, "--pwd", str(job.folder), job.container_image, *command]


def _srun(job: Job) -> list[str]:
    pyxis = []
    if job.container_image and job.container_runtime == "pyxis":
        pyxis = [
            f"--container-image={job.container_image}",
            f"--container-mounts={','.join([f'{job.folder}:{job.folder}', *job.mounts])}",
            f"--container-workdir={job.folder}",
        ]
    return [
        "srun",
        "--kill-on-bad-exit=1",
        # Since 22.05 steps do not inherit it from the job.
        *([f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []),
        "--open-mode=append",
        f"--output={job.logs}/%x-%j-%t.log",
        *pyxis,
        *task(job),
    ]


# Decides what becomes of the job. srun's own exit code is the highest of the tasks', and the tasks that srun ends because
# another failed count too: a plain failure (1) would read as 143. So its words are read: "task 1: Exited with exit code 1".
_AFTERWARDS = """\
cat "$said"

# The first end of a task that is neither "asked to stop" nor "lost another one" is the cause of the rest.
cause=$(sed -nE 's/^srun: error: .*: tasks? [^ ]+: (.*)$/\\1/p' "$said" \\
  | grep -vE '^Exited with exit code (@REQUEUE@|@PEER_LOST@)$' | head -n 1 || true)
if [[ $cause =~ ^Exited\\ with\\ exit\\ code\\ ([0-9]+)$ ]]; then code=${BASH_REMATCH[1]}; fi

again=no
if ((code == @REQUEUE@ || code == @PEER_LOST@ || code > 128)); then again=yes; fi
restarts=${SLURM_RESTART_COUNT:-0}
# A job that somebody cancelled, or that ran out of time, is no longer "RUNNING" and stays as it is.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true)
if [[ $again == yes && $state == RUNNING ]]; then
  if ((restarts < @MAX@)); then
    echo "launch.slurm: exit code $code; requeueing job $SLURM_JOB_ID (restart $((restarts + 1)) of at most @MAX@)"
    if scontrol requeue "$SLURM_JOB_ID"; then exit "$code"; fi
    echo "launch.slurm: job $SLURM_JOB_ID could not be requeued"
  else
    echo "launch.slurm: exit code $code; not requeued, after $restarts restarts (--max_requeues=@MAX@)"
  fi
fi
exit "$code"
"""


def script(job: Job) -> str:
    """The batch script.

    Raises:
      LaunchError: an argument of sbatch cannot stand in it.
    """
    own = f"{job.logs}/{job.name}"
    afterwards = _AFTERWARDS
    for mark, value in (("REQUEUE", contract.REQUEUE), ("PEER_LOST", contract.PEER_LOST), ("MAX", job.max_requeues)):
        afterwards = afterwards.replace(f"@{mark}@", str(value))
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_directive(argument)}" for argument in arguments(job)),
        "set -uo pipefail",
        "",
        "# Tasks find each other through Slurm, not through what the submitting shell may have set.",
        f"unset {contract.COORDINATOR} {contract.NUM_PROCESSES} {contract.PROCESS_ID}",
        f"export {contract.START_TIMEOUT}={job.start_timeout_s} {contract.HEARTBEAT_TIMEOUT}={job.heartbeat_timeout_s}",
        "export PYTHONUNBUFFERED=1",
        "",
        "# The tasks are asked by Slurm; this shell waits for them, whoever else is asked.",
        "trap : TERM",
        f"said={shlex.quote(own)}-$SLURM_JOB_ID.srun.log",
        f'{shlex.join(_srun(job))} 2>"$said"',
        "code=$?",
    ]
    return "\n".join(lines) + "\n" + afterwards


def _directive(argument: str) -> str:
    """An argument as a `#SBATCH` line has it: Slurm splits at spaces and strips quotes, without a shell."""
    found = next((mark for mark in '"\\\n' if mark in argument), None)
    if found:
        raise LaunchError(
            f"{argument!r} holds {found!r}, which Slurm reads its own way in an option of a script; leave it out"
        )
    return f'"{argument}"' if re.search(r"[\s#']", argument) else argument


def submit(job: Job) -> str:
    """Submits the job; returns its number.

    Raises:
      LaunchError: there is no Slurm here, or it refuses the job; with its own words.
    """
    text = script(job)
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "there is no sbatch on PATH; run this on a login node of a Slurm cluster, or look at it with --dry_run"
        )
    job.logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"sbatch refused the job: {said}")
    # "123", or "123;cluster"
    return done.stdout.strip().splitlines()[-1].partition(";")[0]
