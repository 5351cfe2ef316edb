"""Holding an episode's memory where no cgroup can: by looking, often, and ending what has too much.

An rlimit bounds every process by itself, so many together could still take what the machine needs. This bounds the sum, with an
overshoot of what can be written between two looks.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

LOOK_S = 0.02
# Process 1 of a world and the one that holds it open; every other number is the agent's, or a look's of ours.
_OWN_NUMBERS = 2


def _anonymous(pid: str) -> int:
    """Bytes of a process that no file backs, memory it shares with its children included; 0 where it has ended."""
    with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{pid}/status", "rb") as handle:
            lines = [line for line in handle if line.startswith((b"RssAnon:", b"RssShmem:"))]
        return sum(int(line.split()[1]) for line in lines) << 10
    return 0


def end_the_greedy(limit: int, worlds: Iterable[int]) -> None:
    """Kills what runs in each world whose processes have more than `limit` bytes together.

    worlds: the number of each world's process 1, seen from here.
    """
    used = {pid: _anonymous(pid) for pid in os.listdir("/proc") if pid.isdigit() and pid != "1"}
    if sum(used.values()) <= limit:
        return
    names: dict[str, list[str]] = {}
    for pid in used:
        with contextlib.suppress(OSError):
            names.setdefault(os.readlink(f"/proc/{pid}/ns/pid"), []).append(pid)
    for first in worlds:
        with contextlib.suppress(OSError):
            members = names.get(os.readlink(f"/proc/{first}/ns/pid"), [])
            if sum(used[pid] for pid in members) > limit:
                for pid in members:
                    _end(int(pid))


def _end(pid: int) -> None:
    with contextlib.suppress(OSError, StopIteration):
        descriptor = os.pidfd_open(pid)
        try:
            with open(f"/proc/{pid}/status", "rb") as handle:
                numbers = next(line for line in handle if line.startswith(b"NSpid:")).split()
            if int(numbers[-1]) > _OWN_NUMBERS:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
