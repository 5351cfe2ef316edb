"""`Sandbox`: one episode's world, the agent's shell in it, and our own look at it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import threading
import time
import weakref
from collections.abc import Sequence

from subl_jax.settings.bash.sandbox import people
from subl_jax.settings.bash.sandbox.client import KeeperClient, readable
from subl_jax.settings.bash.sandbox.keeper.joining import ROOT_CAPABILITIES
from subl_jax.settings.bash.sandbox.keeper.kernel import CAP_CHOWN, CAP_FOWNER
from subl_jax.settings.bash.sandbox.people import Entry
from subl_jax.settings.bash.sandbox.shell import (
    OPENING,
    Result,
    Status,
    Stream,
    done_code,
    lines_for,
    redefines,
    renumbered,
)
from subl_jax.settings.bash.sandbox.stand_ins import RECORD, Attempt, attempt

_MIB = 1 << 20
_PATH = "/usr/local/bin:/usr/bin:/bin"
_REAL_FIRST = f"/run/real:{_PATH}"
_BASH = "/usr/bin/bash"
_READ = 1 << 16  # a pipe's capacity: one read empties it
_SETTLE_S = 5.0  # for what the kernel has to do: ending killed processes, starting a world
_LONGEST_RECORD = 1 << 13
_MOST_ATTEMPTS = 10_000


class _World:
    """The descriptors and processes of a sandbox on this side, freed once."""

    def __init__(self, client: KeeperClient):
        self.client = client
        self.descriptors: list[int] = []
        self.exit: int | None = None
        self.pid = 0
        self.slot = client.take_slot()

    def free(self) -> None:
        gone = True
        try:
            self.client.ask("end", slot=self.slot, pid=self.pid)
            gone = self.exit is None or bool(readable([self.exit], _SETTLE_S))
        except OSError:
            gone = False
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.descriptors = []
        if gone:
            self.client.give_slot(self.slot)


class Sandbox:
    """One episode: a fresh world and a persistent Bash of user `agent` in it. Not for two threads at once.

    `SandboxPool.take` makes it. `run` takes model-written text; `build` and `inspect` are for ours.
    """

    def __init__(self, client: KeeperClient):
        """Starts the world and the shell in a slot of `client`.

        Raises:
          OSError: it did not start; the message has what bubblewrap said.
        """
        self._client = client
        self.limits = client.limits
        self._attempts: list[Attempt] = []
        self._partial = ""
        self._done: tuple[str, int] | None = None
        self._last_code = 0
        self._repair = False
        self._ended: Status | None = None
        self._open: set[int] = set()
        self._line = 1 + OPENING.count("\n")  # the next of the shell's script
        self._lock = threading.RLock()
        world = _World(client)
        self._world = world
        # Collected while some thread is within `ask`, freeing at once would wait for that thread's own lock.
        self._closer = weakref.finalize(self, client.abandon, world.free)
        self._closer.atexit = False  # the keeper ends with this process, and everything with it
        try:
            self._start(world)
        except BaseException:
            self.close()
            raise

    def _start(self, world: _World) -> None:
        agent = people.USERS[people.AGENT]
        answer, received = self._client.ask(
            "world",
            slot=world.slot,
            disk=self.limits.disk_mib * _MIB,
            inodes=self.limits.files,
            uid=agent,
            gid=agent,
        )
        world.pid = answer["pid"]
        world.descriptors += received
        self._channel, info, echo, errors, world.exit = received
        first = self._first_process(info, echo, errors, world.exit)
        for descriptor in (info, echo, errors):
            os.close(descriptor)
            world.descriptors.remove(descriptor)
        environment = {"HOME": people.HOME, "USER": people.AGENT, "LOGNAME": people.AGENT, "SHELL": "/bin/bash"}
        program = _program(
            people.AGENT,
            [CAP_CHOWN, CAP_FOWNER],
            # The script is called bash, so that messages begin with "bash: line 1: " as they would anywhere.
            [_BASH, "bash", "--norc", "--noprofile", "bash"],
            environment,
            "/run/shell",
            _PATH,
        )
        _, received = self._client.ask("shell", slot=world.slot, first=first, program=program)
        world.descriptors += received
        self._script, self._out, self._err, self._exit = received
        for descriptor in (self._script, self._out, self._err):
            os.set_blocking(descriptor, False)
        self._open = {self._out, self._err}
        os.write(self._script, OPENING.encode())

    def _first_process(self, info: int, echo: int, errors: int, ended: int) -> int:
        """Waits until the world stands; the number of its process 1 as the keeper sees it."""
        deadline = time.monotonic() + _SETTLE_S
        ready = readable([echo, ended], deadline - time.monotonic())
        if echo in ready and os.read(echo, 1):
            return json.loads(os.read(info, 4096))["child-pid"]
        os.set_blocking(errors, False)
        with contextlib.suppress(BlockingIOError):
            raise OSError(f"bubblewrap did not start: {os.read(errors, 4096).decode(errors='replace').strip()}")
        raise OSError(f"bubblewrap did not start within {_SETTLE_S:g} s")

    # What the agent does.

    def run(self, command: str) -> Result:
        """Runs model-written text in the agent's shell; its state (directory, variables, functions) stays."""
        with self._lock:
            if self._ended is not None:
                return Result("", "bash: the shell has ended\n", None, self._ended, ())
            try:
                return self._run(command)
            except BaseException:  # Ctrl-C: what still runs would answer for the next command
                self._finish("killed")
                raise

    def _run(self, command: str) -> Result:
        before = len(self._attempts)
        deadline = time.monotonic() + self.limits.wall_s
        number = secrets.token_hex(8)  # so that no old report answers for this command
        lines, trace = lines_for(command, number, self._last_code, self._repair)
        line = self._line + self._repair
        self._line += lines.count("\n")
        self._repair = self._repair or redefines(command)
        self._done = None
        out, err = Stream(self.limits.output_bytes), Stream(self.limits.output_bytes)
        waiting = lines.encode("utf-8", "replace")
        status: Status | None = None
        while status is None:
            waiting = self._write(waiting)
            ready = self._wait(deadline, bool(waiting))
            status = self._read(ready, number, out, err)
            if status is None and time.monotonic() >= deadline:
                status = "timeout"
        code = self._last_code = self._done[1] if self._done else 0
        if status == "ok":
            return Result(out.text(), renumbered(err.text(trace), line), code, status, tuple(self._attempts[before:]))
        code, status = self._finish(status)
        self._read({self._channel, self._out, self._err}, number, out, err)
        return Result(out.text(), renumbered(err.text(trace), line), code, status, tuple(self._attempts[before:]))

    def _write(self, waiting: bytes) -> bytes:
        if waiting:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                return waiting[os.write(self._script, waiting) :]
        return waiting

    def _wait(self, deadline: float, more_to_write: bool) -> set[int]:
        # A command longer than the pipe is written in pieces, as the shell reads it.
        longest = 0.002 if more_to_write else deadline - time.monotonic()
        return readable([self._channel, *self._open, self._exit], min(longest, deadline - time.monotonic()))

    def _read(self, ready: set[int], number: str, out: Stream, err: Stream) -> Status | None:
        """Takes what is there; the status if that ends the command."""
        if self._channel in ready:
            self._read_channel(number)
        if self._done:
            ready = self._open
        for descriptor, stream in ((self._out, out), (self._err, err)):
            if descriptor in self._open and descriptor in ready:
                with contextlib.suppress(BlockingIOError):
                    data = os.read(descriptor, _READ)
                    stream.add(data)
                    if not data:  # `exec >/dev/null`: nobody has it any more, or ever will
                        self._open = self._open - {descriptor}
                if stream.seen > self.limits.file_mib * _MIB:
                    return "killed"
        if self._done:
            return "ok"
        return "exited" if self._exit in ready else None

    def _read_channel(self, number: str) -> None:
        with contextlib.suppress(BlockingIOError):
            *records, self._partial = (self._partial + os.read(self._channel, _READ).decode("utf-8", "replace")).split(
                RECORD
            )
            self._partial = self._partial[-_LONGEST_RECORD:]
            for record in records:
                code = done_code(record, number)
                if code is not None:
                    self._done = (number, code)
                elif (made := attempt(record)) is not None and len(self._attempts) < _MOST_ATTEMPTS:
                    self._attempts.append(made)

    def _finish(self, status: Status) -> tuple[int | None, Status]:
        """The shell is at its end or brought to it: its exit code, and what the end is called."""
        if status in ("timeout", "killed"):
            with contextlib.suppress(OSError):
                _, (killer,) = self._client.ask("kill", slot=self._world.slot, uid=people.USERS[people.AGENT])
                readable([killer], _SETTLE_S)
                os.close(killer)
        self._ended = "exited"
        if not readable([self._exit], _SETTLE_S):
            self._ended = "broken"
            return None, "broken"
        code = _exit_code(self._exit)
        if code is None:
            self._ended = "broken"
            return None, "broken"
        if status == "exited" and code < 0:
            status = "killed"
        return (code if status == "exited" else None), status

    @property
    def attempts(self) -> list[Attempt]:
        """Every permission command that was called so far, in order."""
        with self._lock:
            if self._closer.alive:
                self._read_channel("")
            return list(self._attempts)

    # What we do.

    def build(self, files: Sequence[Entry], fresh: bool = False) -> None:
        """Makes the entries in order, as sandbox root; with `fresh`, /home and /tmp are emptied first.

        The n-th path gets the time 2024-01-01 00:00 UTC + n minutes, parents that had to be made included. `fresh` is for
        scripted commands of ours: it keeps the shell, whose directory becomes the agent's home again.

        Raises:
          OSError: it could not, with the cause (the disk is full, the sandbox is gone).
        """
        records = json.dumps([entry.record() for entry in files]).encode()
        with self._lock:
            if not self._closer.alive:  # its slot may be another's by now
                raise OSError("the sandbox is closed")
            memory = os.memfd_create("entries", os.MFD_CLOEXEC)
            try:
                os.write(memory, records)
                answer, received = self._client.ask(
                    "build",
                    descriptors=(memory,),
                    slot=self._world.slot,
                    fresh=fresh,
                    users=people.USERS,
                    groups=people.GROUPS,
                    home=people.HOME,
                )
            finally:
                os.close(memory)
            errors, ended = received
            try:
                if not readable([ended], _SETTLE_S):
                    self._client.ask("stop", pid=answer["pid"])
                    raise OSError("building the world took too long")
                if _exit_code(ended) != 0:
                    os.set_blocking(errors, False)
                    raise OSError(f"the world could not be built: {os.read(errors, 4096).decode(errors='replace')}")
            finally:
                os.close(errors)
                os.close(ended)
        if fresh and self._ended is None:
            self.run("cd")

    def inspect(self, script: str, user: str = "root") -> Result:
        """Runs a script of ours in the same world, as sandbox root or as one of its users, not through the agent's shell.

        The real permission commands come first on its PATH, so it leaves no attempts.

        Raises:
          ValueError: an unknown user.
        """
        if user not in people.USERS:
            raise ValueError(f"no user {user!r} in the world; there are {', '.join(people.USERS)}")
        capabilities = [*ROOT_CAPABILITIES] if user == "root" else []
        argv = [_BASH, "bash", "--norc", "--noprofile", "-c", script]
        program = _program(user, capabilities, argv, {"HOME": "/", "USER": user}, "/", _REAL_FIRST)
        with self._lock:
            if not self._closer.alive:
                return Result("", "the sandbox is closed\n", None, "broken", ())
            try:
                answer, received = self._client.ask("inspect", slot=self._world.slot, program=program)
            except OSError as error:
                return Result("", f"{error}\n", None, "broken", ())
            try:
                return self._inspection(answer["pid"], *received)
            finally:
                for descriptor in received:
                    os.close(descriptor)

    def _inspection(self, pid: int, out: int, err: int, ended: int) -> Result:
        deadline = time.monotonic() + self.limits.wall_s
        streams = {out: Stream(self.limits.output_bytes), err: Stream(self.limits.output_bytes)}
        for descriptor in streams:
            os.set_blocking(descriptor, False)
        status: Status | None = None
        open_streams = set(streams)
        while status is None:
            ready = readable([*open_streams, ended], deadline - time.monotonic())
            for descriptor in (open_streams & ready) or (open_streams if ended in ready else set()):
                with contextlib.suppress(BlockingIOError):
                    data = os.read(descriptor, _READ)
                    streams[descriptor].add(data)
                    if not data:
                        open_streams.discard(descriptor)
            if any(stream.seen > self.limits.file_mib * _MIB for stream in streams.values()):
                status = "killed"
            elif ended in ready:
                status = "ok"
            elif not ready and time.monotonic() >= deadline:
                status = "timeout"
        if status != "ok":
            with contextlib.suppress(OSError):
                self._client.ask("stop", pid=pid)
            return Result(streams[out].text(), streams[err].text(), None, status, ())
        code = _exit_code(ended)
        if code is None or code < 0:
            return Result(streams[out].text(), streams[err].text(), None, "killed", ())
        return Result(streams[out].text(), streams[err].text(), code, status, ())

    def close(self) -> None:
        """Ends every process and frees the world; may be called twice, and happens by itself at the latest at exit."""
        with self._lock:
            if self._closer.alive:
                with contextlib.suppress(AttributeError, OSError):
                    self._read_channel("")
                self._closer.detach()
                self._world.free()
            self._ended = "exited"


def _program(
    user: str, capabilities: list[int], argv: list[str], environment: dict[str, str], directory: str, path: str
) -> dict:
    everywhere = {"PATH": path, "LANG": "C.UTF-8", "TZ": "UTC", "TERM": "dumb"}
    groups = people.groups_of(user)
    return {
        "user": people.USERS[user],
        "group": groups[0],
        "groups": groups,
        "capabilities": capabilities,
        "argv": argv,
        "environment": {**everywhere, **environment},
        "directory": directory,
    }


def _exit_code(descriptor: int) -> int | None:
    """The code on an exit pipe, negative for a signal; None where the keeper ended before it could say."""
    status = os.read(descriptor, 4)
    return os.waitstatus_to_exitcode(struct.unpack("=i", status)[0]) if len(status) == 4 else None
