"""The bounded pool of threads in which the host executes environments' calls while devices decode.

Keyed calls go in; one `Outcome` per call comes out, in order of completion: a value, or the failure of that call alone.
`checked_text` is the gate that a tool's result passes before it is tokenized.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")

# What a failure's line may hold of a type's name, of a message, and of a path; with the words between, under 500.
_NAME, _MESSAGE, _PATH = 80, 220, 150

# How long `close` waits for calls under way. A daemon thread that is inside native code when the interpreter ends may
# abort the process, so a call that is about to return is let return; a longer one is not worth a delay of the exit.
_GRACE_S = 0.5

# UTF-8 is counted in slices of so many characters, so that a large text is never copied whole.
_SLICE = 1 << 16


@dataclasses.dataclass(frozen=True)
class ToolFailure:
    """Why a call has no value: `kind` is what happened; `text` is one printable line of at most 500 characters.

    For "raised", the text is the exception's type and message and the file:line that raised it. For "timeout", it is the
    limit and the file:line at which the call was found hanging.
    """

    kind: Literal["raised", "timeout"]
    text: str


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[T]):
    """A call that has ended or was given up: `value` is None if there is an `error`."""

    key: Hashable
    value: T | None
    error: ToolFailure | None


class BadResult(ValueError):
    """A tool's result that is no text, or more of it than allowed."""


