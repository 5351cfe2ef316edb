"""Attention to a cache against float64 NumPy, read whole and in blocks, and independent of the neighbours' lengths."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.models import attention

# Capacity 35: read whole at the usual block, and at 8 in five blocks of which the last overlaps the fourth.
CAPACITY, DIM = 35, 6
BLOCKS = [attention.BLOCK, 8]


@functools.cache
def compiled(block: int) -> Any:
    """`attend_cached` at a block size, which is read while it is traced: one function each, with traces of its own."""
    return jax.jit(lambda *arguments: attention.attend_cached(*arguments))


def attend(block: int, queries, keys, values, positions, window=None) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        limit = None if window is None else jnp.int32(window)
        mixed = compiled(block)(*map(jnp.asarray, (queries, keys, values, positions)), limit)
        return np.asarray(mixed.astype(jnp.float32))


def inputs(
    batch: int, time: int, heads: int, kv_heads: int, spread: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Queries, keys and values in float32, and the rows' positions: unlike lengths, one of them to the last entry."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(batch, kv_heads, DIM, CAPACITY)) * spread
    values = rng.normal(size=(batch, kv_heads, CAPACITY, DIM))
    queries = rng.normal(size=(batch, time, heads, DIM)) * spread
    starts = np.linspace(0, CAPACITY - time, batch).astype(np.int32)
    floats = [each.astype(np.float32) for each in (queries, keys, values)]
    return *floats, starts[:, None] + np.arange(time, dtype=np.int32)


def exact(queries, keys, values, positions, window=None) -> np.ndarray:
    """One query at a time, in float64."""
    result = np.zeros(queries.shape)
    shared = queries.shape[2] // keys.shape[1]
    for row, time, head in np.ndindex(*queries.shape[:3]):
        end = positions[row, time] + 1
        seen = slice(max(end - window, 0) if window else 0, end)
        matrix, mixed = (part[row, head // shared].astype(np.float64) for part in (keys, values))
        scores = queries[row, time, head].astype(np.float64) @ matrix[:, seen] / np.sqrt(DIM)
        weights = np.exp(scores - scores.max())
        result[row, time, head] = weights / weights.sum() @ mixed[seen]
    return result


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("window", [None, 0, 1, 5, 11])
@pytest.mark.parametrize(("time", "heads", "kv_heads"), [(1, 6, 2), (7, 4, 1), (12, 4, 4)])
def test_attention_to_a_cache_equals_float64(block, window, time, heads, kv_heads):
    arguments = inputs(4, time, heads, kv_heads)
    np.testing.assert_allclose(
        attend(block, *arguments, window=window), exact(*arguments, window=window), atol=2e-6, rtol=2e-5
    )


@pytest.mark.parametrize("capacity", [25, 31, 32])
def test_blocks_cover_every_capacity(capacity):
    queries, keys, values, _ = inputs(3, 2, 4, 2)
    positions = np.asarray([[0, 1], [capacity // 2, capacity // 2 + 1], [capacity - 2, capacity - 1]], np.int32)
    arguments = queries, keys[..., :capacity], values[:, :, :capacity], positions
    np.testing.assert_allclose(attend(8, *arguments), exact(*arguments), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_large_scores_neither_overflow_nor_lose_the_small_ones(block):
    arguments = inputs(4, 3, 4, 2, spread=30.0)
    np.testing.assert_allclose(attend(block, *arguments), exact(*arguments), atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("window", [None, 5])
def test_entries_behind_a_query_do_not_count(block, window):
    queries, keys, values, positions = inputs(4, 3, 4, 2)
    dirty_keys, dirty_values = keys.copy(), values.copy()
    for row, length in enumerate(positions[:, -1] + 1):
        dirty_keys[row, :, :, length:] = 1e3
        dirty_values[row, :, length:] = -1e3
    np.testing.assert_array_equal(
        attend(block, queries, keys, values, positions, window),
        attend(block, queries, dirty_keys, dirty_values, positions, window),
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("time", [1, 4])
def test_a_row_is_the_same_to_the_bit_whatever_its_neighbours_lengths_are(time, window):
    queries, keys, values, positions = inputs(4, time, 4, 2)
    rows = np.arange(4)[:, None]
    for others in (0, 9, CAPACITY - time):
        moved = np.where(rows == 1, positions, others + np.arange(time)).astype(np.int32)
        left, right = (attend(8, queries, keys, values, each, window)[1] for each in (positions, moved))
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("block", BLOCKS)
def test_padding_that_would_lie_beyond_the_capacity_gives_finite_values(block):
    queries, keys, values, positions = inputs(2, 4, 4, 2)
    beyond = positions + np.asarray([[0], [20]], np.int32)
    for window in (None, 3):
        assert np.isfinite(attend(block, queries, keys, values, beyond, window)).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_a_cache_in_bfloat16_is_as_close_as_its_digits(block):
    queries, keys, values, positions = inputs(4, 3, 6, 2)
    rounded = [jnp.asarray(each, jnp.bfloat16) for each in (queries, keys, values)]
    left = attend(block, rounded[0], rounded[1], rounded[2], positions, 11)
    exactly = [np.asarray(each.astype(jnp.float32)) for each in rounded]
    right = exact(exactly[0], exactly[1], exactly[2], positions, 11)
    # Weights and the result have eight bits; the values are of size 1.
    np.testing.assert_allclose(left, right, atol=2**-6)
