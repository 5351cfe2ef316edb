"""What an episode may use, and the cgroups that hold it to that where the host lets us write any.

Two layouts occur: cgroup v1 with one tree per controller, and v2 with one tree for all. Without a writable one the limits are
rlimits, which count because no user inside is the host's root.
"""

from __future__ import annotations

import contextlib
import os
import resource
import uuid
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
# bubblewrap's two processes and the one that holds the world open count in the agent's cgroup as well.
_OWN_PROCESSES = 3
_INSPECTION_PROCESSES = 64


@dataclass(frozen=True)
class Limits:
    """Limits of one sandbox.

    wall_s: seconds a command may take; memory_mib: of the whole episode, by a cgroup; where none is writable, of every
    process by rlimit and of their sum by looking every 20 ms; processes: at once; file_mib: of one file, and of what one
    command may print; disk_mib: of /home and /tmp together; files: how many there may be; output_bytes: of either stream
    that a result keeps, from the front.
    """

    wall_s: float = 2.0
    memory_mib: int = 256
    processes: int = 32
    file_mib: int = 8
    disk_mib: int = 16
    files: int = 8192
    output_bytes: int = 4096

    def __post_init__(self):
        """Refuses limits below what a shell needs.

        Raises:
          ValueError: naming the limit.
        """
        least = {"memory_mib": 32, "processes": 4, "file_mib": 1, "disk_mib": 1, "files": 64, "output_bytes": 64}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"Limits.{name} is {getattr(self, name)}, the least that works is {value}")
        if self.wall_s <= 0:
            raise ValueError(f"Limits.wall_s is {self.wall_s}, it must be positive")

    def rlimits(self, memory_is_held: bool) -> dict[int, int]:
        """The resource limits of every process; `memory_is_held`: by a cgroup, so that none per process is needed."""
        limits = {
            resource.RLIMIT_FSIZE: self.file_mib * _MIB,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: 256,
            # Counted per user and user namespace, which is to say per sandbox.
            resource.RLIMIT_NPROC: self.processes,
            # What a background job may burn; a foreground command is stopped by the wall.
            resource.RLIMIT_CPU: max(10, int(5 * self.wall_s)),
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
            resource.RLIMIT_SIGPENDING: 256,
        }
        if not memory_is_held:
            limits[resource.RLIMIT_AS] = self.memory_mib * _MIB
        return limits


class Cgroups:
    """The cgroups of one pool: a directory per controller tree, in it two children per slot (agent, inspection)."""

    def __init__(self, bases: dict[str, Path], unified: bool):
        """Use `find_cgroups`. bases: controller -> this pool's directory, made here; v2 has one, under "unified"."""
        self._bases = bases
        self._unified = unified

    @property
    def directories(self) -> list[str]:
        """This pool's directories, for whoever removes them in the end."""
        return [str(base) for base in self._bases.values()]

    def open(self, slot: int, limits: Limits) -> tuple[list[int], list[int]]:
        """Makes a slot's cgroups; returns descriptors of their cgroup.procs files, the agent's and the inspection's."""
        agent = self._make(f"{slot}", limits.memory_mib, limits.processes + _OWN_PROCESSES)
        inspection = self._make(f"{slot}-inspect", limits.memory_mib, _INSPECTION_PROCESSES)
        return agent, inspection

    def _make(self, name: str, memory_mib: int, processes: int) -> list[int]:
        files = []
        for controller, base in self._bases.items():
            directory = base / name
            directory.mkdir(exist_ok=True)
            memory = str(memory_mib * _MIB)
            if self._unified:
                (directory / "memory.max").write_text(memory)
                _write_if_there(directory / "memory.swap.max", "0")
                (directory / "pids.max").write_text(str(processes))
            elif controller == "memory":
                (directory / "memory.limit_in_bytes").write_text(memory)
                _write_if_there(directory / "memory.memsw.limit_in_bytes", memory)
            else:
                (directory / "pids.max").write_text(str(processes))
            files.append(os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        return files


def _write_if_there(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        path.write_text(text)


def find_cgroups(proc: Path = Path("/proc")) -> Cgroups | None:
    """This process's place to make cgroups with both limits, or None where there is none.

    proc: where mounts and the own cgroups are read from; tests give another.
    """
    mounts = [line.split() for line in (proc / "self/mounts").read_text().splitlines()]
    own = dict(_own_paths(proc))
    bases: dict[str, Path] = {}
    for _, place, kind, options, *_ in mounts:
        for controller in ("pids", "memory"):
            if kind == "cgroup" and controller in options.split(","):
                bases[controller] = _existing(Path(place), own.get(controller, "/"))
    if set(bases) == {"pids", "memory"}:
        made = _make_bases(bases)
        return None if made is None else Cgroups(made, unified=False)
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2":
            parent = _delegating(Path(place), own.get("", "/"))
            made = None if parent is None else _make_bases({"unified": parent})
            if made is not None and _delegate(made["unified"]):
                return Cgroups(made, unified=True)
            _remove(made)
    return None


def _own_paths(proc: Path):
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _existing(mount: Path, path: str) -> Path:
    """The own cgroup below a mount; the mount itself where a container shows only a part of the tree."""
    own = mount / path.lstrip("/")
    return own if own.is_dir() else mount


def _delegating(mount: Path, path: str) -> Path | None:
    """v2: the own cgroup or its nearest ancestor whose children have both limits (one with processes cannot)."""
    place = _existing(mount, path)
    while True:
        with contextlib.suppress(OSError):
            if {"memory", "pids"} <= set((place / "cgroup.subtree_control").read_text().split()):
                return place
        if place == mount:
            return None
        place = place.parent


def _delegate(base: Path) -> bool:
    try:
        (base / "cgroup.subtree_control").write_text("+memory +pids")
    except OSError:
        return False
    return True


def _make_bases(parents: dict[str, Path]) -> dict[str, Path] | None:
    name = f"subl_jax.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    made: dict[str, Path] = {}
    for controller, parent in parents.items():
        _sweep(parent)
        try:
            (parent / name).mkdir()
        except OSError:
            _remove(made)
            return None
        made[controller] = parent / name
    return made


def _sweep(parent: Path) -> None:
    """Removes what a pool left whose watchdog was killed as well."""
    with contextlib.suppress(OSError):
        for old in parent.glob("subl_jax.*"):
            if not Path(f"/proc/{old.name.split('.')[1]}").exists():
                for child in [*(entry for entry in old.iterdir() if entry.is_dir()), old]:
                    child.rmdir()


def _remove(bases: dict[str, Path] | None) -> None:
    for base in (bases or {}).values():
        with contextlib.suppress(OSError):
            base.rmdir()