class ToolPool(Generic[T]):
    """Runs calls in `workers` daemon threads and survives those that raise or hang. A context manager.

    Python threads cannot be stopped. A call that runs longer than `timeout_s` is therefore abandoned: it is reported as
    a timeout, a new thread takes the place of the one it holds, so that the pool keeps its width, and whatever it
    returns later is dropped. The limit counts from a call's start, not from when it was queued, and it is the call's own
    run time that decides: a call that returned too late is a timeout even if nobody looked in the meantime.

    `workers=0` runs each call at once inside `submit`, in the caller's thread: for debugging. There no timeout is
    possible, and Ctrl-C, which arrives inside the call, ends the run as the user wants it to.

    More workers help calls that wait (a subprocess, a network), not calls that compute in Python: those share one lock
    with the caller, who waits for it 5 ms (`sys.getswitchinterval`) or more behind each busy worker.

    `submit`, `collect` and `close` are for one thread, the one that made the pool.

    Attributes:
      outstanding: calls submitted and not yet collected.
      busy_seconds: run time of the collected calls, summed; of an abandoned one, until it was given up.

    Raises:
      ValueError: a count is negative, or the timeout is not positive.
    """

    # concurrent.futures would not do: its threads are joined at interpreter exit, so that one hung tool keeps a finished
    # run from ending, and its executor cannot replace a thread that is stuck.

    def __init__(self, workers: int, timeout_s: float, *, max_abandoned: int = 64) -> None:
        if workers < 0 or max_abandoned < 0:
            raise ValueError(f"workers={workers} and max_abandoned={max_abandoned} must not be negative")
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s={timeout_s} must be positive and at most {threading.TIMEOUT_MAX:.0f} s")
        self.outstanding = 0
        self.busy_seconds = 0.0
        self._timeout_s = timeout_s
        self._max_abandoned = max_abandoned
        self._inline = workers == 0
        self._closed = False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Outcome[Any], float]] = queue.SimpleQueue()
        # Before this moment no running call can have exceeded its limit: `collect` need not look at the workers.
        self._next_sweep = 0.0
        self._abandoned: list[_Worker] = []
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._hire())

    def __enter__(self) -> ToolPool[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: Hashable, call: Callable[[], T]) -> None:
        """Queues a call, without waiting for it (`workers=0`: runs it). Raises RuntimeError if the pool is closed."""
        if self._closed:
            raise RuntimeError(f"call {_clip(repr(key), _NAME)} was submitted to a closed pool")
        if self._inline:
            began = time.perf_counter()
            outcome = _execute(key, call, interruptible=True)
            self._done.put((outcome, time.perf_counter() - began))
        else:
            self._calls.put(_Call(key, call))
        self.outstanding += 1

    def collect(self, timeout_s: float | None = 0.0) -> list[Outcome[T]]:
        """The calls that returned, raised or timed out since the last time, in that order.

        Args:
          timeout_s: how long to wait for at least one; 0 does not wait, None waits until there is one.

        Returns:
          The outcomes; none if the wait was in vain or nothing is outstanding.

        Raises:
          RuntimeError: more than `max_abandoned` abandoned calls still run. The pool is closed.
        """
        if not self.outstanding:
            return []
        until = math.inf if timeout_s is None else time.perf_counter() + timeout_s
        ended: list[tuple[Outcome[T], float]] = []
        while not ended:
            now = time.perf_counter()
            if now >= self._next_sweep:
                self._next_sweep = self._sweep(now)
            waiting = min(until, self._next_sweep) - now
            if waiting > 0 and not self._done.qsize():
                try:
                    ended.append(self._done.get(timeout=waiting))
                except queue.Empty:
                    continue
            ended += [self._done.get() for _ in range(self._done.qsize())]  # nobody else takes any
            if now >= until:
                break
        self.outstanding -= len(ended)
        self.busy_seconds += sum(seconds for _, seconds in ended)
        return [outcome for outcome, _ in ended]

    def close(self) -> None:
        """Forgets what is outstanding and lets the threads go; idempotent. A call under way is not reported any more."""
        self._closed = True
        self.outstanding = 0
        while not self._calls.empty():
            try:
                self._calls.get_nowait()
            except queue.Empty:  # a worker was faster
                break
        for _ in self._workers:
            self._calls.put(None)
        latest = time.perf_counter() + _GRACE_S
        for worker in self._workers:
            worker.join(max(0.0, latest - time.perf_counter()))
        self._workers = []

    def _hire(self) -> _Worker:
        """A new thread on the queues."""
        worker = _Worker(self._calls, self._done, self._timeout_s)
        worker.start()
        return worker

    def _sweep(self, now: float) -> float:
        """Abandons the calls over their limit, and says until when there will be no other."""
        earliest = now + self._timeout_s  # of calls that start from now on
        for index, worker in enumerate(self._workers):
            call = worker.call
            if call is None:
                continue
            if now < call.deadline:
                earliest = min(earliest, call.deadline)
            elif call.claim.acquire(blocking=False):  # else it has ended at the last moment
                where = _place(sys._current_frames().get(worker.ident or 0))
                failure = ToolFailure("timeout", f"still running after {self._timeout_s:g} s{where}")
                self._done.put((Outcome(call.key, None, failure), now - call.deadline + self._timeout_s))
                self._abandoned = [*(other for other in self._abandoned if other.is_alive()), worker]
                if len(self._abandoned) > self._max_abandoned:
                    self._workers.remove(worker)
                    self.close()
                    raise RuntimeError(
                        f"{len(self._abandoned)} tool calls hang, each for more than its {self._timeout_s:g} s, and at "
                        f"most {self._max_abandoned} may; threads cannot be stopped. Bound what the environment waits "
                        f"for, or allow slow calls more time or more hung ones. The last: "
                        f"{_clip(repr(call.key), _NAME)}, {failure.text}"
                    )
                self._workers[index] = self._hire()
        return earliest


class _Call:
    """A queued call. Who acquires `claim`, the worker at its end or the pool at its limit, decides how it ended."""

    __slots__ = ("key", "call", "claim", "deadline")

    def __init__(self, key: Hashable, call: Callable[[], Any]) -> None:
        self.key = key
        self.call = call
        self.claim = threading.Lock()
        self.deadline = math.inf  # set at its start


