"""The episode engine: slots on devices, tools on the host, and neither waits for the other where it need not.

Conversations go in, finished ones come out. A finished episode frees its slot for the next; keys and values stay in the
slot across turns, so that a turn prefills only what is new. Slots stand in groups: while the devices decode one group, the
host executes the tool calls of another.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Literal

import jax
import numpy as np

from subl_jax.chat.rendering import Renderer
from subl_jax.metrics.flops import decode_step_bytes, kv_bytes_per_token
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.rollout import memory, stops
from subl_jax.rollout.conversation import ChatConversation, Conversation, Episode, SharedPrefix, Turn
from subl_jax.rollout.device import Report, Turns
from subl_jax.rollout.options import DEFAULT, EngineConfig
from subl_jax.rollout.programs import Programs, programs
from subl_jax.rollout.requests import Chunk, Kept, prefill_requests
from subl_jax.rollout.sampling import SamplingConfig
from subl_jax.rollout.statistics import RolloutStatistics
from subl_jax.rollout.tools import Outcome, ToolPool
from subl_jax.trajectory import CUT_OFF, FAILED, Trajectory

# How often the interpreter switches threads during a rollout. At its default of 5 ms one worker that computes in Python
# makes the thread that feeds the devices wait 7 ms each time it wants to go on (measured); at 0.5 ms it is 0.7 ms.
_SWITCH_S = 5e-4
# How long idle devices wait for the tools of a group of which less than half can run, in seconds.
_MOMENT_S = 0.02
# How often the host looks whether the devices are done while it waits for tools, in seconds.
_LOOK_S = 1e-3


@dataclasses.dataclass(eq=False)
class _Seat:
    """A conversation in a slot.

    Attributes:
      fed: its tokens in the cache.
      state: ready (a turn is to be prefilled), running (on the device), or tools (on the host).
    """

    conversation: Conversation[Any]
    replica: int
    slot: int
    fed: int = 0
    turn: int = 0
    pending: Turn | None = None
    state: Literal["ready", "running", "tools"] = "ready"


class _Group:
    """One group of slots on every replica, and the dispatch that is under way."""

    def __init__(self, programs: Programs) -> None:
        self.state = programs.slots()
        self.seats: list[list[_Seat | None]] = [[None] * programs.sampling.slots for _ in range(programs.replicas)]
        self.report: Report | None = None
        self.prefilled: list[jax.Array] = []
        self.ends: futures.Future[tuple[float, float]] | None = None  # of prefill and decoding
        self.dispatched = 0.0
        self.in_tools = 0
        self.full = False  # whether the dispatch under way left no slot free for want of episodes

    def occupied(self) -> list[_Seat]:
        """The seats that are taken."""
        return [seat for row in self.seats for seat in row if seat is not None]

    def ready(self) -> bool:
        """Whether the dispatch under way is over."""
        report: Any = self.report  # JAX exports its array class without this method
        return report is None or report.counts.is_ready()


class Engine:
    """One run: conversations in, finished conversations out."""

    def __init__(
        self,
        programs: Programs,
        params: Any,
        automaton: stops.StopAutomaton,
        options: EngineConfig,
        statistics: RolloutStatistics,
        *,
        seed: int,
        policy: int,
    ) -> None:
        """Takes a policy that is loaded (`Programs.load`); compiles what is not compiled yet."""
        self._programs, self._params, self._options = programs, params, options
        self._automaton = programs.place(automaton)
        # Keys take 32 bits of each name; a seed beyond int32 keeps its own.
        self._names = np.asarray([seed & 0xFFFFFFFF, policy & 0xFFFFFFFF], np.uint32).view(np.int32)
        self._statistics = statistics
        self._groups = [_Group(programs) for _ in range(options.groups)]
        self._kept, self._prefixes = programs.kept(), [Kept() for _ in range(programs.replicas)]
        self._opened: collections.deque[tuple[Conversation[Any], Turn]] = collections.deque()
        self._opening = 0
        self._exhausted = self._drained = self._used = False
        self._error: ValueError | None = None
        self._finished: list[Conversation[Any]] = []
        self._idle_since = time.perf_counter()  # when the devices last ran out of work
        config = programs.config
        item = np.dtype(config.compute_dtype).itemsize
        table = (
            0 if config.tie_embeddings else config.vocab_size * config.d_model * np.dtype(config.param_dtype).itemsize
        )
        self._weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - table
        self._kv_bytes = kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, item)

    # --- The loop -----------------------------------------------------------------------------------------------------

    def run(self, conversations: Iterable[Conversation[Any]]) -> Iterator[Conversation[Any]]:
        """Runs every conversation to its end and yields each as soon as it is over. An engine runs once.

        Raises:
          ValueError: a conversation asked for more than a slot holds; what was finished before is yielded first.
        """
        if self._used:
            raise RuntimeError("this engine has run; make another one, which compiles nothing")
        self._used = True
        options, waiting, counted = self._options, iter(conversations), self._statistics
        tools_before, wall_before = counted.tool_seconds, counted.wall_seconds
        with (
            ToolPool[Any](options.tool_workers, options.tool_timeout_s) as pool,
            futures.ThreadPoolExecutor(1, "clock") as self._clock,
            _switching(),
        ):
            self._prepare()
            self._idle_since = began = time.perf_counter()
            while True:
                for group in self._groups:
                    self._open(waiting, pool)
                    self._book(group, pool)
                    for _ in self._gather(group, pool):
                        yield from self._take_finished()  # before a wait in which they could be lost
                    self._fill(group)
                    self._dispatch(group)
                    counted.tool_seconds = tools_before + pool.busy_seconds
                    counted.wall_seconds = wall_before + time.perf_counter() - began
                    yield from self._take_finished()
                    if self._error is not None:
                        raise self._error
                # A call that the pool gave up, or an episode that failed, is an outcome too: nothing is waited for twice.
                if not self._exhausted or pool.outstanding or self._opened:
                    continue
                if not any(group.occupied() or group.report is not None for group in self._groups):
                    return

    def _take_finished(self) -> list[Conversation[Any]]:
        finished, self._finished = self._finished, []
        return finished

    def _prepare(self) -> None:
        """Compiles every program ahead, by calls that have nothing to do."""
        self._statistics.replicas = self._programs.replicas
        self._statistics.device_kind = self._programs.device_kind
        if not self._programs.missing(self._automaton):
            return
        known = len(self._programs.compilations)
        group = self._groups[0]
        for chunk in self._programs.chunks:
            request = prefill_requests(self._programs, chunk, [[] for _ in range(self._programs.replicas)])[0]
            group.state, _ = self._programs.prefill(self._params, group.state, request)
        request = self._prefixes[0].request(self._programs, [([], []) for _ in self._prefixes], 0)
        group.state, self._kept = self._programs.copy_prefixes(group.state, self._kept, request)
        group.state, report = self._programs.decode(self._params, self._automaton, group.state, self._turns(group))
        jax.block_until_ready(report)
        self._statistics.compilations += self._programs.compilations[known:]

    def _open(self, waiting: Iterator[Conversation[Any]], pool: ToolPool[Any]) -> None:
        """Keeps openings ahead of the free slots."""
        size = self._programs.replicas * self._programs.sampling.slots
        free = sum(size - len(group.occupied()) for group in self._groups)
        while not self._exhausted and self._opening + len(self._opened) < free + size // 4 + 1:
            conversation = next(waiting, None)
            if conversation is None:
                self._exhausted = True
            else:
                self._opening += 1
                pool.submit((None, None, conversation), conversation.open)

    def _book(self, group: _Group, pool: ToolPool[Any]) -> None:
        """Waits for the group's dispatch, and hands what was sampled to the tools."""
        if group.report is None:
            return
        began = max(group.dispatched, self._idle_since)
        report: Report = jax.device_get(group.report)
        assert group.ends is not None  # it was dispatched
        prefilled, ended = group.ends.result()
        prefilled = max(prefilled, began) if group.prefilled else began
        self._idle_since = max(ended, prefilled)
        self._account(group, report, prefilled - began, self._idle_since - prefilled)
        group.report = None
        for seat in group.occupied():
            if seat.state != "running" or report.running[seat.replica, seat.slot]:
                continue
            place = seat.replica, seat.slot
            count = int(report.counts[place])
            ids, logprobs = report.tokens[place][:count].tolist(), report.logprobs[place][:count].tolist()
            seat.fed += count - 1
            seat.turn += 1
            seat.state = "tools"
            group.in_tools += 1
            self._statistics.turns += 1
            self._statistics.sampled_tokens += count
            seat.conversation.sampled(ids, logprobs, bool(report.ended[place]))
            # The group by its number: a call that hangs keeps its key alive, and must not keep the group's arrays.
            pool.submit((self._groups.index(group), seat, seat.conversation), seat.conversation.respond)

    def _gather(self, group: _Group, pool: ToolPool[Any]) -> Iterator[None]:
        """Takes in what tools have answered; waits for them as long as the devices have other work, or none at all.

        With the devices idle it goes on as soon as half of what the group can run is runnable, or after a moment with
        less: slow tools must not keep the others from going on, and a dispatch of few slots wastes the rest. It yields
        before it waits with the devices idle.
        """
        idle = 0.0
        size = self._programs.replicas * self._programs.sampling.slots
        while True:
            self._commit(pool.collect(0.0))
            seats = group.occupied()
            free = size - len(seats)
            coming = min(free, self._opening + len(self._opened))
            missing = group.in_tools + min(free - min(free, len(self._opened)), self._opening)
            if not missing:
                return
            runnable = sum(seat.state != "tools" for seat in seats) + min(free, len(self._opened))
            others = [other for other in self._groups if other is not group and other.report is not None]
            if others and not all(other.ready() for other in others):
                self._commit(pool.collect(_LOOK_S))
                continue
            if others or 2 * runnable >= len(seats) + coming or (runnable and idle >= _MOMENT_S):
                return
            elsewhere = [seat for other in self._groups if other is not group for seat in other.occupied()]
            if not runnable and any(seat.state != "tools" for seat in elsewhere):
                return  # another group has something to run
            yield
            began = time.perf_counter()
            self._commit(pool.collect(_MOMENT_S if runnable else None))
            waited = time.perf_counter() - began
            idle += waited
            self._statistics.waiting_seconds += waited

    def _commit(self, outcomes: Sequence[Outcome[Any]]) -> None:
        """Takes over openings and responses; frees the slots of finished episodes."""
        for outcome in outcomes:
            number, seat, conversation = outcome.key  # type: ignore[misc]
            following, over = None, True
            if outcome.error is not None:
                conversation.fail(outcome.error)
            else:
                try:
                    following = conversation.commit(outcome.value)
                    self._check(conversation, following, 0 if seat is None else seat.fed)
                except ValueError as error:
                    self._error, following, over = self._error or error, None, False
            if seat is None:
                self._opening -= 1
                if following is not None:
                    self._opened.append((conversation, following))
            else:
                group = self._groups[number]
                group.in_tools -= 1
                if following is None:
                    group.seats[seat.replica][seat.slot] = None
                else:
                    seat.pending, seat.state = following, "ready"
            if following is None and over:
                self._finished.append(conversation)

    def _check(self, conversation: Conversation[Any], turn: Turn | None, fed: int) -> None:
        """Refuses a turn that its slot cannot hold: the programs would drop what does not fit."""
        if turn is None:
            return
        sampling, length = self._programs.sampling, fed + len(turn.tokens)
        room = 0 < turn.limit <= sampling.max_turn_tokens and length + turn.limit <= sampling.context
        if not turn.tokens or not room or not 0 <= turn.shared < len(turn.tokens):
            raise ValueError(
                f"episode {conversation.index}: a turn of {len(turn.tokens)} tokens ({turn.shared} shared) behind {fed}, with "
                f"{turn.limit} to come, does not fit max_turn_tokens={sampling.max_turn_tokens} and "
                f"context={sampling.context}; there must be a token that is not shared, and one to come"
            )

    def _fill(self, group: _Group) -> None:
        """Seats opened conversations in free slots, the emptiest replica first."""
        while self._opened:
            row = min(group.seats, key=lambda row: sum(seat is not None for seat in row))
            if None not in row:
                return
            conversation, opening = self._opened.popleft()
            replica, slot = group.seats.index(row), row.index(None)
            row[slot] = _Seat(conversation, replica, slot, pending=opening)

    # --- Dispatches ---------------------------------------------------------------------------------------------------

    def _dispatch(self, group: _Group) -> None:
        """Sends the group's new tokens, and lets it decode."""
        seats = [seat for seat in group.occupied() if seat.state != "tools"]
        if not seats:
            return
        turns = self._turns(group)  # before the pending turns are taken off their seats
        group.dispatched, group.prefilled = time.perf_counter(), []
        beginnings: list[list[Chunk]] = [[] for _ in range(self._programs.replicas)]
        rests: list[list[Chunk]] = [[] for _ in range(self._programs.replicas)]
        copies: list[tuple[list, list]] = [([], []) for _ in range(self._programs.replicas)]
        longest = 0
        for seat in seats:
            if seat.pending is None:
                continue
            tokens, _, shared = seat.pending
            if shared:
                # The prefix is computed by the first episode that has it, and copied from then on: to the same bits.
                known, place = self._prefixes[seat.replica].find(tuple(tokens[:shared]))
                if known:
                    self._statistics.shared_tokens += shared
                else:
                    beginnings[seat.replica].append(Chunk(seat.slot, 0, tokens[:shared]))
                    if place is not None:
                        copies[seat.replica][0].append((seat.slot, place))
                if known and place is not None:
                    copies[seat.replica][1].append((seat.slot, place))
                longest = max(longest, shared)
                seat.fed = shared
            rests[seat.replica].append(Chunk(seat.slot, seat.fed, tokens[shared:]))
            seat.fed += len(tokens) - shared
            seat.pending, seat.state = None, "running"
        self._prefill(group, beginnings)
        if longest:
            request = self._prefixes[0].request(self._programs, copies, longest)
            group.state, self._kept = self._programs.copy_prefixes(group.state, self._kept, request)
        self._prefill(group, rests)
        for kept in self._prefixes:
            kept.release()
        group.state, group.report = self._programs.decode(self._params, self._automaton, group.state, turns)
        group.ends = self._clock.submit(_ends, list(group.prefilled), group.report)
        size = self._programs.replicas * self._programs.sampling.slots
        left = not self._exhausted or self._opening or self._opened
        self._drained = self._drained or not (left or len(group.occupied()) == size)
        group.full = not self._drained

    def _prefill(self, group: _Group, chunks: list[list[Chunk]]) -> None:
        """Runs the passes that the chunks of all replicas need, longer chunks before shorter ones."""
        if not any(chunks):
            return
        for size, planned in Chunk.cut(chunks, self._programs.chunks):
            for request in prefill_requests(self._programs, size, planned):
                group.state, fed = self._programs.prefill(self._params, group.state, request)
                group.prefilled.append(fed)

    def _turns(self, group: _Group) -> Turns:
        """The turns that begin with the next dispatch, and when it is to return."""
        replicas, slots = self._programs.replicas, self._programs.sampling.slots
        begin = np.zeros((replicas, slots), bool)
        limit, episode, sample, turn = (np.zeros((replicas, slots), np.int32) for _ in range(4))
        for replica, row in enumerate(group.seats):
            for slot, seat in enumerate(row):
                if seat is not None and seat.pending is not None:
                    place = replica, slot
                    begin[place], limit[place] = True, seat.pending.limit
                    episode[place], sample[place] = seat.conversation.index, seat.conversation.sample
                    turn[place] = seat.turn
        seed, policy = (np.full(replicas, name, np.int32) for name in self._names)
        steps = np.full(replicas, self._steps(), np.int32)
        host: Any = (begin, limit, episode, sample, turn, seed, policy, steps)  # host arrays in the record
        return Turns(*host)

    def _steps(self) -> int:
        """How long the next dispatch goes on."""
        options, counted = self._options, self._statistics
        if options.patience == 1:
            return options.dispatch_steps
        # Before any turn has ended, half of what a turn may have.
        mean = counted.sampled_tokens / counted.turns if counted.turns else self._programs.sampling.max_turn_tokens / 2
        return min(max(round(options.patience * mean), 1), options.dispatch_steps)

    def _account(self, group: _Group, report: Report, prefill_s: float, decode_s: float) -> None:
        """Adds one dispatch to the statistics."""
        counted = self._statistics
        steps, occupied = report.steps, int(report.occupied.sum())
        slots = int(steps.sum()) * self._programs.sampling.slots
        counted.dispatches += 1
        counted.prefill_seconds += prefill_s
        counted.decode_seconds += decode_s
        counted.decode_steps += int(steps.max())
        counted.replica_steps += int(steps.sum())
        counted.running_slots += occupied
        counted.slots += slots
        if group.full:
            counted.full_running_slots += occupied
            counted.full_slots += slots
        read = int(steps.sum()) * decode_step_bytes(self._weight_bytes, [], 0)
        read += float(report.context.sum()) * self._kv_bytes
        counted.decode_bytes += read / self._options.tensor  # of one device of each replica
        counted.prefilled_tokens += sum(int(np.asarray(fed).sum()) for fed in group.prefilled)


