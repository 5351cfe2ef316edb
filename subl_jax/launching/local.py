"""A run of several processes on this machine: what each is told, and when all are started again."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from subl_jax.launching import supervision
from subl_jax.launching.command import LaunchError, define_timeouts
from subl_jax.launching.output import Printer
from subl_jax.parallel import contract

# Below the ports that the system hands out by itself (32768 and up): none of those can take it before process 0 does.
_PORTS = (20000, 32000)
_HOST_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is started.

    Attributes:
      command: of every process.
      processes: how many.
      devices_per_process: GPUs of each, or parts that each splits its CPU into; None: one GPU, or as the command has it.
      gpus: whether each has GPUs of its own; else all run on the CPU.
      grace_s: seconds between asking a process to stop and killing it.
      restarts: how often all start again after one was asked to stop, was lost, or was ended by a signal.
      start_timeout_s, heartbeat_timeout_s: see `parallel.contract`.
    """

    command: tuple[str, ...]
    processes: int = 2
    devices_per_process: int | None = None
    gpus: bool = False
    grace_s: float = 30.0
    restarts: int = 0
    start_timeout_s: int = 120
    heartbeat_timeout_s: int = contract.DEFAULT_HEARTBEAT_TIMEOUT

    def resolved(self) -> list[str]:
        """The command with this interpreter for `python`."""
        first = self.command[0]
        return [sys.executable if first in ("python", "python3") else first, *self.command[1:]]


def define_flags() -> None:
    """Declares the flags; called by the program, not on import."""
    flags.DEFINE_integer("processes", 2, "Processes to start.", lower_bound=1)
    flags.DEFINE_integer(
        "devices_per_process",
        None,
        "GPUs of each process (1 if not given), or parts that each splits its CPU into (as the command has it).",
        lower_bound=1,
    )
    flags.DEFINE_bool("gpus", False, "Give each process GPUs of its own; without it all run on the CPU.")
    flags.DEFINE_float("grace_s", 30.0, "Seconds between asking a process to stop and killing it.", lower_bound=0)
    flags.DEFINE_integer(
        "restarts",
        0,
        "How often all start again after exit code 143 (asked to stop), 75 (lost a process) or a death by a signal.",
        lower_bound=0,
    )
    define_timeouts(120)
    flags.DEFINE_bool("dry_run", False, "Print what would be started, and start nothing.")


def from_flags(command: Sequence[str]) -> Plan:
    """The plan that the flags describe."""
    names = {field.name for field in dataclasses.fields(Plan)} - {"command"}
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    return Plan(command=tuple(command), **values)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    for port in random.sample(range(*_PORTS), 100):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"none of 100 ports from {_PORTS[0]} to {_PORTS[1]} is free on 127.0.0.1; end what holds them")


def gpus_here(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return [str(number) for number in range(len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE)))]


def told(plan: Plan, rank: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """What the environment of one process has besides the launcher's own.

    Args:
      plan: the run.
      rank: of the process.
      port: of the coordination service.
      base: the launcher's environment.

    Raises:
      LaunchError: there are fewer GPUs than the processes need.
    """
    found = {
        contract.COORDINATOR: f"127.0.0.1:{port}",
        contract.NUM_PROCESSES: str(plan.processes),
        contract.PROCESS_ID: str(rank),
        contract.START_TIMEOUT: str(plan.start_timeout_s),
        contract.HEARTBEAT_TIMEOUT: str(plan.heartbeat_timeout_s),
        "PYTHONUNBUFFERED": "1",
    }
    if plan.gpus:
        each, here = plan.devices_per_process or 1, gpus_here(base)
        if len(here) < each * plan.processes:
            raise LaunchError(
                f"--processes={plan.processes} with {each} GPU(s) each need {each * plan.processes}, and {len(here)} are here "
                "(nvidia-smi, CUDA_VISIBLE_DEVICES); take fewer processes, or leave --gpus out to run on the CPU"
            )
        found["CUDA_VISIBLE_DEVICES"] = ",".join(here[rank * each : (rank + 1) * each])
        return found
    # Several processes on one GPU would each reserve most of its memory.
    found["JAX_PLATFORMS"] = "cpu"
    if plan.devices_per_process:
        kept = [word for word in base.get("XLA_FLAGS", "").split() if not word.startswith(_HOST_DEVICES)]
        found["XLA_FLAGS"] = " ".join([*kept, f"{_HOST_DEVICES}={plan.devices_per_process}"])
    return found


def environments(plan: Plan) -> list[dict[str, str]]:
    """The whole environment of every process, with a free port."""
    # Within a Slurm job JAX would think that each of them is the job's one task, with one GPU.
    base = {name: value for name, value in os.environ.items() if name not in ("SLURM_PROCID", "SLURM_LOCALID")}
    port = free_port()
    return [{**base, **told(plan, rank, port, base)} for rank in range(plan.processes)]


def dry_run(plan: Plan) -> str:
    """What would be started: one command line for each process, to be pasted into as many shells."""
    port = free_port()
    return "\n".join(
        " ".join([*(f"{name}={shlex.quote(value)}" for name, value in told(plan, rank, port, os.environ).items())])
        + f" {shlex.join(plan.resolved())}"
        for rank in range(plan.processes)
    )


def run(plan: Plan, printer: Printer | None = None) -> int:
    """Starts the processes, again where the plan says so, and returns the exit code that stands for them.

    Raises:
      LaunchError: they cannot be started.
    """
    printer = printer or Printer(sys.stdout, sys.stderr)
    command = plan.resolved()
    if shutil.which(command[0]) is None:
        raise LaunchError(f"there is no program {command[0]!r}; give its path, or `python -m ...`")
    for restart in range(plan.restarts + 1):
        outcome = supervision.run(command, environments(plan), printer, plan.grace_s)
        if outcome.asked or restart == plan.restarts or not supervision.again(outcome.code):
            return outcome.code
        printer.say(f"exit code {outcome.code}: starting all again (restart {restart + 1} of at most {plan.restarts})")
        printer.forget()
    raise AssertionError("the last start returns")
