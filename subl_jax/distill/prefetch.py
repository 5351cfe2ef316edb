"""Items made ahead by a thread, while the devices compute: positions in, what is made of them out, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], positions: range, depth: int) -> Generator[T, None, None]:
    """What `make` makes of each position, in order; up to `depth` items ahead of the one in use.

    One thread calls `make`, for one position after the other, so that it need not be safe against itself. What it raises
    is raised here, in the place of its item, and nothing is made behind it. Close the generator (`contextlib.closing`)
    where it may not run to its end: that stops the thread and waits for it.

    Args:
      make: of a position.
      positions: in order.
      depth: 0: no thread, each item is made when it is asked for.
    """
    if depth == 0:
        yield from map(make, positions)
        return
    slots, made = threading.Semaphore(depth), queue.SimpleQueue[tuple[Any, BaseException | None]]()
    closed = threading.Event()

    def work() -> None:
        for position in positions:
            slots.acquire()
            if closed.is_set():
                return
            try:
                item = make(position)
            except BaseException as error:  # noqa: B036 - it is raised again where the item is asked for
                made.put((None, error))
                return
            made.put((item, None))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in positions:
            item, error = made.get()
            if error is not None:
                raise error
            slots.release()
            yield item
    finally:
        closed.set()
        slots.release()
        thread.join()
