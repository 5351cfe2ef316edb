"""Items made ahead: in order, never further than asked for, and nothing is left running."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from subl_jax.distill.prefetch import prefetched


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def settle() -> None:
    """Time enough for a thread to do whatever it may."""
    time.sleep(0.05)


@pytest.mark.parametrize("depth", [0, 1, 2, 50])
def test_items_come_in_the_order_of_their_positions(depth):
    assert list(prefetched(lambda p: p * p, range(3, 40), depth)) == [p * p for p in range(3, 40)]
    assert not threads()
    assert list(prefetched(lambda p: p, range(4, 4), depth)) == []


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_more_items_are_made_than_the_one_in_use_and_depth_ahead(depth):
    made: list[int] = []
    with contextlib.closing(prefetched(lambda p: made.append(p) or p, range(20), depth)) as items:
        for wanted in range(5):
            assert next(items) == wanted
            settle()
            assert made == list(range(wanted + 1 + depth))


def test_without_depth_each_item_is_made_when_it_is_asked_for_and_by_whoever_asks():
    made: list[tuple[int, threading.Thread]] = []
    items = prefetched(lambda p: made.append((p, threading.current_thread())), range(5), 0)
    assert made == []
    next(items)
    assert made == [(0, threading.main_thread())]


def test_items_are_made_while_the_one_before_is_in_use():
    began = time.perf_counter()
    for _ in prefetched(lambda p: time.sleep(0.05), range(8), 2):
        time.sleep(0.05)
    assert time.perf_counter() - began < 0.65  # one after the other: 0.8


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("error", [ValueError("no such row"), KeyboardInterrupt()])
def test_an_exception_is_raised_in_the_place_of_its_item(depth, error):
    made: list[int] = []

    def make(position: int) -> int:
        made.append(position)
        if position == 3:
            raise error
        return position

    found: list[int] = []
    with pytest.raises(type(error)) as caught:
        for item in prefetched(make, range(9), depth):
            found.append(item)
    assert caught.value is error and found == [0, 1, 2] and made == [0, 1, 2, 3]
    assert not threads()


@pytest.mark.parametrize("taken", [1, 4])
def test_a_loop_that_breaks_off_leaves_no_thread_behind(taken):
    with pytest.raises(RuntimeError, match="diverged"):
        with contextlib.closing(prefetched(lambda p: p, range(10**9), 2)) as items:
            for item in items:
                if item == taken:
                    raise RuntimeError("diverged")
    assert not threads()
