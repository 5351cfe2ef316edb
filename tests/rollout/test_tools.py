"""The tool pool: every call is accounted for once, whatever it does, and one bad tool costs nobody else anything."""

from __future__ import annotations

import collections
import functools
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from subl_jax.rollout.tools import BadResult, Outcome, ToolFailure, ToolPool, checked_text

LONG_S = 60.0  # a limit that no test reaches
SHORT_S = 0.2  # one that a hanging call reaches, and no other
SLACK_S = 5.0  # how late a loaded machine may be


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hanging calls wait for; opened at the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def call() -> NoReturn:
        raise error

    return call


def collect_all(pool: ToolPool[Any]) -> list[Outcome[Any]]:
    outcomes = []
    while pool.outstanding:
        some = pool.collect(SLACK_S)
        assert some, f"nothing more comes of {pool.outstanding} calls"
        outcomes += some
    return outcomes


def failure_of(error: BaseException, workers: int = 1) -> ToolFailure:
    """The failure that a call reports which raises `error`, in a pool that goes on working."""
    with ToolPool(workers, LONG_S) as pool:
        pool.submit("bad", raising(error))
        pool.submit("good", lambda: "fine")
        outcomes = {outcome.key: outcome for outcome in collect_all(pool)}
    assert outcomes["good"] == Outcome("good", "fine", None)
    assert outcomes["bad"].value is None
    failure = outcomes["bad"].error
    assert failure is not None and failure.kind == "raised"
    assert failure.text.isprintable() and len(failure.text) <= 500
    return failure


# What comes back.


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_call_returns_its_value_under_its_key(workers):
    with ToolPool(workers, LONG_S) as pool:
        for n in range(20):
            pool.submit(("episode", n), lambda n=n: n * n)
        assert pool.outstanding == 20
        outcomes = collect_all(pool)
    assert len(outcomes) == 20
    assert set(outcomes) == {Outcome(("episode", n), n * n, None) for n in range(20)}


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_nothing_is_lost_or_doubled_among_many_calls(workers):
    rng = random.Random(workers)
    wanted, got = {}, []

    def work(n: int, seconds: float) -> int:
        if seconds:
            time.sleep(seconds)
        if n % 7 == 0:
            raise ValueError(n)
        return -n

    with ToolPool(workers, LONG_S) as pool:
        for n in range(2000):
            pool.submit(n, functools.partial(work, n, rng.choice([0, 0, 0, 1e-4])))
            wanted[n] = None if n % 7 == 0 else -n
            if rng.random() < 0.05:
                got += pool.collect(rng.choice([0.0, 1e-3, None]))
                assert pool.outstanding == n + 1 - len(got)
        got += collect_all(pool)
    assert collections.Counter(outcome.key for outcome in got) == collections.Counter(range(2000))
    assert {outcome.key: outcome.value for outcome in got} == wanted
    assert {outcome.key for outcome in got if outcome.error} == {n for n in range(2000) if n % 7 == 0}


def test_outcomes_come_in_order_of_completion(gate):
    first = threading.Event()
    with ToolPool(2, LONG_S) as pool:
        pool.submit("early", gate.wait)
        pool.submit("late", first.set)
        assert first.wait(SLACK_S)
        pool.submit("last", lambda: None)  # runs behind "late", on the one free worker
        assert [outcome.key for outcome in pool.collect(None)][0] == "late"
        while pool.outstanding > 1:
            pool.collect(None)
        gate.set()
        assert [outcome.key for outcome in pool.collect(None)] == ["early"]


def test_workers_run_side_by_side_and_no_more_than_their_number():
    meeting, extra = threading.Barrier(4), threading.Event()
    with ToolPool(3, LONG_S) as pool:
        for n in range(3):
            pool.submit(n, lambda: meeting.wait(SLACK_S))
        pool.submit("extra", extra.set)
        while meeting.n_waiting < 3:
            time.sleep(0.001)
        assert not extra.is_set()
        meeting.wait(SLACK_S)
        assert all(outcome.error is None for outcome in collect_all(pool))
        assert extra.is_set()


