"""SIGTERM, which schedulers send ahead of taking a machine away: a run saves what it has, and exits with code 143.

Of several processes none may leave by itself, since the others would wait for it in their next collective: whichever is asked
tells the rest, and all stop behind one and the same step.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from absl import logging
from jax._src import distributed  # the coordination service's client has no public name

from subl_jax.parallel import contract, processes

# How often a process looks whether another one was asked, in seconds, and how long the answer of all may take.
_LOOKS_EVERY = 0.5
_ANSWER_WITHIN = 30

_numbers: Iterator[int] = itertools.count()
_unanswered = False


class Preempted(SystemExit):
    """A run was asked to stop and did; exit code 143, as of a process that SIGTERM ended.

    Attributes:
      stage: what was being done.
      step: from which the same call goes on.
    """

    def __init__(self, stage: str, step: int) -> None:
        """Raised behind the checkpoint of that step."""
        super().__init__(contract.REQUEUE)
        self.stage, self.step = stage, step


def leave_if_asked(where: str) -> None:
    """Ends the run between two stages, if SIGTERM came to any process too late for the steps of the one before.

    Raises:
      Preempted: it did; in every process.
    """
    if any(processes.gather(f"asked to stop behind {where}", _unanswered)):
        raise Preempted(where, 0)


class StopRequests:
    """Notices SIGTERM inside a `with` block. The first asks; a second one does what it did before the block.

    Signals reach the main thread alone: in another one nothing is noticed, unless another process is asked.

    Attributes:
      alone: the others did not answer, so that no checkpoint of this step can be made together.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._installed = False
        self.alone = False
        # Of several processes:
        self._lock = threading.Lock()
        self._steps = 0  # at which this process has been asking
        self._until: int | None = None  # the step that all agreed on
        self._over = threading.Event()
        self._prefix = f"subl/stop/{next(_numbers)}"  # every process trains the same models in the same order

    def asked(self, step: int) -> bool:
        """Whether to stop behind this step; every process asks at every step, and all get the same answer."""
        if not processes.several():
            return self._asked
        with self._lock:  # held while processes agree: none dispatches a step meanwhile
            self._steps = step
            return self._until is not None and step >= self._until

    # --- Of several processes ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """In a thread of its own: waits until this process or another one is asked, and agrees with the rest."""
        client: Any = distributed.global_state.client
        while not self._over.wait(_LOOKS_EVERY):
            if self._asked:
                client.key_value_set(f"{self._prefix}/asked", "yes", allow_overwrite=True)
            elif not _there(client, f"{self._prefix}/asked"):
                continue
            with self._lock:
                self._until = self._agreed(client)
            self._asked = True
            return

    def _agreed(self, client: Any) -> int:
        """One step more than any process has dispatched: none has passed it, and all get there."""
        state = distributed.global_state
        self._say_where()
        told = []
        for rank in range(state.num_processes):
            try:
                told.append(int(client.blocking_key_value_get(f"{self._prefix}/at/{rank}", _ANSWER_WITHIN * 1000)))
            except Exception as error:  # the client's own error type has no public name
                logging.warning("process %d does not say where it is (%s): stopping without it", rank, error)
                self.alone = True
                return self._steps
        return max(told) + 1

    def _say_where(self) -> None:
        """Once: how many steps this process has dispatched; also for one that asks after this one's last step."""
        state: Any = distributed.global_state
        state.client.key_value_set(f"{self._prefix}/at/{state.process_id}", str(self._steps))

    # --- The block -----------------------------------------------------------------------------------------------------

    def _notice(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)
            self._installed = False

    def __enter__(self) -> StopRequests:
        """Installs the handler."""
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            if before is not None:  # None: a handler that was not set from Python, and could not be put back
                self._before = signal.signal(signal.SIGTERM, self._notice)
                self._installed = True
        if processes.several():
            processes.barrier(self._prefix)  # from here on all can be asked where they are
            threading.Thread(target=self._listen, name="stop requests", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts back the handler that was there; a request that no step answered is left to `leave_if_asked`."""
        global _unanswered
        self._over.set()
        self._restore()
        if error is None and processes.several():
            with contextlib.suppress(Exception):  # it has answered already; the client's error type has no public name
                self._say_where()
        _unanswered = _unanswered or (error is None and self._asked)


def _there(client: Any, key: str) -> bool:
    try:
        return bool(client.key_value_try_get(key))
    except Exception:  # not found; the client's own error type has no public name
        return False
