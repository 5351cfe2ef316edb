"""`preflight()`: proof, by starting one, that the sandbox of this machine is whole, fair, and holds.

Only scripts of ours run here. What fails is raised as one message that names it and what to do about it; a run that starts
after it may still trust nothing: every sandbox is closed by itself, this only says so before hours of work depend on it.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from typing import NamedTuple

from subl_jax.settings.bash.sandbox import people
from subl_jax.settings.bash.sandbox.client import KeeperClient
from subl_jax.settings.bash.sandbox.episode import Sandbox
from subl_jax.settings.bash.sandbox.host import Host, SandboxUnavailable, unavailable
from subl_jax.settings.bash.sandbox.limits import Limits
from subl_jax.settings.bash.sandbox.people import Entry
from subl_jax.settings.bash.sandbox.shell import Result

# Patient where a busy machine must not look like a broken one; the wall that is tested is _WALL_S.
_LIMITS = Limits(wall_s=10.0, memory_mib=64, processes=8, file_mib=1, disk_mib=2, files=256)
_WALL_S = 0.1
_BASH_FORK_S = 2.0
_PLACE = f"{people.HOME}/preflight"
_SETUP = "`make setup-sandbox`, then try again"
# Device files that bubblewrap binds one by one; writing to them writes to nothing that stays.
_DEVICES = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "console")}
_ENDLESS = "while :; do :; done"


class _Permission(NamedTuple):
    command: str  # what the agent calls, on a file of its own, mode 644 agent:agent
    seen: str  # what must then be seen by somebody else
    remedy: str


_PERMISSIONS = {
    "chmod": _Permission("chmod 600", "600 agent agent -", _SETUP),
    "chown": _Permission("chown anna", "644 anna agent -", "`make setup-sandbox`, which lends sub-uids"),
    "chgrp": _Permission("chgrp team", "644 agent team -", "`make setup-sandbox`, which lends sub-gids"),
    "setfacl": _Permission(
        "setfacl -m u:ben:rw",
        "664 agent agent user:ben:rw-",
        "`make setup-sandbox`, on a kernel with CONFIG_TMPFS_POSIX_ACL",
    ),
}


class Report(NamedTuple):
    """What `preflight` found besides that everything works.

    memory_is_held: a cgroup holds the memory of an episode as a whole; an rlimit does for every process otherwise.
    nested_closed: the kernel itself refuses user namespaces inside; the system call filter refuses them in either case.
    """

    memory_is_held: bool
    nested_closed: bool
    seconds: float


_proved: dict[int, Report] = {}
_lock = threading.Lock()


def _forked() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent's may have held it


os.register_at_fork(after_in_child=_forked)


def preflight(host: Host | None = None) -> Report:
    """Starts a sandbox and proves that it works; once per process for this machine itself.

    Raises:
      SandboxUnavailable: it does not; the message says what is missing and the remedy. Nothing of a model's was executed.
    """
    if host is not None:
        return _prove(host)
    with _lock:
        if os.getpid() not in _proved:
            _proved[os.getpid()] = _prove(Host())
        return _proved[os.getpid()]


def _prove(host: Host) -> Report:
    start = time.monotonic()
    client = KeeperClient(_LIMITS, host)
    try:
        sandbox = Sandbox(client)
        try:
            sandbox.build([Entry(f"{_PLACE}/{name}") for name in _PERMISSIONS])
            _is_fair(sandbox)
            _is_closed(sandbox, client.nested_closed)
            _is_bounded(sandbox)
        finally:
            sandbox.close()
        return Report(client.holds_memory, client.nested_closed, time.monotonic() - start)
    except OSError as error:
        raise unavailable(f"no sandbox can be started ({' '.join(str(error).split())})", _SETUP) from error
    finally:
        client.close()


def _is_fair(sandbox: Sandbox) -> None:
    """Every user and group exists, each permission command changes what it should, and each is recorded."""
    names = sandbox.run("id -un && id -Gn && stat -c %U:%G .")
    if names.stdout.split() != ["agent", "agent", "team", "agent:agent"]:
        raise unavailable(f"the agent is not its user inside ({_said(names)})", _SETUP)
    known = sandbox.inspect(f"id -u {' '.join(people.USERS)} && getent group {' '.join(people.GROUPS)} | wc -l").stdout
    if known.split() != [*map(str, people.USERS.values()), str(len(people.GROUPS))]:
        raise unavailable("users or groups are missing inside", _SETUP)
    for name, permission in _PERMISSIONS.items():
        path = f"{_PLACE}/{name}"
        done = sandbox.run(f"{permission.command} {path}")
        acl = f"getfacl -cp {path} | grep -E '^user:[^:]' || echo -"
        seen = sandbox.inspect(f"stat -c '%a %U %G' {path} && {acl}")
        if done.code != 0 or seen.stdout.split() != permission.seen.split():
            raise unavailable(
                f"{name} does not work inside ({_said(done)}): a world in which it fails would itself teach the others",
                permission.remedy,
            )
        if [attempt.name for attempt in done.attempts] != [name]:
            raise unavailable(f"calls of {name} are not recorded inside", _SETUP)
    hidden = sandbox.run(f"(printf() {{ :; }}; export -f printf; chmod 600 {_PLACE}/chmod)")
    if [attempt.name for attempt in hidden.attempts] != ["chmod"]:
        raise unavailable("a function named printf hides calls, because /bin/sh is no dash", "apt-get install dash")


def _is_closed(sandbox: Sandbox, nested_closed: bool) -> None:
    """No network, no namespace of the agent's own, nothing to write on besides its disk."""
    # Interfaces there may be: a kernel with tunnels loaded gives every network namespace idle ones. Routes there are none.
    reached = sandbox.run("tail -qn +2 /proc/net/route; (exec 3<>/dev/tcp/127.0.0.1/9); echo $?")
    *routes, code = reached.stdout.split("\n")[:-1] or [""]
    if routes or code == "0" or "not permitted" not in reached.stderr:
        raise _open(f"there is a network inside ({_said(reached)})")
    nested = sandbox.run("unshare --user true")
    if nested.code in (0, 127, None):
        raise _open("user namespaces can be nested inside")
    if nested_closed and sandbox.run("cat /proc/sys/user/max_user_namespaces").stdout != "0\n":
        raise _open("the limit of nested user namespaces is gone")
    mounts = sandbox.run("while read -r _ at _ options _; do case $options in rw*) echo $at; esac; done < /proc/mounts")
    writable = set(mounts.stdout.split()) - _DEVICES
    if writable != {"/home", "/tmp"}:
        raise _open(f"the system can be written to inside ({' '.join(sorted(writable))})")
    state = dict(
        line.split(":\t") for line in sandbox.run("cat /proc/self/status").stdout.splitlines() if ":\t" in line
    )
    if state.get("Seccomp") != "2" or state.get("NoNewPrivs") != "1" or int(state["CapBnd"], 16) != 0b1001:
        raise _open("the system call filter or the bounds of capabilities are not in force")