def test_collect_waits_no_longer_than_asked(gate):
    with ToolPool(1, LONG_S) as pool:
        assert pool.collect(None) == []  # nothing is outstanding: there is nothing to wait for
        pool.submit("slow", gate.wait)
        assert pool.collect() == []
        began = time.perf_counter()
        assert pool.collect(0.05) == []
        assert 0.05 <= time.perf_counter() - began < SLACK_S
        assert pool.outstanding == 1
        gate.set()
        assert pool.collect(None) == [Outcome("slow", True, None)]


def test_busy_seconds_sum_the_run_times_but_not_the_queueing():
    with ToolPool(1, LONG_S) as pool:
        for n in range(5):
            pool.submit(n, lambda: time.sleep(0.02))
        began = time.perf_counter()
        collect_all(pool)
        assert 0.1 <= pool.busy_seconds <= time.perf_counter() - began + 0.02


def test_an_idle_worker_keeps_neither_call_nor_value_alive():
    tracemalloc.start()
    try:
        with ToolPool(1, LONG_S) as pool:
            pool.submit("large", functools.partial(bytes, bytearray(10_000_000)))
            assert [len(outcome.value or ()) for outcome in pool.collect(None)] == [10_000_000]
            latest = time.perf_counter() + SLACK_S  # the worker lets go just after it has delivered
            while tracemalloc.get_traced_memory()[0] > 1_000_000:
                assert time.perf_counter() < latest
                time.sleep(0.001)
    finally:
        tracemalloc.stop()


# Calls that raise.


