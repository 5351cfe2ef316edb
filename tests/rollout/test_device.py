"""The program of one device holds no collective: devices stop on their own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax.models.cache import empty_cache
from subl_jax.parallel.devices import replicate
from subl_jax.rollout.device import TurnRequest, compiled_turn
from tests.rollout import policies

# Operations, as they are called in HLO text: "%name = type all-reduce(...)", alone or split into start and done.
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv)"
    r"(?:-start|-done)?\("
)
DEVICES = tuple(jax.local_devices()[:2])


def compiled_text(mapped, *arguments) -> str:
    return mapped.lower(*arguments).compile().as_text()


def test_the_compiled_turn_holds_no_collective():
    config, sampling = policies.CONFIG, policies.SAMPLING
    program = compiled_turn(config, sampling, policies.RENDERER.end_id, DEVICES)
    stacked = jax.tree.map(lambda x: np.stack([x] * 2), empty_cache(config, sampling.slots, sampling.context))
    slots = jnp.zeros((2, sampling.slots), jnp.int32)
    request = TurnRequest(jnp.zeros((2, sampling.slots, 208), jnp.int32), slots, slots, slots, slots)
    params = replicate(policies.scripted("a<|end|>"), DEVICES)
    text = compiled_text(program, params, stacked, jnp.asarray(True), jnp.int32(0), jnp.int32(0), request)
    assert text.count("while(") >= 2  # prefill and decode are in there
    assert not COLLECTIVE.findall(text)


def test_the_search_would_find_a_collective():
    # The same loop with its stop agreed upon between devices: what automatic partitioning makes of it.
    def loop(x):
        def unfinished(x):
            return jax.lax.psum(jnp.any(x < 9).astype(jnp.int32), "d") > 0

        return jax.lax.while_loop(unfinished, lambda x: x + 1, x)

    text = compiled_text(jax.pmap(loop, axis_name="d", devices=DEVICES), jnp.zeros((2, 3)))
    assert COLLECTIVE.findall(text)