def _ends(prefilled: Sequence[jax.Array], report: Report) -> tuple[float, float]:
    """When the devices had prefilled and when they had decoded. In a thread of its own: the host may look later."""
    for fed in prefilled:
        fed.block_until_ready()
    first = time.perf_counter()
    jax.block_until_ready(report)
    return first, time.perf_counter()


@contextlib.contextmanager
def _switching() -> Iterator[None]:
    """Makes threads take turns more often while a rollout runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def rollout(
    config: ModelConfig,
    params: decoder.Params,
    renderer: Renderer,
    episodes: Sequence[Episode],
    sampling: SamplingConfig,
    *,
    seed: int,
    policy: int = 0,
    devices: Sequence[Device] | None = None,
    options: EngineConfig = DEFAULT,
    statistics: RolloutStatistics | None = None,
    as_finished: bool = False,
) -> Iterator[Trajectory]:
    """Runs every episode to its end.

    At fixed `sampling` (its slots a number, not 0) an episode's tokens depend on (seed, policy, episode index, sample) and
    nothing else: not on the slot, the number of devices or processes, the other episodes, or how long tools took.

    Args:
      config, params: the policy; params are put on the devices once. Another call with other params of the same shapes
        (a student that learns) compiles nothing.
      renderer: tokenizer and chat template.
      episodes: what to run.
      sampling: how tokens are drawn, and limits.
      seed, policy: name the randomness; `policy` is the policy's version.
      devices: local devices to use; all by default.
      options: how it is run.
      statistics: filled in place if given.
      as_finished: yield each trajectory as soon as it is over, in no particular order.

    Yields:
      Trajectories, in the order of `episodes` unless `as_finished`. An episode whose environment raised, hung or returned
      too much is among them, with status tool_error or tool_timeout.

    Raises:
      ValueError: a task's opening exceeds the context; keys and values exceed the memory. As this is a generator, at the
        first episode that is asked for.
    """
    statistics = statistics if statistics is not None else RolloutStatistics()
    if not episodes:
        return
    devices = tuple(devices or jax.local_devices())
    sampling = memory.fitted(
        config, params, sampling, devices, groups=options.groups, kv_gib=options.kv_gib, tensor=options.tensor
    )
    compiled = programs(config, sampling, devices, options.tensor)
    automaton = stops.build(renderer.tokenizer, config.vocab_size, renderer.end_ids, sampling.stop)
    engine = Engine(compiled, compiled.load(params), automaton, options, statistics, seed=seed, policy=policy)
    prefixes = SharedPrefix(renderer)
    # Made one by one, so that no more worlds are alive than episodes are in flight.
    conversations = (
        ChatConversation(episode, renderer, sampling, prefixes, options.result_kib * 1024, position)
        for position, episode in enumerate(episodes)
    )
    held: dict[int, Trajectory] = {}
    following = 0
    for conversation in engine.run(conversations):
        trajectory: Trajectory = conversation.result()
        statistics.episodes += 1
        statistics.failed += trajectory.status in FAILED
        statistics.truncated += trajectory.status in CUT_OFF
        if as_finished:
            yield trajectory
            continue
        held[conversation.position] = trajectory  # type: ignore[attr-defined]
        while following in held:
            yield held.pop(following)
            following += 1
