"""Times several programs on one machine, interleaved: A B C, A B C, …, so that a slow minute meets all of them.

Programs and a source of inputs come in; per program the median with its 20th and 80th percentile, what the warm-up
took beyond that (compilation), and the ratio of any two come out. Every round has fresh inputs, the same for all.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# MEASURING: at least 20 runs, at least 5 where a run exceeds 2 s.
ROUNDS, ROUNDS_LONG, LONG_S = 20, 5, 2.0
# One run compiles; the second may still compile what depends on the first (torch's dynamic shapes) and fills caches.
WARM_UPS = 2
# Threads of one library spin for a few milliseconds after its last kernel, and would take cores from the next program.
PAUSE_S = 0.02
# A round in which other processes used more cores than this is not counted but repeated. Interleaving alone does not
# help: libraries suffer unlike. With another process on one of two cores torch took 3.3 s where it takes 0.33 s (its
# threads wait for each other after every operation) and our loop 0.37 s where it takes 0.33 s.
QUIET_CORES = 0.1
# So long, over all rounds, one waits for an idle machine before a round, looking for so long at a time; and so many times
# the wanted rounds are tried at most. Then busy rounds are taken, and told.
PATIENCE_S, LOOK_S, TRIES = 300.0, 0.5, 3


class BenchmarkError(ValueError):
    """A measurement that would not mean what its row says."""


class PeerAbsent(BenchmarkError):  # noqa: N818 - reads as what it is
    """A peer that this machine cannot run; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One side of a comparison.

    Attributes:
      name: "ours", or the peer's.
      run: the inputs of one run to its output. Returns when the work is done, not when it is dispatched.
      compilations: how many programs it has compiled so far; None where it compiles nothing. It must not grow while
        runs are timed.
      must_compile: whether the warm-up is expected to compile: a peer that is named for it, and silently does not, is
        refused.
      own_seconds: how long its last run took by its own clock, where it works in another process and the way there is
        not to count.
    """

    name: str
    run: Callable[[Any], Any]
    compilations: Callable[[], int] | None = None
    must_compile: bool = False
    own_seconds: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the timed runs of one program, in the order of the rounds, and what its warm-up took beyond them.

    Attributes:
      seconds: one per round.
      compile_s: seconds of the warm-up runs less as many median runs; not negative.
      busy_cores: that others used on average meanwhile; None where the system does not tell.
    """

    seconds: tuple[float, ...]
    compile_s: float
    busy_cores: float | None = None

    @property
    def quiet(self) -> bool:
        """Whether the machine was ours, as far as it tells."""
        return self.busy_cores is None or self.busy_cores <= QUIET_CORES

    @property
    def median(self) -> float:
        """Of the timed runs."""
        return quantile(self.seconds, 0.5)

    @property
    def p20(self) -> float:
        """A fifth of the runs took less."""
        return quantile(self.seconds, 0.2)

    @property
    def p80(self) -> float:
        """A fifth of the runs took more."""
        return quantile(self.seconds, 0.8)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How much longer a peer takes than we do: ratio of the medians, and percentiles of the ratios round by round."""

    median: float
    p20: float
    p80: float


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values lie below, interpolated linearly."""
    if not values:
        raise ValueError("no runs were timed; a quantile of nothing has no value")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def ratio(peer: Timing, ours: Timing) -> Ratio:
    """Peer over ours: above 1 we are faster.

    Raises:
      ValueError: the two were not timed in the same rounds.
    """
    if len(peer.seconds) != len(ours.seconds):
        raise ValueError(f"{len(peer.seconds)} runs against {len(ours.seconds)}: time both in the same call")
    each = [theirs / own for theirs, own in zip(peer.seconds, ours.seconds, strict=True)]
    return Ratio(peer.median / ours.median, quantile(each, 0.2), quantile(each, 0.8))


def rounds_for(longest_s: float) -> int:
    """How many rounds the protocol asks for where the slowest program takes so long."""
    return ROUNDS if longest_s <= LONG_S else ROUNDS_LONG