def _is_bounded(sandbox: Sandbox) -> None:
    """Output, processes and time end where they should. The last: it may cost the shell."""
    limits = sandbox.limits
    output = sandbox.run("printf %0100000d 0")
    if output.status != "ok" or "[truncated:" not in output.stdout or len(output.stdout) > limits.output_bytes + 100:
        raise _open(f"output is not bounded inside ({len(output.stdout)} characters)")
    # dash gives up at the first refusal; where sh is bash, that would try again for 15 s.
    sandbox.limits = dataclasses.replace(limits, wall_s=_BASH_FORK_S)
    most = 4 * limits.processes
    forks = sandbox.run(f"sh -c 'i=0; while [ $i -lt {most} ]; do sleep 60 & i=$((i+1)); echo $i; done'")
    if len(forks.stdout.split()) >= most or "fork" not in forks.stderr.lower():
        raise _open(f"the number of processes is not bounded inside ({_said(forks)})")
    sandbox.limits = dataclasses.replace(limits, wall_s=_WALL_S)
    if (last := sandbox.run(_ENDLESS) if forks.status == "ok" else forks).status != "timeout":
        raise _open(f"time is not bounded inside ({_said(last)})")


def _open(cause: str) -> SandboxUnavailable:
    return unavailable(
        f"it does not hold: {cause}", f"{_SETUP}; if that changes nothing, this machine cannot run it safely"
    )


def _said(result: Result) -> str:
    text = " ".join(f"{result.stdout}{result.stderr}".split())
    return text[:300] or f"{result.status}, exit code {result.code}"
