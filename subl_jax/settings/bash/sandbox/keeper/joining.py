"""Starting a process inside a sandbox that already runs: into its namespaces and limits, then into a user's credentials."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from . import descriptors, kernel

_NAMESPACES = kernel.NEWUSER | kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
# Python ignores these; a shell that inherited that would never stop `yes | head`.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
# What our own scripts may do as sandbox root: read and change everything, and become any of the users.
ROOT_CAPABILITIES = (
    kernel.CAP_CHOWN,
    kernel.CAP_DAC_OVERRIDE,
    kernel.CAP_DAC_READ_SEARCH,
    kernel.CAP_FOWNER,
    kernel.CAP_FSETID,
    kernel.CAP_KILL,
    kernel.CAP_SETGID,
    kernel.CAP_SETUID,
)


@dataclass(frozen=True)
class Program:
    """What to run in a sandbox, and as whom."""

    user: int
    group: int
    groups: list[int]
    capabilities: list[int]
    argv: list[str]
    environment: dict[str, str]
    directory: str
    files: dict[int, int] = field(default_factory=dict)  # descriptor there -> descriptor here; 0 is /dev/null if absent


@dataclass(frozen=True)
class Confinement:
    """What every process in a sandbox is held by."""

    rlimits: dict[int, int]
    filter_program: bytes
    last_capability: int


def fork_into(pid_namespace: int, own_pid_namespace: int, cgroup_files: list[int], child: Callable[[], None]) -> int:
    """Forks into `pid_namespace` and the cgroups; the child runs `child`, which must not return. Returns its pid."""
    kernel.setns(pid_namespace, kernel.NEWPID)  # holds for children only
    try:
        pid = os.fork()
    finally:
        if os.getpid() == 1:  # the keeper; the child has another number in its namespace
            kernel.setns(own_pid_namespace, kernel.NEWPID)
    if pid:
        return pid
    try:
        for descriptor in cgroup_files:
            os.write(descriptor, b"0")
        child()
    except BaseException as error:  # whatever it is, the child must end here and not return into the keeper's loop
        os.write(2, f"sandbox: {error}\n".encode())
    finally:
        os._exit(125)


def enter(sandbox: int) -> None:
    """Moves the process into all namespaces of the sandbox whose first process is the pidfd `sandbox`."""
    kernel.setns(sandbox, _NAMESPACES)
    os.chdir("/")


def execute(program: Program, confinement: Confinement) -> None:
    """Becomes `program`; never returns."""
    os.setsid()
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    # Copies first, so that no target overwrites a source that is still needed.
    held = {target: _above(source) for target, source in program.files.items()}
    if 0 not in held:
        held[0] = _above(os.open("/dev/null", os.O_RDONLY))
    for target, copy in held.items():
        os.dup2(copy, target)
    # Not only left to their flags: the keeper's socket and the cgroups must not be inherited.
    descriptors.close_all_but(held)
    for kind, value in confinement.rlimits.items():
        resource.setrlimit(kind, (value, value))
    os.umask(0o022)
    kernel.become(program.user, program.group, program.groups, program.capabilities, confinement.last_capability)
    os.chdir(program.directory)
    kernel.filter_calls(confinement.filter_program)
    os.execve(program.argv[0], program.argv[1:], program.environment)


def _above(descriptor: int) -> int:
    """The same file at a number that no target uses."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)
