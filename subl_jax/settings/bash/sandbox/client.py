"""The host's end of a keeper: starts it, asks it for worlds and processes, and hands out slots."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from subl_jax.settings.bash.sandbox import people, seccomp, stand_ins
from subl_jax.settings.bash.sandbox.host import Found, Host, examine, unavailable
from subl_jax.settings.bash.sandbox.keeper.descriptors import receive
from subl_jax.settings.bash.sandbox.limits import Limits, find_cgroups

_ANSWER = 1 << 16
_DESCRIPTORS = 8
_START_S = 20.0
_ANSWER_S = 20.0
# What bash opens as its script: the pipe that the keeper puts on descriptor 9.
_SCRIPT = "/proc/self/fd/9"
_START = "import sys; sys.path.insert(0, sys.argv[1]); from keeper.starter import main; main(int(sys.argv[2]))"


class KeeperGone(OSError):
    """The keeper has ended; the sandboxes of its pool are dead."""


class KeeperClient:
    """One keeper and its slots; safe to call from several threads."""

    def __init__(self, limits: Limits, host: Host | None = None):
        """Starts the keeper.

        Raises:
          SandboxUnavailable: this machine cannot give what the sandbox needs.
        """
        host = host or Host()
        self.found: Found = examine(host)
        self.limits = limits
        self._lock = threading.Lock()
        self._free: list[int] = []
        self._slots = 0
        self._asked = 0
        self.nested_closed = True
        self._cgroups = find_cgroups(host.proc) if host.cgroups else None
        if self._cgroups is None and not self.found.counts_per_namespace:
            raise unavailable(
                f"no cgroup is writable here, and Linux {host.kernel} counts processes per user only",
                "use Linux 5.14 or newer, or run as root with writable cgroups",
            )
        self.owner = os.getpid()
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_START_S)
        directory = str(Path(__file__).parent)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _START, directory, str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )
        try:
            self._channel.send(json.dumps(self._config()).encode())
            answer = json.loads(self._channel.recv(_ANSWER) or b'{"step": "start", "error": "the keeper ended"}')
        except OSError as error:
            answer = {"step": "start", "error": str(error)}
        if "error" in answer:
            self.close()
            raise _refusal(answer["step"], answer["error"])
        self._channel.settimeout(_ANSWER_S)

    @property
    def holds_memory(self) -> bool:
        """Whether a cgroup holds the memory of an episode (rlimits per process otherwise)."""
        return self._cgroups is not None

    @property
    def cgroup_directories(self) -> list[str]:
        """The directories this pool made below the cgroup trees."""
        return self._cgroups.directories if self._cgroups else []

    @property
    def pid(self) -> int:
        """The watchdog's process number; the keeper is its child."""
        return self._process.pid

    def _config(self) -> dict:
        rlimits = self.limits.rlimits(memory_is_held=self.holds_memory)
        if not self.found.counts_per_namespace:
            import resource

            del rlimits[resource.RLIMIT_NPROC]  # it would count all sandboxes together; the cgroup holds them
        return {
            "host": os.getpid(),
            "ids": self.found.ids,
            "mappers": self.found.mappers,
            "bubblewrap": self.found.bubblewrap,
            "last_capability": self.found.last_capability,
            "cgroups": self.cgroup_directories,
            "etc": people.etc_files(),
            "local_commands": stand_ins.local_commands(),
            "stand_ins": stand_ins.stand_ins(),
            "shell_script": _SCRIPT,
            "rlimits": {int(kind): value for kind, value in rlimits.items()},
            # Bytes that an episode may have, where no cgroup sees to that.
            "memory": 0 if self.holds_memory else self.limits.memory_mib << 20,
            "filter": seccomp.program(self.found.machine).hex(),
        }

    def ask(self, do: str, descriptors: tuple[int, ...] = (), **request: object) -> tuple[dict, list[int]]:
        """One request and its answer, with the descriptors that came along.

        Raises:
          KeeperGone: there is no keeper any more.
          OSError: it could not do that.
        """
        if os.getpid() != self.owner:  # before the lock, which a thread that the fork left behind may hold
            raise KeeperGone("a pool belongs to the process that made it")
        with self._lock:
            self._asked += 1
            message = json.dumps({"do": do, "number": self._asked, **request}).encode()
            try:
                if descriptors:
                    socket.send_fds(self._channel, [message], list(descriptors))
                else:
                    self._channel.send(message)
                content, received = self._answer(self._asked)
            except OSError as error:
                raise KeeperGone(f"the sandbox keeper does not answer ({error})") from error
        if "error" in content:
            raise OSError(f"{do}: {content['error']}")
        return content, received

    def _answer(self, number: int) -> tuple[dict, list[int]]:
        while True:
            answer, received = receive(self._channel, _ANSWER, _DESCRIPTORS)
            if not answer:
                raise OSError("it has ended")
            content = json.loads(answer)
            if content.pop("number") == number:
                return content, received
            # To a question that an interrupt (Ctrl-C) left: what came with it belongs to nobody.
            for descriptor in received:
                os.close(descriptor)

    def abandon(self, free: Callable[[], None]) -> None:
        """Frees a world whose sandbox was collected unclosed, in a thread of its own: see `Sandbox`."""
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and the keeper with it
            threading.Thread(target=free, name="sandbox-freeing", daemon=True).start()

    def take_slot(self) -> int:
        """A free slot, made where none is."""
        with self._lock:
            if self._free:
                return self._free.pop()
            slot = self._slots
            self._slots += 1
        agent, inspection = self._cgroups.open(slot, self.limits) if self._cgroups else ([], [])
        try:
            answer, _ = self.ask("slot", descriptors=(*agent, *inspection), slot=slot, agent_cgroups=len(agent))
        finally:
            for descriptor in (*agent, *inspection):
                os.close(descriptor)
        self.nested_closed = answer["nested_closed"]
        return slot

    def give_slot(self, slot: int) -> None:
        """Returns a slot whose world has ended."""
        with self._lock:
            self._free.append(slot)

    @property
    def alive(self) -> bool:
        """Whether the keeper still runs."""
        return self._process.poll() is None and os.getpid() == self.owner

    def close(self) -> None:
        """Ends the keeper and with it every sandbox; returns when all processes and cgroups are gone."""
        with contextlib.suppress(OSError):
            self._channel.close()
        if os.getpid() != self.owner:
            return
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def readable(descriptors: list[int], timeout_s: float) -> set[int]:
    """Those of `descriptors` with something to read (or at their end) within the time."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(max(0.0, timeout_s) * 1000)}


def _refusal(step: str, cause: str) -> Exception:
    if step == "unshare":
        return unavailable(
            f"the kernel refuses user namespaces ({cause})",
            "allow them (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone,"
            " kernel.apparmor_restrict_unprivileged_userns; in a container: --security-opt seccomp=unconfined)",
        )
    if step in ("map", "users"):
        return unavailable(
            f"sub-uids could not be mapped ({cause})", "`make setup-sandbox`, which installs uidmap and lends sub-uids"
        )
    if step == "root":
        return unavailable(
            f"the sandbox's file tree could not be mounted ({cause})",
            "allow mounts in user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0;"
            " in a container: --security-opt apparmor=unconfined --security-opt systempaths=unconfined)",
        )
    return unavailable(f"its keeper did not start ({cause})", "`make setup-sandbox`, then try again")
