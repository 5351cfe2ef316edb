"""Warm sandboxes: a background thread starts the next ones while the present ones work."""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import threading
import weakref

from subl_jax.settings.bash.sandbox.client import KeeperClient
from subl_jax.settings.bash.sandbox.episode import Sandbox
from subl_jax.settings.bash.sandbox.host import Host
from subl_jax.settings.bash.sandbox.limits import Limits


class SandboxPool:
    """Sandboxes of one kind; safe to use from several threads of the process that made it."""

    def __init__(self, limits: Limits | None = None, size: int = 2, host: Host | None = None):
        """Starts the keeper at once and `size` sandboxes in the background.

        Raises:
          SandboxUnavailable: this machine cannot give what the sandbox needs.
        """
        self.limits = limits or Limits()
        self._size = size
        self._client = KeeperClient(self.limits, host)
        self._warm: collections.deque[Sandbox] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._taken: weakref.WeakSet[Sandbox] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._keep_warm, name="sandbox-pool", daemon=True)
        self._thread.start()

    @property
    def client(self) -> KeeperClient:
        """The keeper behind this pool."""
        return self._client

    def take(self) -> Sandbox:
        """A fresh sandbox, a warm one where there is one. The caller closes it.

        Raises:
          RuntimeError: the pool is closed, or belongs to another process.
          OSError: none could be started.
        """
        # Asked before the lock, which a fork may have left in the hands of a thread that is not there.
        if os.getpid() != self._client.owner:
            raise RuntimeError("this sandbox pool was made by another process")
        with self._changed:
            if self._closed:
                raise RuntimeError("this sandbox pool is closed")
            sandbox = self._warm.popleft() if self._warm else None
            self._changed.notify_all()
        sandbox = sandbox or Sandbox(self._client)
        with self._changed:
            self._taken.add(sandbox)
            if not self._closed:
                return sandbox
        sandbox.close()
        raise RuntimeError("this sandbox pool was closed meanwhile")

    def _keep_warm(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._warm) < self._size)
                if self._closed:
                    return
            try:
                sandbox = Sandbox(self._client)
            except Exception:
                # take() starts one itself and says what is wrong.
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, timeout=1.0)
                continue
            with self._changed:
                if not self._closed:
                    self._warm.append(sandbox)
                    continue
            sandbox.close()

    def close(self) -> None:
        """Ends every sandbox of the pool, those taken included; returns when nothing of it is left."""
        if os.getpid() != self._client.owner:
            return
        with self._changed:
            already, self._closed = self._closed, True
            self._changed.notify_all()
        if already:
            return
        self._thread.join(timeout=30)
        while self._warm:
            self._warm.popleft().close()
        self._client.close()
        # What was taken is dead by now, so a command that another thread waits for has ended.
        for sandbox in list(self._taken):
            sandbox.close()

    def __enter__(self) -> SandboxPool:
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


_default: dict[int, SandboxPool] = {}
_default_lock = threading.Lock()


def _forked() -> None:
    global _default_lock
    _default_lock = threading.Lock()  # a thread of the parent's may have held it


os.register_at_fork(after_in_child=_forked)


def default_pool() -> SandboxPool:
    """This process's pool with the usual limits, made at the first call and closed at exit.

    Raises:
      SandboxUnavailable: this machine cannot give what the sandbox needs.
    """
    with _default_lock:
        pool = _default.get(os.getpid())
        if pool is None or not pool.client.alive:
            if pool is not None:
                pool.close()
            pool = _default[os.getpid()] = SandboxPool()
        return pool


@atexit.register
def _close() -> None:
    pool = _default.get(os.getpid())
    if pool is not None:
        with contextlib.suppress(OSError):
            pool.close()
