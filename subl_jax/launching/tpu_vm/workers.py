"""All workers of a TPU at once: install a version, start a command, ask, follow, stop."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from subl_jax.launching.command import LaunchError
from subl_jax.launching.programs import Programs
from subl_jax.launching.tpu_vm import resource
from subl_jax.launching.tpu_vm.resource import Tpu

# Relative to the home directory, where scp and ssh both begin.
HOME = "subl"
WORKER = "subl_jax/launching/tpu_vm/worker.py"
MARK = "SUBL "


@dataclasses.dataclass(frozen=True)
class Status:
    """What one worker says of itself; see `worker.status`."""

    host: str
    version: str
    state: str
    code: int | None
    attempt: int


def _verb(*words: str) -> str:
    """A shell command that has the installed worker do something; silent where nothing is installed yet."""
    return f"test ! -e {HOME}/src/{WORKER} || {shlex.join(['python3', f'{HOME}/src/{WORKER}', *words])}"


def _read(output: str) -> list[Status]:
    found = []
    for line in output.splitlines():
        if line.startswith(MARK):
            told = json.loads(line[len(MARK) :])
            kept = (told.get("version", ""), told.get("state", "none"), told.get("code"), told.get("attempt", 0))
            found.append(Status(told["host"], *kept))
    return found


def _everywhere(programs: Programs, tpu: Tpu, *commands: Callable[[str], list[str]]) -> list[str]:
    """Runs commands one after the other in each slice, in all slices at once; the output of the last one by slice."""

    def one(node: str) -> str:
        return [programs.run(command(node)).out for command in commands][-1]

    # A dry run prints in order.
    with concurrent.futures.ThreadPoolExecutor(1 if programs.dry_run else 16) as threads:
        return list(threads.map(one, tpu.nodes))


def statuses(programs: Programs, tpu: Tpu) -> list[Status]:
    """Every worker's answer, by host; those where nothing is installed give none.

    Raises:
      LaunchError: a worker cannot be reached.
    """
    outputs = _everywhere(programs, tpu, lambda node: tpu.ssh(node, _verb("status")))
    return sorted((status for output in outputs for status in _read(output)), key=lambda status: status.host)


def install(programs: Programs, tpu: Tpu, archive: Path, version: str, extra: str = "tpu", python: str = "") -> None:
    """Copies an archive to every worker, unpacks and installs it there, and leaves the stamp that `start` asks for.

    Raises:
      LaunchError: it failed on a worker, or one still runs something.
    """
    fresh = f"{HOME}/src.new"
    options = [f"--version={version}", f"--source={fresh}", f"--extra={extra}"] + (
        [f"--python={python}"] if python else []
    )
    steps = [
        ["rm", "-rf", fresh],
        ["mkdir", "-p", fresh],
        ["tar", "-xzf", archive.name, "-C", fresh],
        ["python3", f"{fresh}/{WORKER}", f"--root={HOME}", "install", *options],
    ]
    command = " && ".join(map(shlex.join, steps))
    _everywhere(programs, tpu, lambda node: tpu.scp(node, str(archive), ""), lambda node: tpu.ssh(node, command))


def ready(programs: Programs, tpu: Tpu, version: str) -> list[str]:
    """Addresses of all workers, where every one answers, has this version and is idle.

    Raises:
      LaunchError: one does not; it is named.
    """
    hosts = resource.addresses(resource.nodes(programs, tpu))
    answers = statuses(programs, tpu)
    if programs.dry_run:
        programs.note(
            "ADDRESSES: networkEndpoints[].ipAddress of the description above, with commas; one worker needs no --hosts"
        )
        return ["ADDRESSES", ""]
    install_first = f"run: python -m launch.tpu_vm install --name={tpu.name}"
    if len(answers) < max(len(hosts), 1):
        raise LaunchError(f"of {len(hosts)} workers only {len(answers)} have a version installed; {install_first}")
    other = [f"{answer.host} has {answer.version or 'none'}" for answer in answers if answer.version != version]
    if other:
        raise LaunchError(f"this is version {version}, but {', '.join(other[:8])}; {install_first}")
    busy = [answer.host for answer in answers if answer.state == "running"]
    if busy:
        raise LaunchError(
            f"a run is still there on {', '.join(busy[:8])}; follow it (logs, resume) or end it: "
            f"python -m launch.tpu_vm stop --name={tpu.name}"
        )
    return hosts


def start(
    programs: Programs, tpu: Tpu, version: str, attempt: int, hosts: Sequence[str], command: Sequence[str]
) -> None:
    """Starts the command on every worker; ssh returns while it runs.

    Raises:
      LaunchError: it failed on a worker.
    """
    begin = ["python3", f"{HOME}/src/{WORKER}", "start", f"--version={version}", f"--attempt={attempt}"]
    # One host is a run of one process; it needs no coordinator.
    begin += [f"--hosts={','.join(filter(None, hosts))}"] if len(hosts) > 1 else []
    _everywhere(programs, tpu, lambda node: tpu.ssh(node, shlex.join([*begin, "--", *command])))


def stop(programs: Programs, tpu: Tpu, grace: int) -> None:
    """Asks the command to save and end, everywhere, and ends it after the grace."""
    _everywhere(programs, tpu, lambda node: tpu.ssh(node, _verb("stop", f"--grace={grace}")))


def follow(programs: Programs, tpu: Tpu, worker: str, lines: int, on: bool = True) -> int:
    """Shows the log of a worker (or `all`) of the first slice as it grows, until interrupted; returns ssh's exit code."""
    tail = ["tail", "-n", str(lines), *(["-F"] if on else []), f"{HOME}/run.log"]
    return programs.run(tpu.ssh(tpu.nodes[0], shlex.join(tail), worker), check=False, quiet=False).code


def last_words(programs: Programs, tpu: Tpu, lines: int = 20) -> str:
    """The end of the first worker's log."""
    return programs.run(
        tpu.ssh(tpu.nodes[0], shlex.join(["tail", "-n", str(lines), f"{HOME}/run.log"]), "0"), check=False
    ).out
