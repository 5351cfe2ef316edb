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


# --- Rows of the batch that are slots of their own choosing -------------------------------------------------------------


@jax.jit
def feed_rows(params, tokens, counts, cache, rows):
    starts = cache.lengths.at[rows].get(mode="fill", fill_value=0)
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    valid = (jnp.arange(tokens.shape[1]) < counts[:, None]).astype(jnp.int32)
    return decoder.apply(CONFIG, params, {}, tokens, positions, valid, cache, rows=rows)


def begun(slots: int) -> kv.Cache:
    """A cache in which each slot has a beginning of its own length."""
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (slots, 5)).astype(np.int32)
    counts = 1 + jnp.arange(slots) % 5
    return feed(parameters(CONFIG), jnp.asarray(tokens), counts, kv.empty_cache(CONFIG, slots, CAPACITY))[1]


def test_rows_in_any_order_equal_feeding_all_slots():
    params, before, counts = parameters(CONFIG), begun(4), jnp.asarray([2, 0, 5, 1])
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, CONFIG.vocab_size, (4, 5)), jnp.int32)
    hidden, whole = feed(params, tokens, counts, before)
    rows = jnp.asarray([3, 9, 0, 2], jnp.int32)  # slot 1 has nothing to be fed, and its row is padding
    order = jnp.asarray([3, 1, 0, 2])
    picked, after = feed_rows(params, tokens[order], counts[order], before, rows)
    for row, slot in enumerate(order.tolist()):
        fed = int(counts[slot])
        np.testing.assert_allclose(picked[row, :fed], hidden[slot, :fed], atol=1e-5)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-5), after, whole)
    assert after.lengths.tolist() == whole.lengths.tolist()


@pytest.mark.parametrize("beyond", [4, 5, 2**31 - 1])
def test_a_row_beyond_the_slots_writes_nothing_even_if_it_claims_tokens(beyond):
    before = begun(4)
    tokens, counts = jnp.full((3, 5), 6, jnp.int32), jnp.full(3, 5)
    _, after = feed_rows(parameters(CONFIG), tokens, counts, before, jnp.full(3, beyond, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_a_slots_result_depends_on_no_other_row_to_the_bit():
    params, before, rng = parameters(CONFIG), begun(4), np.random.default_rng(5)
    own = rng.integers(0, CONFIG.vocab_size, 5)
    results = []
    for rows, place in (([2, 0, 1], 0), ([4, 4, 2], 2), ([3, 2, 4], 1)):
        tokens = rng.integers(0, CONFIG.vocab_size, (3, 5))
        tokens[place] = own
        hidden, after = feed_rows(
            params, jnp.asarray(tokens, jnp.int32), jnp.asarray([5, 4, 3]).at[place].set(4), before,
            jnp.asarray(rows, jnp.int32),
        )  # fmt: skip
        results.append((hidden[place, :4], [keys[2] for keys in after.keys], [values[2] for values in after.values]))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


@pytest.mark.parametrize("picked", [False, True], ids=["all slots", "rows"])
def test_unstacked_parameters_give_what_stacked_ones_do(picked):
    params, before = parameters(CONFIG), begun(3)
    unstacked = decoder.unstack(CONFIG, params)
    assert isinstance(unstacked["layers"], tuple) and len(unstacked["layers"]) == CONFIG.num_layers
    tokens, counts = jnp.asarray([[4, 9, 1, 2, 3]] * 3, jnp.int32), jnp.asarray([5, 1, 3])
    rows = (jnp.asarray([2, 1, 0]),) if picked else ()
    step = feed_rows if picked else feed
    left, right = (step(each, tokens, counts, before, *rows) for each in (params, unstacked))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), left, right)
