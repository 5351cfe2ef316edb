"""What the sandbox needs of the machine, found or refused with one message that says what is missing and what installs it.

Nothing here runs model-written text. `Host` holds every path that is looked at, so that tests can show it another machine.
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from subl_jax.settings.bash.sandbox import seccomp
from subl_jax.settings.bash.sandbox.people import NUMBERS

INSTALL = "`make setup-sandbox`, or as root: apt-get install bubblewrap uidmap acl"
# All that a keeper sees of the host: a program from elsewhere could not be started there.
_SYSTEM = ("/usr/", "/bin/", "/sbin/")
_OLDEST_KERNEL = (5, 8)  # setns with a pidfd
_KERNEL_COUNTING_PER_NAMESPACE = (5, 14)  # RLIMIT_NPROC per user namespace instead of per user of the machine


class SandboxUnavailable(RuntimeError):
    """The sandbox cannot be had on this machine; the message says why and what to do. Nothing was executed."""


@dataclass(frozen=True)
class Host:
    """A machine as the sandbox sees it."""

    user: int = os.geteuid()
    name: str = ""
    path: str = os.environ.get("PATH", os.defpath)
    proc: Path = Path("/proc")
    etc: Path = Path("/etc")
    null: Path = Path("/dev/null")
    kernel: str = platform.release()
    machine: str = platform.machine()
    cgroups: bool = True  # False: as if no cgroup were writable

    def find(self, command: str) -> str | None:
        """The path of a program of this machine."""
        return shutil.which(command, path=self.path)


@dataclass(frozen=True)
class Found:
    """What `examine` found: programs, and the first sub-uid and sub-gid and how many there are."""

    bubblewrap: str
    mappers: dict[str, str] | None
    ids: dict[str, tuple[int, int]]
    last_capability: int
    machine: str
    counts_per_namespace: bool


def examine(host: Host) -> Found:
    """Looks for everything that can be seen without running anything.

    Raises:
      SandboxUnavailable: something is missing.
    """
    if platform.system() != "Linux":
        raise unavailable(f"it needs Linux, this is {platform.system()}", "run the Bash setting on Linux")
    version = _version(host.kernel)
    if version < _OLDEST_KERNEL:
        raise unavailable(f"Linux {host.kernel} is too old", "use Linux 5.8 or newer")
    if host.machine not in seccomp.MACHINES:
        raise unavailable(
            f"there is no system call filter for {host.machine}", f"run it on {' or '.join(seccomp.MACHINES)}"
        )
    programs = ["bwrap", "setfacl"] + ([] if host.user == 0 else ["newuidmap", "newgidmap"])
    missing = [program for program in programs if host.find(program) is None]
    if missing:
        packages = {"bwrap": "bubblewrap", "setfacl": "acl", "newuidmap": "uidmap", "newgidmap": "uidmap"}
        wanted = " ".join(dict.fromkeys(packages[program] for program in missing))
        raise unavailable(
            f"{', '.join(missing)} not found", f"`make setup-sandbox`, or as root: apt-get install {wanted}"
        )
    _user_namespaces_allowed(host)
    _null_is_usable(host)
    mappers = None if host.user == 0 else {"uid": host.find("newuidmap"), "gid": host.find("newgidmap")}
    bubblewrap = os.path.realpath(str(host.find("bwrap")))
    if not bubblewrap.startswith(_SYSTEM):
        raise unavailable(f"{bubblewrap} is not the system's bubblewrap", f"{INSTALL}, first on PATH")
    return Found(
        bubblewrap=bubblewrap,
        mappers=mappers,  # type: ignore[arg-type]  # both were found above
        ids={kind: _lent(host, kind) for kind in ("uid", "gid")},
        last_capability=int((host.proc / "sys/kernel/cap_last_cap").read_text()),
        machine=host.machine,
        counts_per_namespace=version >= _KERNEL_COUNTING_PER_NAMESPACE,
    )


def unavailable(cause: str, remedy: str) -> SandboxUnavailable:
    """The one form of every message."""
    return SandboxUnavailable(f"the Bash sandbox is not available: {cause}; to remedy it: {remedy}")


def _version(release: str) -> tuple[int, int]:
    numbers = "".join(character if character.isdigit() else " " for character in release).split()
    return int(numbers[0]), int(numbers[1])


def _setting(host: Host, name: str) -> str | None:
    try:
        return (host.proc / "sys" / name).read_text().strip()
    except OSError:
        return None


def _user_namespaces_allowed(host: Host) -> None:
    limit = _setting(host, "user/max_user_namespaces")
    if limit is None:
        raise unavailable("this kernel has no user namespaces", "use a kernel with CONFIG_USER_NS")
    if limit == "0":
        raise unavailable(
            "user namespaces are forbidden (user.max_user_namespaces is 0)",
            "as root: sysctl -w user.max_user_namespaces=15000",
        )
    if host.user == 0:
        return
    if _setting(host, "kernel/unprivileged_userns_clone") == "0":
        raise unavailable(
            "user namespaces are forbidden to users (kernel.unprivileged_userns_clone is 0)",
            "as root: sysctl -w kernel.unprivileged_userns_clone=1",
        )
    if _setting(host, "kernel/apparmor_restrict_unprivileged_userns") == "1":
        raise unavailable(
            "AppArmor forbids user namespaces to users (kernel.apparmor_restrict_unprivileged_userns is 1)",
            "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        )


def _null_is_usable(host: Host) -> None:
    try:
        usable = host.null.is_char_device() and host.null.stat().st_mode & 0o666 == 0o666
    except OSError:
        usable = False
    if not usable:
        raise unavailable(
            f"{host.null} is not the device that everybody may read and write",
            f"as root: rm -f {host.null} && mknod -m 666 {host.null} c 1 3",
        )


def _lent(host: Host, kind: str) -> tuple[int, int]:
    """First number and count of the sub-ids to use: /etc/subuid's for a user, any free ones for root."""
    path = host.etc / f"sub{kind}"
    names = {host.name, str(host.user)} if host.name else _names(host.user)
    try:
        lines = [line.strip().split(":") for line in path.read_text().splitlines()]
    except OSError:
        lines = []
    ranges = [(int(line[1]), int(line[2])) for line in lines if len(line) == 3 and line[0] in names]
    for first, count in ranges:
        if first >= NUMBERS <= count and (host.user or _mapped(host, kind, first)):
            return first, NUMBERS
    if host.user == 0:
        for first in (100_000, 1_000_000):
            if _mapped(host, kind, first):
                return first, NUMBERS
        raise unavailable(
            f"this root is itself in a user namespace that has no {NUMBERS} {kind}s from 100000 on",
            "run it outside the container, or give the container a larger map",
        )
    name = host.name or min(names)
    raise unavailable(
        f"user {name} has no {NUMBERS} subordinate {kind}s in {path}",
        f"`make setup-sandbox`, or as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
    )


def _names(user: int) -> set[str]:
    try:
        return {str(user), pwd.getpwuid(user).pw_name}
    except KeyError:
        return {str(user)}


def _mapped(host: Host, kind: str, first: int) -> bool:
    """Whether this namespace has all of first .. first + NUMBERS."""
    for line in (host.proc / f"self/{kind}_map").read_text().splitlines():
        start, _, count = (int(number) for number in line.split())
        if start <= first and first + NUMBERS <= start + count:
            return True
    return False
