"""SIGTERM, which schedulers send ahead of taking a machine away: a run saves what it has, and exits with code 143."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """A run was asked to stop and did; exit code 143, as of a process that SIGTERM ended.

    Attributes:
      stage: what was being trained.
      step: from which the same call goes on.
    """

    def __init__(self, stage: str, step: int) -> None:
        """Raised behind the checkpoint of that step."""
        super().__init__(128 + signal.SIGTERM)
        self.stage, self.step = stage, step


class StopRequests:
    """Notices SIGTERM inside a `with` block. The first asks; a second one does what it did before the block.

    Signals reach the main thread alone: in another one nothing is noticed. Of several processes none may leave by itself,
    since the others would wait for it in their next collective: JAX's preemption service, whose handler
    `jax.distributed.initialize` installs, agrees on a step between them.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._installed = False

    def asked(self, step: int) -> bool:
        """Whether to stop behind this step; every process asks at every step, and all get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

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
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            before = signal.getsignal(signal.SIGTERM)
            if before is not None:  # None: a handler that was not set from Python, and could not be put back
                self._before = signal.signal(signal.SIGTERM, self._notice)
                self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Puts back the handler that was there."""
        self._restore()
