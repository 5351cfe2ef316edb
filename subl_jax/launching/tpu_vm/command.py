"""The verbs of `launch.tpu_vm` and their flags."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

from absl import flags

from subl_jax.launching import checkout, verbs
from subl_jax.launching.command import LaunchError
from subl_jax.launching.programs import Programs
from subl_jax.launching.tpu_vm import record, resource, resume, workers
from subl_jax.launching.tpu_vm.record import Record
from subl_jax.launching.tpu_vm.resource import Tpu

VERBS = ("create", "install", "run", "up", "resume", "status", "logs", "stop", "delete")
# Those that take a command.
STARTING = ("run", "up")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Declares the flags; called by the program, not on import."""
    limits = resume.Limits()
    flags.DEFINE_string(
        "name", None, "The TPU's name; the one thing every verb needs.", required=True, flag_values=values
    )
    flags.DEFINE_string("zone", None, "Its zone, as us-east5-a.", flag_values=values)
    flags.DEFINE_string("project", None, "The project; gcloud's own setting if not given.", flag_values=values)
    flags.DEFINE_string(
        "accelerator", None, "create: family and size, as v5p-128, v5e-16 or v6e-256.", flag_values=values
    )
    flags.DEFINE_string(
        "runtime_version",
        None,
        "create: the VM's software; what Google names for the family if not given.",
        flag_values=values,
    )
    flags.DEFINE_bool("spot", None, "create: cheap machines that may be taken any time.", flag_values=values)
    flags.DEFINE_integer("slices", None, "create: so many slices, one run over all of them.", flag_values=values)
    flags.DEFINE_multi_string(
        "create_flag",
        None,
        "create: handed to gcloud as it is, as --create_flag=--reserved; repeatable.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "existing", None, "The TPU VM is there already and is neither created nor deleted here.", flag_values=values
    )
    flags.DEFINE_bool("internal_ip", None, "Reach the workers by their inner addresses.", flag_values=values)
    flags.DEFINE_string(
        "python",
        "",
        "install: the workers' Python; one of 3.11 or newer is looked for, or installed with apt.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "allow_dirty",
        False,
        "install, run: HEAD even if there are changes that are not committed; they stay behind.",
        flag_values=values,
    )
    flags.DEFINE_string("worker", "0", "logs: the worker's number, or all.", flag_values=values)
    flags.DEFINE_integer("lines", 50, "logs: so many lines of what is there.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("follow", True, "logs: go on with what comes.", flag_values=values)
    flags.DEFINE_integer(
        "max_restarts", limits.restarts, "resume: starts and new machines in all.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer(
        "max_peers_lost",
        limits.peers_lost,
        "resume: restarts since a process was lost.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer("wait_s", limits.wait, "Seconds to wait for machines.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("poll_s", limits.poll, "Seconds between looks.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "grace_s", limits.grace, "Seconds that a stopped run has for its checkpoint.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_string(
        "state_dir",
        None,
        "Where what was asked for is remembered; ~/.local/state/subl_jax/tpu_vm if not given.",
        flag_values=values,
    )
    flags.DEFINE_bool("dry_run", False, "Print the commands and run none.", flag_values=values)


def remembered(values: flags.FlagValues) -> Record:
    """The TPU that the flags and what is remembered of it describe.

    Raises:
      LaunchError: they contradict each other, or leave the zone open.
    """
    folder = Path(values.state_dir).expanduser() if values.state_dir else record.default_folder()
    told = {
        name: values[name].value
        for name in ("zone", "project", "runtime_version", "spot", "slices", "existing", "internal_ip")
    }
    told["accelerator"] = resource.checked_accelerator(values.accelerator) if values.accelerator else None
    told["create_flags"] = tuple(values.create_flag) if values.create_flag else None
    told = {name: value for name, value in told.items() if value is not None}
    held = record.load(folder, values.name)
    if held is None:
        if not values.zone:
            raise LaunchError(f"nothing is remembered of {values.name} in {folder}; say where it is: --zone, --project")
        return Record(folder / f"{values.name}.json", Tpu(name=values.name, **told))
    fixed = {name: value for name, value in told.items() if name != "internal_ip"}
    other = [f"--{name}={value} (remembered: {getattr(held.tpu, name)})" for name, value in fixed.items()
             if getattr(held.tpu, name) != value]  # fmt: skip
    if other:
        raise LaunchError(
            f"{', '.join(other)}: {values.name} was made otherwise; delete it first, or take another --name"
        )
    held.tpu = dataclasses.replace(held.tpu, **told)
    return held


def _create(programs: Programs, held: Record) -> None:
    if held.tpu.existing:
        raise LaunchError("--existing TPUs are not created; install on it")
    if not held.tpu.accelerator:
        raise LaunchError("--accelerator is not given; as --accelerator=v5p-128")
    resume.create(programs, held)


def _install(programs: Programs, held: Record, values: flags.FlagValues) -> None:
    held.commit = checkout.head(programs, values.allow_dirty)
    resume.install(programs, held, values.python)
    if not programs.dry_run:
        held.save()


def _run(programs: Programs, held: Record, command: list[str], installed: bool, allow_dirty: bool) -> None:
    # What is checked out now is what the person means to run; workers with anything else are refused.
    held.commit = held.commit if installed else checkout.head(programs, allow_dirty)
    held.command = command
    resume.begin(programs, held)
    programs.note(
        f"started; python -m launch.tpu_vm logs --name={held.tpu.name} follows it, resume also outlives preemptions"
    )


def _status(programs: Programs, held: Record) -> None:
    now, reason = resource.state(programs, held.tpu)
    programs.note(f"{held.tpu.name} is {now}{f': {reason}' if reason else ''}")
    if now in resource.ACTIVE:
        for told in workers.statuses(programs, held.tpu):
            code = "" if told.code is None else f" with {told.code}"
            programs.note(f"{told.host}: version {told.version or 'none'}, attempt {told.attempt} {told.state}{code}")


def _delete(programs: Programs, held: Record) -> None:
    if held.tpu.existing:
        raise LaunchError(f"{held.tpu.name} was not made here (--existing); delete it where it was made")
    programs.run(held.tpu.delete())
    if not programs.dry_run:
        held.path.unlink(missing_ok=True)
        programs.note(f"{held.tpu.name} is deleted; what it wrote to its own disks is gone")


def carry_out(verb: str, command: list[str] | None, values: flags.FlagValues, sleep: Callable[[float], None]) -> None:
    """Carries out a verb.

    Raises:
      LaunchError: it cannot be done, or failed.
    """
    programs = Programs(values.dry_run)
    held = remembered(values)
    limits = resume.Limits(values.max_restarts, values.max_peers_lost, values.wait_s, values.poll_s, values.grace_s)
    if verb in ("create", "up"):
        _create(programs, held)
    if verb in ("create", "install", "up"):
        resume.wait_active(programs, held, limits, sleep)
    if verb in ("install", "up"):
        _install(programs, held, values)
    if verb in STARTING and command is not None:
        _run(programs, held, command, verb == "up", values.allow_dirty)
    if verb == "resume":
        resume.resume(programs, held, limits, sleep)
    if verb == "status":
        _status(programs, held)
    if verb == "logs":
        sys.exit(workers.follow(programs, held.tpu, values.worker, values.lines, values.follow))
    if verb == "stop":
        workers.stop(programs, held.tpu, limits.grace)
        programs.note("it has ended; status tells how")
    if verb == "delete":
        _delete(programs, held)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS, sleep: Callable[[float], None] = time.sleep) -> None:
    """Reads the verb and carries it out; see `verbs.carried`."""
    verbs.carried(argv, VERBS, STARTING, lambda verb, command: carry_out(verb, command, values, sleep))
