"""What the attacks on the sandbox are made of: programs as the model would write them, and a look at the host."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Numbers of calls that no command makes as the attack wants them: (x86_64, aarch64). The rest are the same on both.
_CALLS = {
    "add_key": (248, 217),
    "capset": (126, 91),
    "clone": (56, 220),
    "clone3": (435, 435),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "open_tree": (428, 428),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "setresuid": (117, 147),
    "umount2": (166, 39),
    "unshare": (272, 97),
}


def number(call: str) -> int:
    """The call's number on this machine."""
    return _CALLS[call][platform.machine() == "aarch64"]


def perl(code: str, *arguments: object) -> str:
    """A command that runs the program; perl because every Debian and Ubuntu has it and it reaches the system calls."""
    return shlex.join(["perl", "-e", code, *map(str, arguments)])


def outside(command: str, cwd: Path | None = None, *, close_fds: bool = True) -> str:
    """The control: what the same command prints in a plain Bash of this host, errors left out."""
    argv = ["bash", "--norc", "--noprofile", "-c", command]
    done = subprocess.run(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, close_fds=close_fds, check=False
    )
    return done.stdout.decode(errors="replace")


def lines(text: str) -> list[str]:
    """The lines of an output without the empty ones."""
    return [line for line in text.splitlines() if line]


def _of_every_process(read: Callable[[Path], str]) -> dict[int, str]:
    found = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                found[int(each.name)] = read(each)
            except OSError:
                pass  # gone meanwhile, or another's
    return found


def marked(marker: str) -> list[int]:
    """Processes of the host with the marker in their command line, this one and zombies left out."""
    commands = _of_every_process(lambda process: (process / "cmdline").read_text(errors="replace"))
    return [pid for pid, command in commands.items() if marker in command and pid != os.getpid()]


def members(namespace: str) -> list[int]:
    """Processes in the process-id namespace, named as `readlink /proc/self/ns/pid` names it.

    Of those below this process only: the number of a namespace that has ended is soon another's.
    """
    found = _of_every_process(lambda process: os.readlink(process / "ns/pid"))
    below = descendants()
    return [pid for pid, name in found.items() if name == namespace and pid in below]


def descendants(ancestor: int | None = None) -> set[int]:
    """All processes below this one (or another), zombies too."""
    stats = _of_every_process(lambda process: (process / "stat").read_text(errors="replace"))
    parent = {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in stats.items()}
    found: set[int] = set()
    new = {ancestor or os.getpid()}
    while new:
        new = {pid for pid, above in parent.items() if above in new} - found
        found |= new
    return found


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it holds at some moment of the time, asked every few milliseconds."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def alive(pid: int) -> bool:
    """Whether the process runs: exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
