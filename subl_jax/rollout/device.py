"""The program that one device runs for one turn of its slots: prefill what is new, then decode until every slot stops.

It contains no collective, so under `jax.pmap` every device stops on its own. Keys and values stay on the device between
turns; the host sends only the new tokens and receives only the sampled ones.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subl_jax.models import decoder
from subl_jax.models.cache import Cache
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.rollout.sampling import SamplingConfig, draw, turn_key


class TurnRequest(NamedTuple):
    """What the host sends for one turn.

    Attributes:
      tokens: new ids of each slot, left-aligned; counts: how many of them are real (0 = the slot rests this turn).
      episode, sample, turn: the names that the slot's randomness is keyed by.
    """

    tokens: Int[Array, "slots pending"]
    counts: Int[Array, " slots"]
    episode: Int[Array, " slots"]
    sample: Int[Array, " slots"]
    turn: Int[Array, " slots"]


class TurnResult(NamedTuple):
    """What one turn produced: sampled ids, their log-probabilities, how many, and whether the end token was among them."""

    tokens: Int[Array, "slots turn_tokens"]
    logprobs: Float[Array, "slots turn_tokens"]
    counts: Int[Array, " slots"]
    ended: Bool[Array, " slots"]


class _Prefill(NamedTuple):
    cache: Cache
    last: Float[Array, "slots d_model"]  # hidden state of each slot's newest token
    offset: Int[Array, ""]  # pending tokens already consumed


class _Decode(NamedTuple):
    cache: Cache
    last: Float[Array, "slots d_model"]
    running: Bool[Array, " slots"]
    step: Int[Array, ""]
    result: TurnResult


def _feed(config: ModelConfig, params, cache: Cache, tokens: Array, valid: Array) -> tuple[Array, Cache]:
    """Appends valid tokens to their slots and returns the hidden states."""
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    hidden, extended = decoder.apply(config, params, {}, tokens, positions, valid.astype(jnp.int32), cache)
    assert extended is not None  # a cache came in
    return hidden, extended


def _prefill(config: ModelConfig, sampling: SamplingConfig, params, cache: Cache, request: TurnRequest) -> _Prefill:
    """Feeds the pending tokens in chunks of a fixed size, as many chunks as the longest slot needs."""
    chunk = sampling.prefill_chunk

    def body(state: _Prefill) -> _Prefill:
        tokens = jax.lax.dynamic_slice_in_dim(request.tokens, state.offset, chunk, axis=1)
        valid = state.offset + jnp.arange(chunk) < request.counts[:, None]
        hidden, cache = _feed(config, params, state.cache, tokens, valid)
        # The newest token of a slot is the one at counts - 1; it lies in this chunk or the earlier value stands.
        inside = request.counts - 1 - state.offset
        here = jnp.take_along_axis(hidden, jnp.clip(inside, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
        last = jnp.where(((inside >= 0) & (inside < chunk))[:, None], here, state.last)
        return _Prefill(cache, last, state.offset + chunk)

    last = jnp.zeros((request.tokens.shape[0], config.d_model), config.compute_dtype)
    return jax.lax.while_loop(
        lambda state: jnp.any(state.offset < request.counts), body, _Prefill(cache, last, jnp.zeros((), jnp.int32))
    )


def run_turn(
    config: ModelConfig,
    sampling: SamplingConfig,
    end_id: int,
    params: decoder.Params,
    cache: Cache,
    fresh: Bool[Array, ""],
    seed: Int[Array, ""],
    policy: Int[Array, ""],
    request: TurnRequest,
) -> tuple[Cache, TurnResult]:
    """One turn of all slots of one device.

    The end token that a slot samples is not fed back; the host sends it as the first pending token of the next turn.

    Args:
      config, sampling, end_id: static.
      params: the policy.
      cache: the slots' keys and values; `fresh` empties every slot first (a new wave of episodes).
      seed, policy: names of the randomness shared by all episodes.
      request: see `TurnRequest`; its pending width is a multiple of `sampling.prefill_chunk`.
    """
    cache = cache._replace(lengths=jnp.where(fresh, 0, cache.lengths))
    prefilled = _prefill(config, sampling, params, cache, request)
    head = decoder.head_matrix(config, params).astype(config.compute_dtype)
    keys = jax.vmap(functools.partial(turn_key, seed, policy))(request.episode, request.sample, request.turn)
    slots = request.tokens.shape[0]

    def body(state: _Decode) -> _Decode:
        scores = decoder.mask_padding(config, (state.last @ head).astype(jnp.float32))
        tokens, logprobs = draw(scores, keys, state.step, sampling.temperature)
        result = TurnResult(
            state.result.tokens.at[:, state.step].set(jnp.where(state.running, tokens, 0)),
            state.result.logprobs.at[:, state.step].set(jnp.where(state.running, logprobs, 0.0)),
            state.result.counts + state.running,
            state.result.ended | (state.running & (tokens == end_id)),
        )
        running = state.running & (tokens != end_id)
        hidden, cache = _feed(config, params, state.cache, tokens[:, None], running[:, None])
        return _Decode(cache, hidden[:, 0], running, state.step + 1, result)

    nothing = TurnResult(
        jnp.zeros((slots, sampling.max_turn_tokens), jnp.int32),
        jnp.zeros((slots, sampling.max_turn_tokens), jnp.float32),
        jnp.zeros((slots,), jnp.int32),
        jnp.zeros((slots,), bool),
    )
    final = jax.lax.while_loop(
        lambda state: jnp.any(state.running) & (state.step < sampling.max_turn_tokens),
        body,
        _Decode(prefilled.cache, prefilled.last, request.counts > 0, jnp.zeros((), jnp.int32), nothing),
    )
    return final.cache, final.result


@functools.cache
def compiled_turn(config: ModelConfig, sampling: SamplingConfig, end_id: int, devices: tuple[Device, ...]):
    """`run_turn` mapped over devices; params are given replicated (in_axes None), the cache is donated."""
    return jax.pmap(
        functools.partial(run_turn, config, sampling, end_id),
        in_axes=(None, 0, None, None, None, 0),
        donate_argnums=(1,),
        devices=devices,
    )