class Broken(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("error", [ValueError("a reason"), MemoryError(), RecursionError("deep"), StopIteration(3)])
def test_a_raising_call_costs_only_itself_and_says_what_and_where(error):
    text = failure_of(error).text
    assert text.startswith(type(error).__name__)
    assert str(error) in text
    assert f"{__file__[-100:]}:{raising.__code__.co_firstlineno + 2}" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_would_end_a_program_ends_only_the_call(error):
    assert failure_of(error).text.startswith(type(error).__name__)


def test_an_exception_that_cannot_be_shown_is_named():
    assert failure_of(Broken()).text.startswith("Broken: (its str() raised ValueError) at ")
    assert failure_of(type("N" * 9000, (Exception,), {})("x")).text.startswith("NNNN")


@pytest.mark.parametrize("message", ["two\nlines\r\tand \x1b[31m a \udcff half", "word " * 9000, "\x00" * 9000])
def test_a_message_becomes_one_short_printable_line(message):
    text = failure_of(OSError(message)).text  # asserts the form
    assert text.startswith("OSError: ") and __file__[-100:] in text
    if "two" in message:
        assert r"two lines and \x1b[31m a \udcff half" in text


def test_without_workers_a_call_runs_at_once_and_its_exit_is_contained():
    seen = []
    with ToolPool(0, SHORT_S) as pool:
        pool.submit("a", lambda: seen.append(threading.current_thread()))
        assert seen == [threading.current_thread()]
        pool.submit("b", lambda: time.sleep(1.5 * SHORT_S))  # as at a breakpoint: no timeout
        assert [outcome.error for outcome in pool.collect(None)] == [None, None]
        with pytest.raises(KeyboardInterrupt):  # the user's Ctrl-C arrives in whatever runs in the main thread
            pool.submit("c", raising(KeyboardInterrupt()))
        assert pool.outstanding == 0
    assert failure_of(SystemExit(1), workers=0).text.startswith("SystemExit: 1")


# Calls that hang.


def test_a_hanging_call_is_given_up_while_the_others_proceed(gate):
    with ToolPool(2, 0.5) as pool:
        began = time.perf_counter()
        pool.submit("hangs", gate.wait)
        for n in range(10):
            pool.submit(n, lambda: "fine")
        outcomes = collect_all(pool)
        took = time.perf_counter() - began
    assert 0.5 <= took < 0.5 + SLACK_S
    assert {outcome.value for outcome in outcomes[:10]} == {"fine"}
    assert outcomes[10].key == "hangs" and outcomes[10].value is None
    failure = outcomes[10].error
    assert failure is not None and failure.kind == "timeout"
    assert failure.text.startswith("still running after 0.5 s at ")
    assert threading.__file__[-100:] in failure.text  # where Event.wait waits
    assert 0.5 <= pool.busy_seconds < 0.5 + SLACK_S


def test_the_pool_keeps_its_width_when_all_its_workers_hang(gate):
    with ToolPool(3, SHORT_S) as pool:
        for n in range(3):
            pool.submit(n, gate.wait)
        assert [outcome.error.kind for outcome in collect_all(pool) if outcome.error] == ["timeout"] * 3
        meeting = threading.Barrier(3)  # passed only by three at a time
        for n in range(3):
            pool.submit(n, meeting.wait)
        assert [outcome.error for outcome in collect_all(pool)] == [None] * 3


@pytest.mark.parametrize("late", [lambda: "late", raising(ValueError("late"))])
def test_the_late_result_of_an_abandoned_call_is_never_seen(gate, late):
    threads = []

    def hang() -> object:
        threads.append(threading.current_thread())
        gate.wait()
        return late()

    with ToolPool(1, SHORT_S) as pool:
        pool.submit("key", hang)
        assert [outcome.error.kind for outcome in pool.collect(None) if outcome.error] == ["timeout"]
        pool.submit("key", lambda: "new")
        assert collect_all(pool) == [Outcome("key", "new", None)]
        gate.set()
        threads[0].join(SLACK_S)
        assert not threads[0].is_alive()  # it ends itself: the pool does not grow
        pool.submit("key", lambda: "newer")
        assert collect_all(pool) == [Outcome("key", "newer", None)]


def test_the_timeout_counts_from_the_start_of_a_call_not_from_its_queueing():
    with ToolPool(1, 0.5) as pool:
        began = time.perf_counter()
        for n in range(13):
            pool.submit(n, lambda: time.sleep(0.08))
        outcomes = collect_all(pool)
        assert time.perf_counter() - began > 2 * 0.5
    assert [outcome.error for outcome in outcomes] == [None] * 13


def test_a_call_that_returned_too_late_is_a_timeout_though_nobody_looked():
    threads = []

    def slow() -> str:
        threads.append(threading.current_thread())
        time.sleep(2 * SHORT_S)
        return "late"

    with ToolPool(1, SHORT_S) as pool:
        pool.submit("slow", slow)
        pool.submit("next", lambda: threads.append(threading.current_thread()))
        while len(threads) < 2:
            time.sleep(0.001)
        slow_one, next_one = collect_all(pool)
    assert slow_one.value is None
    assert slow_one.error is not None and slow_one.error.kind == "timeout"
    assert "more than the 0.2 s allowed" in slow_one.error.text
    assert next_one.error is None and threads[0] is threads[1]  # it did return: its worker goes on


def test_more_hung_calls_than_allowed_end_the_run_with_their_number_and_the_remedy(gate):
    with ToolPool(1, SHORT_S, max_abandoned=2) as pool:
        for n in range(2):
            pool.submit(n, gate.wait)
            assert len(pool.collect(None)) == 1
        pool.submit("the third", gate.wait)
        with pytest.raises(RuntimeError, match=r"3 tool calls hang, each .* 0.2 s.*'the third'") as caught:
            pool.collect(None)
        assert "Bound what the environment waits for" in str(caught.value)
        assert pool.collect(None) == []  # it does not wait for what will never come
        with pytest.raises(RuntimeError, match="closed pool"):
            pool.submit("a fourth", lambda: None)


def test_abandoned_calls_that_have_returned_since_no_longer_count(gate):
    threads = []

    def hang(until: threading.Event) -> None:
        threads.append(threading.current_thread())
        until.wait()

    with ToolPool(1, SHORT_S, max_abandoned=1) as pool:
        for n in range(3):
            opened = threading.Event()
            pool.submit(n, lambda opened=opened: hang(opened))
            assert len(pool.collect(None)) == 1
            opened.set()
            threads[-1].join(SLACK_S)
        assert len(set(threads)) == 3


# The end.


def test_calls_outstanding_at_the_close_are_not_reported_and_queued_ones_never_run(gate):
    ran, started = threading.Event(), threading.Event()
    pool: ToolPool[object] = ToolPool(1, LONG_S)
    pool.submit("running", lambda: (started.set(), gate.wait()))
    pool.submit("queued", ran.set)
    workers = [thread for thread in threading.enumerate() if thread.name == "tool"]
    assert started.wait(SLACK_S)
    pool.close()
    assert pool.outstanding == 0 and pool.collect(None) == []
    gate.set()
    for worker in workers:
        worker.join(SLACK_S)
        assert not worker.is_alive()
    assert not ran.is_set() and pool.collect() == []
    pool.close()
    with pytest.raises(RuntimeError, match="call 'more' was submitted to a closed pool"):
        pool.submit("more", lambda: None)


def test_close_ends_every_thread():
    before = set(threading.enumerate())
    with ToolPool(8, LONG_S) as pool:
        for n in range(50):
            pool.submit(n, lambda: time.sleep(0.001))
        workers = set(threading.enumerate()) - before
        assert len(workers) == 8
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize("ending", ["pool.close()", "pass", "raise SystemExit(0)"])
def test_a_process_with_a_hung_tool_exits_promptly(ending):
    code = f"""
import sys, threading, time
from subl_jax.rollout.tools import ToolPool
pool = ToolPool(2, 0.05)
for n in range(4):
    pool.submit(n, threading.Event().wait)
while pool.outstanding > 2:  # two are abandoned, two are still within their limit
    pool.collect(None)
print(time.time(), flush=True)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert time.time() - float(done.stdout) < SLACK_S
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    ("workers", "timeout_s", "abandoned"), [(-1, 1.0, 0), (1, 0.0, 0), (1, float("nan"), 0), (1, 1.0, -1)]
)
def test_limits_that_mean_nothing_are_refused(workers, timeout_s, abandoned):
    with pytest.raises(ValueError, match="must"):
        ToolPool(workers, timeout_s, max_abandoned=abandoned)


# What a tool may return.


@pytest.mark.parametrize("text", ["", "plain", "naïve 🙂 漢字", "a\x00b\n", "é" * 100_000])
def test_text_within_the_limit_is_returned_as_it_is(text):
    size = len(text.encode())
    assert checked_text(text, size) is text
    if size:
        with pytest.raises(BadResult, match=f"result of {size:,} bytes exceeds the limit of {size - 1:,} bytes"):
            checked_text(text, size - 1)


@pytest.mark.parametrize(
    ("thing", "words"), [(b"raw", "bytes of 3 bytes"), (None, "NoneType"), (7, "int"), (["a"], "list")]
)
def test_what_is_no_str_is_refused_by_its_type(thing, words):
    with pytest.raises(BadResult, match=f"must be str but is {words};"):
        checked_text(thing, 100)


@pytest.mark.parametrize("place", [0, 5, 65_535, 65_536, 200_000])
def test_the_first_lone_surrogate_is_located(place):
    text = "é" * place + b"\xff and \xfe".decode("utf-8", "surrogateescape")
    with pytest.raises(BadResult, match=f"U\\+DCFF at position {place:,}, ") as caught:
        checked_text(text, 10_000_000)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["a" * 10_000_000, "é" * 10_000_000])
def test_a_large_text_is_not_copied(text):
    tracemalloc.start()
    try:
        checked_text(text, 1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