class _Worker(threading.Thread):
    """One thread of the pool. Ends at a None in the queue, or when it finds that its call was abandoned."""

    def __init__(
        self,
        calls: queue.SimpleQueue[_Call | None],
        done: queue.SimpleQueue[tuple[Outcome[Any], float]],
        timeout_s: float,
    ) -> None:
        super().__init__(name="tool", daemon=True)
        self.call: _Call | None = None
        self.calls = calls
        self.done = done
        self.timeout_s = timeout_s

    def run(self) -> None:
        """Runs calls."""
        while (call := self.calls.get()) is not None:
            began = time.perf_counter()
            call.deadline = began + self.timeout_s
            self.call = call
            outcome = _execute(call.key, call.call)
            seconds = time.perf_counter() - began
            if seconds > self.timeout_s:
                failure = ToolFailure("timeout", f"took {seconds:.3g} s, more than the {self.timeout_s:g} s allowed")
                outcome = Outcome(call.key, None, failure)
            if not call.claim.acquire(blocking=False):
                return
            self.done.put((outcome, seconds))
            self.call = None
            del call, outcome  # an idle worker keeps nothing alive


def checked_text(text: object, limit_bytes: int) -> str:
    """The text of a tool's result, if it may be tokenized.

    Args:
      text: what the tool returned.
      limit_bytes: the most it may have, in UTF-8.

    Returns:
      The text itself.

    Raises:
      BadResult: it is no str, it has a lone surrogate and therefore no UTF-8, or it is too large.
    """
    if not isinstance(text, str):
        kind = _clip(type(text).__name__, _NAME)
        size = f" of {len(text):,} bytes" if isinstance(text, bytes | bytearray) else ""
        raise BadResult(f"a tool's result must be str but is {kind}{size}; let the environment make text of it")
    size = len(text)
    if not text.isascii():  # answered from the string's header
        size = 0
        for start in range(0, len(text), _SLICE):
            try:
                size += len(text[start : start + _SLICE].encode())
            except UnicodeEncodeError as error:
                at = start + error.start
                raise BadResult(
                    f"a tool's result of {len(text):,} characters is no valid text: a lone surrogate "
                    f"U+{ord(text[at]):04X} at position {at:,}, as surrogateescape makes of bytes that are not UTF-8; "
                    f'decode with errors="replace"'
                ) from None
    if size > limit_bytes:
        raise BadResult(
            f"a tool's result of {size:,} bytes exceeds the limit of {limit_bytes:,} bytes; "
            f"let the environment shorten it, or raise the limit"
        )
    return text


def _execute(key: Hashable, call: Callable[[], Any], *, interruptible: bool = False) -> Outcome[Any]:
    """Runs a call. What it raises is its failure, be it SystemExit; `interruptible` lets a KeyboardInterrupt through."""
    try:
        return Outcome(key, call(), None)
    except BaseException as error:  # a tool must not end the run
        if interruptible and isinstance(error, KeyboardInterrupt):
            raise
        return Outcome(key, None, ToolFailure("raised", _describe(error)))


def _describe(error: BaseException) -> str:
    """Type, message and place of an exception, in one line; whatever its own methods do."""
    try:
        name = _clip(type(error).__qualname__, _NAME)
        try:
            message = str(error)
        except BaseException as second:
            message = f"(its str() raised {type(second).__qualname__})"
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = _place(trace.tb_frame, trace.tb_lineno) if trace is not None else ""
        return f"{name}: {_clip(message, _MESSAGE)}{place}" if message else f"{name}{place}"
    except BaseException:  # out of memory, or a type made to confuse
        return "an exception that cannot be described"


def _place(frame: FrameType | None, line: int | None = None) -> str:
    """` at file:line` of a frame, by default its present line; nothing if there is no frame."""
    if frame is None:
        return ""
    path = _clip(frame.f_code.co_filename, 4096)
    path = path if len(path) <= _PATH else f"…{path[-_PATH:]}"
    return f" at {path}:{line or frame.f_lineno}"


def _clip(text: str, limit: int) -> str:
    """One printable line of at most so many characters: white space is one blank, the unprintable is escaped."""
    line = " ".join(text[: 2 * limit].split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= limit and len(text) <= 2 * limit else f"{line[: limit - 1]}…"
