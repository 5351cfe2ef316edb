"""Processes of one machine as one: started together, read line by line, ended together, one exit code for all.

One thread does everything, since the kernel ties a child's life (PR_SET_PDEATHSIG) to the thread that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from subl_jax.launching.output import Lines, Printer
from subl_jax.parallel import contract

# How often ends are looked for, in seconds.
_LOOKS_EVERY = 0.05
# Ends that follow from one another come close together, and not always in order: so long the others are left alone. A
# process that says it only lost another one may be gone well before that one has written its traceback.
_TOGETHER = 0.2
_CAUSE_WITHIN = 2.0
# Processes that a child left behind may hold its pipes open; so long is read on after its end.
_DRAIN_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a group of processes ended.

    Attributes:
      code: exit code that stands for all.
      asked: whether the launcher itself was told to stop.
      rank: whose end was the cause, if any failed.
    """

    code: int
    asked: bool = False
    rank: int | None = None


class Child:
    """One process, leader of its own process group."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.rank = rank
        self.code: int | None = None
        self.killed_by_us = False
        self.popen = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
            preexec_fn=_dies_with(os.getpid()),
        )

    def signal(self, number: int) -> None:
        """Sends a signal to the process; SIGKILL to all of its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            elif self.code is None:
                # To the process alone: its own children are its own to stop, and a signal that comes twice (from the
                # launcher and from the parent) would cut a checkpoint short.
                os.kill(self.popen.pid, number)


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What a child does before it becomes the command: asks the kernel to end it when its launcher ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded here: a fork had better not

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # it ended in between
            os._exit(128 + signal.SIGKILL)

    return ask


def exit_code(returncode: int) -> int:
    """A process's end as a shell has it: 128 + n where signal n ended it."""
    return 128 - returncode if returncode < 0 else returncode


def again(code: int) -> bool:
    """Whether a run that ended so may be started again: asked to stop, lost a process, or one was ended by a signal."""
    return code in (contract.REQUEUE, contract.PEER_LOST) or code > 128


def weight(returncode: int) -> int:
    """Of ends that came together: how likely one, as `Popen.returncode` has it, is the cause of the others."""
    code = exit_code(returncode)
    if code == contract.PEER_LOST:
        return 0
    if code == contract.REQUEUE:
        return 1
    if returncode == -signal.SIGABRT:
        return 2  # XLA's way to end a process whose coordination service is gone
    # Other signals (SIGKILL of the kernel's, a segmentation fault) come from outside of the program; errors follow from them.
    return 4 if returncode < 0 else 3


