"""Decoding with the cache equals one pass over the whole conversation, whatever the neighbours do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.models import cache as kv
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from tests.models import numpy_llama
from tests.models.test_decoder import parameters

CONFIG = ModelConfig(29, 10, 2, 4, 2, 4, 13, tie_embeddings=False, init_scale=1.0)
CAPACITY = 17


@jax.jit
def feed(params, tokens, counts, cache):
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
    valid = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)
    return decoder.apply(CONFIG, params, {}, tokens, positions, valid, cache)


def test_cached_turns_equal_one_full_prefill_with_uneven_slots():
    params, rng = parameters(CONFIG), np.random.default_rng(0)
    head = np.asarray(decoder.head_matrix(CONFIG, params))
    cache = kv.empty_cache(CONFIG, 3, CAPACITY)
    written: list[list[int]] = [[], [], []]
    seen: list[list[np.ndarray]] = [[], [], []]
    # Slot 2 rests at first, slot 0 rests later; the last step fills slot 1 to the brim.
    for counts in ([5, 3, 0], [1, 4, 2], [1, 1, 1], [0, 5, 3], [2, 4, 5]):
        tokens = rng.integers(0, CONFIG.vocab_size, (3, 5)).astype(np.int32)
        hidden, cache = feed(params, jnp.asarray(tokens), jnp.asarray(counts), cache)
        for slot, count in enumerate(counts):
            written[slot] += tokens[slot, :count].tolist()
            seen[slot] += list(np.asarray(hidden)[slot, :count] @ head)
    assert cache.lengths.tolist() == [len(ids) for ids in written] == [9, 17, 11]
    for ids, logits in zip(written, seen, strict=True):
        np.testing.assert_allclose(
            np.stack(logits), numpy_llama.logits(CONFIG, params, np.asarray(ids)), rtol=1e-4, atol=1e-4
        )


def test_padding_writes_nothing_into_the_cache():
    params = parameters(CONFIG)
    cache = jax.tree.map(lambda buffer: jnp.full_like(buffer, 7), kv.empty_cache(CONFIG, 2, 6))
    cache = cache._replace(lengths=jnp.asarray([2, 6], jnp.int32))
    _, after = feed(params, jnp.ones((2, 3), jnp.int32), jnp.asarray([1, 0]), cache)
    for field in (*(jnp.swapaxes(keys, 2, 3) for keys in after.keys), *after.values):
        changed = np.asarray(field != 7).any(axis=(1, 3))
        assert changed.tolist() == [[False, False, True, False, False, False], [False] * 6]
    assert after.lengths.tolist() == [3, 6]


def test_what_an_earlier_episode_left_behind_is_not_seen():
    params = parameters(CONFIG)
    clean = kv.empty_cache(CONFIG, 1, 8)
    dirty = jax.tree.map(lambda buffer: buffer + 3.0, clean)._replace(lengths=clean.lengths)
    tokens, counts = jnp.asarray([[4, 9, 1]], jnp.int32), jnp.asarray([3])
    np.testing.assert_array_equal(feed(params, tokens, counts, clean)[0], feed(params, tokens, counts, dirty)[0])


@pytest.mark.parametrize("slots", [1, 4])
def test_an_empty_cache_holds_nothing(slots):
    cache = kv.empty_cache(CONFIG, slots, CAPACITY)
    assert cache.capacity == CAPACITY
    assert [buffer.shape for buffer in cache.keys] == [(slots, 2, 4, CAPACITY)] * 2
    assert [buffer.shape for buffer in cache.values] == [(slots, 2, CAPACITY, 4)] * 2
    assert cache.lengths.tolist() == [0] * slots
