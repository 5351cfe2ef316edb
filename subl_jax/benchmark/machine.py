"""The machine that programs are compared on: the cores they are held to, what it is, and what others take of it.

Nothing comes in; `pin` holds this process to cores and says which, `others_cpu_s` counts the seconds of other processes.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subl_jax.benchmark.harness import BenchmarkError


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where everything of one command ran: cores that all programs were pinned to, the processor, others' load.

    Attributes:
      cores: ids of the cores; empty where the system cannot pin.
      threads: of each library's pool.
      processor: the CPU's name.
      load: runnable processes per second over the last minute, before the command started; None where unknown.
    """

    cores: tuple[int, ...]
    threads: int
    processor: str
    load: float | None

    def describe(self) -> str:
        """One line for the terminal."""
        held = f"pinned to cores {','.join(map(str, self.cores))}" if self.cores else "not pinned (no affinity here)"
        busy = "" if self.load is None else f"; load before the start {self.load:.1f}"
        return f"all programs {held}, {self.threads} threads each, on {self.processor}{busy}"


def pin(cores: int | None = None) -> Machine:
    """Holds this process, its threads and its children to the first cores it may use; all of them by default.

    JAX and torch size their thread pools by it, so it comes before their first computation.

    Raises:
      BenchmarkError: there are not so many cores.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if not hasattr(os, "sched_setaffinity"):
        return Machine((), cores or os.cpu_count() or 1, processor(), load)
    allowed = sorted(os.sched_getaffinity(0))
    if cores is not None and not 1 <= cores <= len(allowed):
        raise BenchmarkError(f"--cores={cores}: this process may use {len(allowed)} cores; give 1 to {len(allowed)}")
    held = tuple(allowed[:cores])
    # Threads that libraries started at their import keep their own mask.
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), held)
    return Machine(held, len(held), processor(), load)


def processor() -> str:
    """The CPU's name, e.g. "Intel(R) Xeon(R) Processor"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jax_compilations() -> Callable[[], int]:
    """A count of the programs that JAX compiled in this process since this call."""
    import jax

    found: list[str] = []

    def note(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: len(found)


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
# Of /proc/stat: user, nice, system, irq, softirq, steal. Not idle and iowait; guests are counted in user.
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)


def others_cpu_s() -> float | None:
    """CPU seconds that everyone but this process and its descendants has used so far of the cores it may run on.

    None where the system does not tell (no /proc).
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    held = [line.split() for line in lines if line.split()[0] in cores]
    busy = sum(int(parts[field]) for parts in held for field in _BUSY_FIELDS)
    return (busy - _own_ticks()) / _TICKS


def _own_ticks() -> int:
    """User and system ticks of this process and its descendants, ended ones that were waited for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        fields = text.rpartition(")")[2].split()  # after the name, which may hold anything; [0] is field 3 of proc(5)
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    own = os.getpid()

    def ours(process: int) -> bool:
        while process and process != own:
            process = parents.get(process, 0)
        return process == own

    return sum(count for process, count in ticks.items() if ours(process))