class Group:
    """Processes that run, and end, together."""

    def __init__(self, children: Sequence[Child], printer: Printer, grace_s: float) -> None:
        self._children = children
        self._printer = printer
        self._grace_s = grace_s
        self._failed: list[Child] = []  # not by this launcher's doing, in the order of their ends
        self._first_at = 0.0  # when the first failed
        self._asked: list[int] = []  # signals that told the launcher to stop
        self._terminated = False
        self._kill_at: float | None = None
        self._selector = selectors.DefaultSelector()
        for child in children:
            for error, pipe in ((False, child.popen.stdout), (True, child.popen.stderr)):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, Lines(child.rank, error))

    def run(self) -> Outcome:
        """Waits for the end of all; prints what they write and, at last, the words of the one that failed first."""
        try:
            with self._told_to_stop():
                while any(child.code is None for child in self._children):
                    self._read(_LOOKS_EVERY)
                    self._notice()
                    self._act(time.monotonic())
            self._drain()
        finally:
            for child in self._children:
                child.signal(signal.SIGKILL)  # also what it left behind in its group
                child.popen.wait()
        return self._outcome()

    # --- What the launcher is told -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        def told(number: int, frame: FrameType | None) -> None:
            del frame
            self._asked.append(number)  # said elsewhere: a print may have been interrupted

        before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- Ends ----------------------------------------------------------------------------------------------------------

    def _notice(self) -> None:
        for child in self._children:
            if child.code is None and child.popen.poll() is not None:
                child.code = exit_code(child.popen.returncode)
                # What ends after it was asked to says nothing about the cause, unless the asking was the launcher's user's.
                if child.code and not child.killed_by_us and (self._asked or not self._terminated):
                    self._first_at = self._first_at or time.monotonic()
                    self._failed.append(child)

    def _act(self, now: float) -> None:
        """Passes on what has to be passed on, at its time."""
        if self._asked:
            if not self._terminated:
                self._printer.say(
                    f"{signal.Signals(self._asked[0]).name}: asking all processes to stop and waiting {self._grace_s:g} s "
                    "for them; a second one kills them"
                )
            self._terminate(now)
        elif self._failed and not self._terminated:
            waits = _TOGETHER
            if all(child.code == contract.REQUEUE for child in self._failed):
                waits = self._grace_s  # the others were asked as well, and save: a second request would cut it short
            elif all(child.code == contract.PEER_LOST for child in self._failed):
                waits = _CAUSE_WITHIN
            if now >= self._first_at + waits:
                self._terminate(now)
        if len(self._asked) > 1 or (self._kill_at is not None and now >= self._kill_at):
            for child in self._children:
                if child.code is None and not child.killed_by_us:
                    child.killed_by_us = True
                    child.signal(signal.SIGKILL)  # ends a stopped process too

    def _terminate(self, now: float) -> None:
        if self._terminated:
            return
        self._terminated, self._kill_at = True, now + self._grace_s
        for child in self._children:
            if child.code is None:
                child.signal(signal.SIGTERM)
                child.signal(signal.SIGCONT)  # a stopped process would not look at it

    # --- Output --------------------------------------------------------------------------------------------------------

    def _read(self, timeout: float) -> None:
        if not self._selector.get_map():
            time.sleep(timeout)
            return
        for key, _ in self._selector.select(timeout):
            lines: Lines = key.data
            try:
                data = os.read(key.fd, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
            for line in lines.feed(data):
                self._printer.line(line)

    def _drain(self) -> None:
        end = time.monotonic() + _DRAIN_S
        while self._selector.get_map() and time.monotonic() < end:
            self._read(_LOOKS_EVERY)
        for key in list(self._selector.get_map().values()):
            for line in key.data.feed(b""):
                self._printer.line(line)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()
        self._printer.clear()

    def _outcome(self) -> Outcome:
        asked = bool(self._asked)
        if not self._failed:
            killed = any(child.killed_by_us for child in self._children)
            return Outcome(128 + signal.SIGKILL if killed else 0, asked)
        # Asked to stop, the first end says more than those that follow from it; else the heaviest, of equals the first.
        cause = self._failed[0] if asked else max(self._failed, key=lambda child: weight(child.popen.returncode))
        assert cause.code is not None
        how = f"exit code {cause.code}"
        if cause.popen.returncode < 0:
            how = f"{_name(-cause.popen.returncode)} (exit code {cause.code})"
        if cause.code == contract.REQUEUE:
            self._printer.say(f"process {cause.rank} of {len(self._children)} was asked to stop: {how}")
        else:
            self._printer.last_words(cause.rank, f"process {cause.rank} of {len(self._children)} failed first: {how}")
        return Outcome(cause.code, asked, cause.rank)


def _name(number: int) -> str:
    try:
        return f"ended by {signal.Signals(number).name}"
    except ValueError:
        return f"ended by signal {number}"


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]], printer: Printer, grace_s: float) -> Outcome:
    """Runs one process of a command for each environment, and waits for all.

    Args:
      command: of every process.
      environments: one for each rank.
      printer: takes what they write.
      grace_s: seconds between asking a process to stop and killing it.

    Raises:
      OSError: the command cannot be started.
    """
    children: list[Child] = []
    try:
        for rank, environment in enumerate(environments):
            children.append(Child(rank, command, environment))
    except BaseException:
        for child in children:
            child.signal(signal.SIGKILL)
            child.popen.wait()
        raise
    return Group(children, printer, grace_s).run()
