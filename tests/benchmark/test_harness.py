"""The harness on a clock of its own: statistics against NumPy, order of the runs, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subl_jax.benchmark import harness
from subl_jax.benchmark.harness import WARM_UPS, BenchmarkError, Timing
from tests.benchmark.clocks import Clock, Worker, counting

SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


def interleave(clock: Clock, *workers: Worker, **options: Any) -> dict[str, Timing]:
    return harness.interleave(
        [worker.program for worker in workers], lambda number: number, clock=clock, sleep=clock.pass_time, **options
    )


@given(SECONDS, st.floats(0, 1))
def test_quantiles_are_numpys(seconds: list[float], share: float) -> None:
    np.testing.assert_allclose(harness.quantile(seconds, share), np.quantile(seconds, share), rtol=1e-12)
    timing = Timing(tuple(seconds), 0.0)
    np.testing.assert_allclose(
        (timing.p20, timing.median, timing.p80), np.quantile(seconds, (0.2, 0.5, 0.8)), rtol=1e-12
    )


@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40))
def test_the_ratio_is_of_medians_and_its_spread_is_of_rounds(pairs: list[tuple[float, float]]) -> None:
    theirs, ours = np.array(pairs).T
    found = harness.ratio(Timing(tuple(theirs.tolist()), 0.0), Timing(tuple(ours.tolist()), 0.0))
    np.testing.assert_allclose(found.median, np.median(theirs) / np.median(ours), rtol=1e-12)
    np.testing.assert_allclose((found.p20, found.p80), np.quantile(theirs / ours, (0.2, 0.8)), rtol=1e-12)


def test_a_ratio_of_runs_from_different_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="time both in the same call"):
        harness.ratio(Timing((1.0, 1.0), 0.0), Timing((1.0,), 0.0))


def test_programs_take_turns_and_every_round_has_inputs_of_its_own() -> None:
    clock, log = Clock(), []
    interleave(clock, *(Worker(name, clock, [0.1], log) for name in "abc"), rounds=3)
    assert log == [(name, number) for number in range(WARM_UPS + 3) for name in "abc"]


def test_warm_ups_are_not_timed_and_their_excess_is_the_compile_time() -> None:
    clock, log = Clock(), []
    a = Worker("a", clock, [7.0, 1.5, 1.0, 3.0, 2.0], log)
    b = Worker("b", clock, [0.5, 0.5, 0.5, 0.5, 0.5], log)
    timings = interleave(clock, a, b, rounds=3)
    assert timings["a"].seconds == pytest.approx((1.0, 3.0, 2.0)) and timings["b"].seconds == pytest.approx((0.5,) * 3)
    assert timings["a"].compile_s == pytest.approx(7.0 + 1.5 - 2 * 2.0) and timings["b"].compile_s == 0.0


@pytest.mark.parametrize(("slowest", "rounds"), [(0.1, 20), (2.0, 20), (2.1, 5), (60.0, 5)])
def test_twenty_runs_or_five_where_one_exceeds_two_seconds(slowest: float, rounds: int) -> None:
    clock, log = Clock(), []
    # The first run, which compiles, decides nothing.
    timings = interleave(clock, Worker("a", clock, [0.1], log), Worker("b", clock, [100.0, slowest], log))
    assert [len(timing.seconds) for timing in timings.values()] == [rounds, rounds]


def test_every_warm_up_is_checked_with_its_inputs_before_anything_is_timed() -> None:
    clock, log, seen = Clock(), [], []
    interleave(
        clock, Worker("a", clock, [1.0], log), Worker("b", clock, [1.0], log), rounds=1,
        check=lambda given, outputs: seen.append((given, outputs, len(log))),
    )  # fmt: skip
    assert [(given, outputs) for given, outputs, _ in seen] == [
        (number, {"a": f"a did {number}", "b": f"b did {number}"}) for number in range(WARM_UPS)
    ]
    assert all(count <= 2 * WARM_UPS for _, _, count in seen)


def test_a_program_elsewhere_is_timed_by_its_own_clock() -> None:
    clock, log = Clock(), []
    timings = interleave(clock, Worker("a", clock, [5.0], log, own_seconds=lambda: 4.0), rounds=2)
    assert timings["a"].seconds == (4.0, 4.0)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_a_peer_named_for_compiling_that_does_not_is_refused() -> None:
    clock, log = Clock(), []
    for counts in (None, counting([0])):
        peer = Worker("compiled", clock, [1.0], log, compilations=counts, must_compile=True)
        with pytest.raises(BenchmarkError, match="compiled nothing in 2 runs"):
            interleave(clock, peer, rounds=1)


def test_compiling_while_timed_is_refused() -> None:
    clock, log = Clock(), []
    worker = Worker("a", clock, [1.0], log, compilations=counting([3, 5]))
    with pytest.raises(BenchmarkError, match="a compiled 2 programs while it was timed"):
        interleave(clock, worker, rounds=1)
    steady = Worker("a", clock, [1.0], log, compilations=counting([3]), must_compile=True)
    assert len(interleave(clock, steady, rounds=4)["a"].seconds) == 4


def test_names_must_differ_and_rounds_must_be_positive() -> None:
    clock, log = Clock(), []
    a = Worker("a", clock, [1.0], log)
    with pytest.raises(ValueError, match="different names"):
        interleave(clock, a, a)
    with pytest.raises(ValueError, match="rounds=0"):
        interleave(clock, a, rounds=0)
    with pytest.raises(ValueError, match="no runs"):
        harness.quantile([], 0.5)


# --- Company ----------------------------------------------------------------------------------------------------------


def test_rounds_in_company_are_repeated_and_not_counted() -> None:
    clock, log = Clock(), []
    # Rounds 0 and 2 find others computing and take longer.
    worker = Worker("a", clock, [1.0, 1.0, 3.0, 1.1, 3.0, 1.2, 1.3], log)
    plain = worker.run

    def run(given: int) -> str:
        clock.busy = 0.5 if given in (WARM_UPS, WARM_UPS + 2) else 0.0
        output = plain(given)
        clock.busy = 0.0
        return output

    program = harness.Program("a", run)
    timing = harness.interleave(
        [program], lambda number: number, rounds=3, clock=clock, sleep=clock.pass_time, others=clock.others
    )["a"]
    assert timing.seconds == pytest.approx((1.1, 1.2, 1.3))
    assert timing.busy_cores == 0.0 and timing.quiet


def test_company_that_stays_is_told() -> None:
    clock, log = Clock(busy=0.8), []
    timing = interleave(clock, Worker("a", clock, [1.0], log), rounds=2, others=clock.others)["a"]
    assert timing.seconds == (1.0, 1.0)
    assert timing.busy_cores == pytest.approx(0.8) and not timing.quiet
    assert clock.now < harness.PATIENCE_S + 60  # it did not wait for ever


def test_company_that_comes_and_goes_costs_a_bounded_number_of_rounds() -> None:
    clock, log = Clock(), []

    def run(given: int) -> None:  # alone between the rounds, never in one
        log.append(given)
        clock.busy = 1.0
        clock.pass_time(1.0)
        clock.busy = 0.0

    timing = harness.interleave(
        [harness.Program("a", run)], lambda number: number, rounds=2, clock=clock, sleep=clock.pass_time,
        others=clock.others,
    )["a"]  # fmt: skip
    assert len(timing.seconds) == harness.TRIES * 2 == len(log) - WARM_UPS and not timing.quiet


def test_an_idle_machine_is_waited_for_before_the_first_round() -> None:
    clock, log = Clock(busy=1.0), []
    waits = []

    def sleep(seconds: float) -> None:
        clock.pass_time(seconds)
        if seconds == harness.LOOK_S:
            waits.append(clock.now)
            clock.busy = 1.0 if len(waits) < 5 else 0.0

    worker = Worker("a", clock, [1.0], log)
    timing = harness.interleave(
        [worker.program], lambda number: number, rounds=2, clock=clock, sleep=sleep, others=clock.others
    )["a"]
    assert len(waits) == 6 and timing.seconds == (1.0, 1.0) and timing.busy_cores == 0.0


def test_where_the_system_tells_nothing_every_round_counts() -> None:
    clock, log = Clock(busy=1.0), []
    for others in (None, lambda: None):
        timing = interleave(clock, Worker("a", clock, [1.0], log), rounds=3, others=others)["a"]
        assert len(timing.seconds) == 3 and timing.busy_cores is None and timing.quiet


def test_prompts_are_another_draw_for_every_run_and_never_zeros() -> None:
    draws = [harness.random_prompts((7, 4, number), 4, 50, 1000) for number in range(3)]
    assert all(np.shape(draw) == (4, 50) for draw in draws)
    assert len({str(row) for draw in draws for row in draw}) == 12
    assert all(0 <= token < 1000 for draw in draws for row in draw for token in row)
    assert all(len(set(row)) > 30 for draw in draws for row in draw)
    assert draws[1] == harness.random_prompts((7, 4, 1), 4, 50, 1000)