def interleave(
    programs: Sequence[Program],
    inputs: Callable[[int], Any],
    *,
    rounds: int | None = None,
    check: Callable[[Any, dict[str, Any]], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    others: Callable[[], float | None] | None = None,
) -> dict[str, Timing]:
    """Warms every program up, then times them round by round in the order given.

    Args:
      programs: with different names.
      inputs: number of a round, from 0, to its inputs; called for every round anew. The warm-ups take the first ones.
      rounds: how many rounds are timed; None: what the protocol asks for, by the slowest program's last warm-up.
      check: sees the inputs of each warm-up round and the outputs by program; raises what must not be timed.
      clock, sleep: seconds; replaced in tests.
      others: CPU seconds that other processes have used so far (`machine.others_cpu_s`), by which busy rounds are told
        apart and repeated; None: every round counts.

    Returns:
      The timing of each program, by name.

    Raises:
      BenchmarkError: a program compiled while it was timed, or did not compile though it is named for it.
    """
    if len({program.name for program in programs}) < len(programs) or not programs:
        raise ValueError(f"programs {[program.name for program in programs]} must have different names")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds={rounds}; at least one must be timed")

    def timed(program: Program, given: Any) -> tuple[Any, float]:
        sleep(PAUSE_S)
        began = clock()
        output = program.run(given)
        took = clock() - began
        return output, took if program.own_seconds is None else program.own_seconds()

    warm: dict[str, list[float]] = {program.name: [] for program in programs}
    for number in range(WARM_UPS):
        given, outputs = inputs(number), {}
        for program in programs:
            outputs[program.name], took = timed(program, given)
            warm[program.name].append(took)
        if check is not None:
            check(given, outputs)
    for program in programs:
        if program.must_compile and not (program.compilations and program.compilations()):
            raise BenchmarkError(
                f"{program.name} compiled nothing in {WARM_UPS} runs: it fell back to uncompiled code, and its row would "
                "be called what it is not; see its library's warnings above"
            )
    compiled = {program.name: program.compilations() for program in programs if program.compilations}
    count = rounds or rounds_for(max(times[-1] for times in warm.values()))

    def watched(work: Callable[[], Any]) -> tuple[Any, float | None]:
        """What `work` returns, and how many cores others used meanwhile."""
        before, began = others and others(), clock()
        output = work()
        after, elapsed = others and others(), clock() - began
        return output, None if before is None or after is None else max(0.0, after - before) / elapsed

    timed_rounds: list[_Round] = []
    waited = 0.0
    for number in range(WARM_UPS, WARM_UPS + TRIES * count):
        disturbed = others and not (timed_rounds and timed_rounds[-1].quiet)
        while disturbed and waited < PATIENCE_S and (watched(lambda: sleep(LOOK_S))[1] or 0.0) > QUIET_CORES:
            waited += LOOK_S
        given = inputs(number)
        timed_rounds.append(_Round(*watched(lambda given=given: [timed(program, given)[1] for program in programs])))
        out_of_patience = waited >= PATIENCE_S and len(timed_rounds) >= count
        if out_of_patience or sum(one.quiet for one in timed_rounds) == count:
            break
    for program in programs:
        if program.compilations and program.compilations() != compiled[program.name]:
            raise BenchmarkError(
                f"{program.name} compiled {program.compilations() - compiled[program.name]} programs while it was timed; "
                "its runs differ in shape, or its warm-up did not reach what it runs"
            )
    quiet = [one for one in timed_rounds if one.quiet]
    used = quiet if len(quiet) == count else timed_rounds
    shares = [one.busy_cores for one in used if one.busy_cores is not None]
    timings = {}
    for column, program in enumerate(programs):
        runs = tuple(one.seconds[column] for one in used)
        excess = sum(warm[program.name]) - WARM_UPS * quantile(runs, 0.5)
        timings[program.name] = Timing(runs, max(0.0, excess), sum(shares) / len(shares) if shares else None)
    return timings


@dataclasses.dataclass(frozen=True)
class _Round:
    """Seconds of each program, and the cores that others used meanwhile."""

    seconds: list[float]
    busy_cores: float | None

    @property
    def quiet(self) -> bool:
        return self.busy_cores is None or self.busy_cores <= QUIET_CORES


def say(text: str) -> None:
    """Progress for the terminal; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


def random_prompts(seed: Sequence[int], batch: int, length: int, vocab: int) -> list[list[int]]:
    """Uniform token ids, another draw for every seed: [batch][length]."""
    return np.random.default_rng(list(seed)).integers(0, vocab, (batch, length)).tolist()
