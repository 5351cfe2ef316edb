"""What one device runs for its slots: copy a shared prefix, prefill what is new, decode for a bounded number of steps.

The programs contain no collective, so under `jax.pmap` every device stops on its own. Keys and values stay on the device
for as long as an episode lives; the host sends new tokens and receives sampled ones.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from subl_jax.models import decoder
from subl_jax.models.cache import Cache, empty_cache
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout
from subl_jax.rollout import stops
from subl_jax.rollout.sampling import CIPHER, SamplingConfig, draw, turn_key
from subl_jax.rollout.stops import StopAutomaton

# Tokens that are copied at a time where a prefix goes from one slot to another.
COPIED = 64


class Slots(NamedTuple):
    """The slots of one group on one device; it never leaves the device.

    Attributes:
      cache: keys and values of every slot's episode so far.
      last: hidden state of each slot's newest token, from which the next one is drawn.
      running: whether the slot is in the middle of a turn.
      steps: tokens sampled in the turn; limit: how many there may be.
      keys: the turn's randomness, as key data.
      stop: state of the stop automaton.
      tokens, logprobs: what the turn has sampled.
    """

    cache: Cache
    last: Float[Array, "slots d_model"]
    running: Bool[Array, " slots"]
    steps: Int[Array, " slots"]
    limit: Int[Array, " slots"]
    keys: UInt32[Array, "slots words"]
    stop: Int[Array, " slots"]
    tokens: Int[Array, "slots turn_tokens"]
    logprobs: Float[Array, "slots turn_tokens"]


class Prefill(NamedTuple):
    """Passes over new tokens. Row r of pass p appends `counts` tokens to slot `slots` from position `starts` on.

    Attributes:
      passes: how many of the passes are to be run, the first ones.
      slots: slot of each row; a row beyond the slots is padding.
    """

    passes: Int[Array, ""]
    slots: Int[Array, "passes rows"]
    starts: Int[Array, "passes rows"]
    counts: Int[Array, "passes rows"]
    tokens: Int[Array, "passes rows chunk"]


class Copies(NamedTuple):
    """Which prefixes are kept and which are handed out: `saves` of the first list, then `loads` of the second.

    Attributes:
      length: tokens of the longest prefix among them, the range that is copied.
    """

    saves: Int[Array, ""]
    saved_slot: Int[Array, " kept"]
    saved_place: Int[Array, " kept"]
    loads: Int[Array, ""]
    loaded_slot: Int[Array, " slots"]
    loaded_place: Int[Array, " slots"]
    length: Int[Array, ""]


class Turns(NamedTuple):
    """The turns that begin, and how long the program may go on.

    Attributes:
      begin: slots whose turn begins; limit: its tokens at most.
      episode, sample, turn: the names that its randomness is keyed by.
      seed, policy: names shared by all episodes.
      steps: after so many the program returns; earlier if every slot has stopped.
    """

    begin: Bool[Array, " slots"]
    limit: Int[Array, " slots"]
    episode: Int[Array, " slots"]
    sample: Int[Array, " slots"]
    turn: Int[Array, " slots"]
    seed: Int[Array, ""]
    policy: Int[Array, ""]
    steps: Int[Array, ""]


class Report(NamedTuple):
    """What the host gets back.

    Attributes:
      running: slots that go on in the next call; the others' turns are complete.
      counts, tokens, logprobs: what each slot's turn has sampled so far.
      ended: whether a stop was sampled; a turn that is over without one has reached its limit.
      steps: decode steps of this call; occupied: running slots summed over them; context: tokens they attended to.
    """

    running: Bool[Array, " slots"]
    counts: Int[Array, " slots"]
    tokens: Int[Array, "slots turn_tokens"]
    logprobs: Float[Array, "slots turn_tokens"]
    ended: Bool[Array, " slots"]
    steps: Int[Array, ""]
    occupied: Int[Array, ""]
    context: Float[Array, ""]


def empty_slots(config: ModelConfig, sampling: SamplingConfig) -> Slots:
    """Slots that rest."""
    slots, turn = sampling.slots, (sampling.slots, sampling.max_turn_tokens)
    words = 2  # of a key
    return Slots(
        cache=empty_cache(config, slots, sampling.context),
        last=jnp.zeros((slots, config.d_model), config.compute_dtype),
        running=jnp.zeros((slots,), bool),
        steps=jnp.zeros((slots,), jnp.int32),
        limit=jnp.zeros((slots,), jnp.int32),
        keys=jnp.zeros((slots, words), jnp.uint32),
        stop=jnp.zeros((slots,), jnp.int32),
        tokens=jnp.zeros(turn, jnp.int32),
        logprobs=jnp.zeros(turn, jnp.float32),
    )


def prefill(
    config: ModelConfig, layout: Layout | None, params: decoder.Params, state: Slots, request: Prefill
) -> tuple[Slots, Int[Array, ""]]:
    """Appends new tokens to their slots, and returns how many they were.

    Every pass has the same shape, so that an episode's floats depend neither on the rows beside it nor on their number.
    """
    chunk = request.tokens.shape[2]

    def run(index: Int[Array, ""], state: Slots) -> Slots:
        rows, starts, counts = request.slots[index], request.starts[index], request.counts[index]
        positions = starts[:, None] + jnp.arange(chunk)
        valid = (jnp.arange(chunk) < counts[:, None]).astype(jnp.int32)
        cache = state.cache._replace(lengths=state.cache.lengths.at[rows].set(starts, mode="drop"))
        hidden, cache = decoder.apply(
            config, params, {}, request.tokens[index], positions, valid, cache, layout=layout, rows=rows
        )
        assert cache is not None  # one came in
        newest = hidden[jnp.arange(rows.shape[0]), jnp.maximum(counts - 1, 0)]
        return state._replace(cache=cache, last=state.last.at[rows].set(newest, mode="drop"))

    asked = (jnp.arange(request.counts.shape[0]) < request.passes)[:, None]
    return jax.lax.fori_loop(0, request.passes, run, state), jnp.sum(jnp.where(asked, request.counts, 0))


def copy_prefixes(state: Slots, kept: Cache, request: Copies) -> tuple[Slots, Cache]:
    """Keeps the beginnings of some slots, and writes kept ones into others. Copies are exact."""

    def blocks(source: Cache, target: Cache, here: Int[Array, ""], there: Int[Array, ""]) -> Cache:
        # Positions lie last in the keys and third in the values.
        def copy(buffer: Array, other: Array, axis: int, index: Int[Array, ""]) -> Array:
            sizes = [1, *buffer.shape[1:]]
            sizes[axis] = min(COPIED, buffer.shape[axis])
            at = [jnp.int32(0)] * buffer.ndim
            at[axis] = index * COPIED  # clamped alike on both sides where the capacity ends
            piece = jax.lax.dynamic_slice(buffer, [here, *at[1:]], sizes)
            return jax.lax.dynamic_update_slice(other, piece, [there, *at[1:]])

        def body(index: Int[Array, ""], target: Cache) -> Cache:
            keys = tuple(copy(*pair, 3, index) for pair in zip(source.keys, target.keys, strict=True))
            values = tuple(copy(*pair, 2, index) for pair in zip(source.values, target.values, strict=True))
            return Cache(keys, values, target.lengths)

        return jax.lax.fori_loop(0, (request.length + COPIED - 1) // COPIED, body, target)

    kept = jax.lax.fori_loop(
        0,
        request.saves,
        lambda n, kept: blocks(state.cache, kept, request.saved_slot[n], request.saved_place[n]),
        kept,
    )
    cache = jax.lax.fori_loop(
        0,
        request.loads,
        lambda n, cache: blocks(kept, cache, request.loaded_place[n], request.loaded_slot[n]),
        state.cache,
    )
    return state._replace(cache=cache), kept


class _Loop(NamedTuple):
    state: Slots
    steps: Int[Array, ""]
    occupied: Int[Array, ""]
    context: Float[Array, ""]


def decode(
    config: ModelConfig,
    sampling: SamplingConfig,
    layout: Layout | None,
    params: decoder.Params,
    automaton: StopAutomaton,
    state: Slots,
    request: Turns,
) -> tuple[Slots, Report]:
    """Begins turns, and advances all running slots until all have stopped or the steps are used up.

    The last token of a turn is not fed back; the host sends it as the first token of the next turn's prefill.

    Args:
      config, sampling, layout: static.
      params: the policy, its layers unstacked.
      automaton: which tokens end a turn.
      state: donated.
      request: see `Turns`.
    """
    slots = jnp.arange(sampling.slots)
    begun = jax.vmap(lambda *names: jax.random.key_data(turn_key(request.seed, request.policy, *names)))(
        request.episode, request.sample, request.turn
    )
    state = state._replace(
        running=state.running | request.begin,
        steps=jnp.where(request.begin, 0, state.steps),
        limit=jnp.where(request.begin, request.limit, state.limit),
        keys=jnp.where(request.begin[:, None], begun, state.keys),
        stop=jnp.where(request.begin, 0, state.stop),
    )
    keys = jax.random.wrap_key_data(state.keys, impl=CIPHER)

    def body(loop: _Loop) -> _Loop:
        state = loop.state
        scores = decoder.logits(config, params, state.last, layout)
        split = layout is not None and layout.split("vocab") > 1
        tokens, logprobs = draw(scores, keys, state.steps, sampling, split=split)
        # Past the end of the buffer for slots that rest: such a write is dropped.
        place = jnp.where(state.running, state.steps, sampling.max_turn_tokens)
        stop = jnp.where(state.running, stops.step(automaton, state.stop, tokens), state.stop)
        steps = state.steps + state.running
        running = state.running & ~stops.stopped(automaton, stop) & (steps < state.limit)
        hidden, cache = decoder.apply(
            config, params, {}, tokens[:, None], state.cache.lengths[:, None], running[:, None].astype(jnp.int32),
            state.cache, layout=layout,
        )  # fmt: skip
        assert cache is not None
        advanced = state._replace(
            cache=cache,
            last=hidden[:, 0],
            running=running,
            steps=steps,
            stop=stop,
            tokens=state.tokens.at[slots, place].set(tokens, mode="drop"),
            logprobs=state.logprobs.at[slots, place].set(logprobs, mode="drop"),
        )
        attended = jnp.sum(jnp.where(state.running, cache.lengths, 0), dtype=jnp.float32)
        return _Loop(
            advanced, loop.steps + 1, loop.occupied + jnp.sum(state.running, dtype=jnp.int32), loop.context + attended
        )

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return jnp.any(loop.state.running) & (loop.steps < request.steps)

    zero = jnp.zeros((), jnp.int32)
    final = jax.lax.while_loop(unfinished, body, _Loop(state, zero, zero, jnp.zeros((), jnp.float32)))
    state = final.state
    report = Report(
        state.running, state.steps, state.tokens, state.logprobs, stops.stopped(automaton, state.stop),
        final.steps, final.occupied, final.context,
    )  # fmt: skip
    return state, report
