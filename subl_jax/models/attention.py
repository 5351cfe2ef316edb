"""Rotary embedding and masked grouped-query attention, in float32 softmax. Queries, keys and a mask in; values out."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from subl_jax.models.config import ModelConfig


def frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Rotary frequencies in radians per token, with Llama 3's scaling where the configuration has it.

    Wavelengths beyond original_context / low_freq are stretched by the factor, those below original_context /
    high_freq stay, and between the two the frequency is interpolated (Llama 3.1 model card; `rope_type: llama3`).
    """
    half = config.head_dim // 2
    plain = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factor == 1.0:
        return plain
    turns = config.rope_original_context * plain / (2 * math.pi)  # of the whole original context
    kept = jnp.clip((turns - config.rope_low_freq) / (config.rope_high_freq - config.rope_low_freq), 0.0, 1.0)
    return plain * (kept + (1 - kept) / config.rope_factor)


def rotary(
    x: Float[Array, "batch time heads dim"], positions: Int[Array, "batch time"], frequency: Float[Array, " half"]
) -> Float[Array, "batch time heads dim"]:
    """Rotates the two halves of each head by position (RoPE, Su et al. 2104.09864, in the half-split layout of Llama)."""
    angle = positions[..., None].astype(jnp.float32) * frequency  # [batch, time, half]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def within(window: int | Int[Array, ""], ahead: Int[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether a key `ahead` tokens before its query lies in the query's window; window 0 is unlimited."""
    return (jnp.asarray(window) == 0) | (ahead < window)


def packed_mask(segments: Int[Array, "batch time"]) -> Bool[Array, "batch time time"]:
    """Causal mask inside each packed document; segment 0 is padding.

    Padding attends to padding, so that no softmax row is empty; nothing else sees it.
    """
    time = segments.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attend(
    queries: Float[Array, "batch time heads dim"],
    keys: Float[Array, "batch source kv_heads dim"],
    values: Float[Array, "batch source kv_heads dim"],
    mask: Bool[Array, "batch time source"],
) -> Float[Array, "batch time heads dim"]:
    """Softmax attention; each key/value head serves heads // kv_heads query heads. Softmax runs in float32."""
    batch, time, heads, dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, time, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(batch, time, heads, dim)


# Keys that attention to a cache reads at a time. Capacities up to three blocks are read whole: measured on two cores at a
# capacity of 192 and 16 slots, a loop over blocks of 64 made a decode step half again as long as reading everything did.
BLOCK = 256
# Up to here a cache is read whole, and can be differentiated in reverse: the loop over blocks cannot.
WHOLE = 3 * BLOCK


def attend_cached(
    queries: Float[Array, "batch time heads dim"],
    keys: Float[Array, "batch kv_heads dim capacity"],
    values: Float[Array, "batch kv_heads capacity dim"],
    positions: Int[Array, "batch time"],
    window: Int[Array, ""] | None,
) -> Float[Array, "batch time heads dim"]:
    """Softmax attention to a cache, with `attend`'s conventions: a query at position p sees entries 0..p of its slot.

    A long cache is read in blocks up to the longest slot (online softmax, Milakov and Gimelshein 1805.02867). A block that
    lies beyond a slot's own length changes nothing of its result, to the bit: floats do not depend on the neighbours.

    Args:
      queries: of the new tokens, whose keys and values are in the cache already.
      keys, values: one layer of the cache.
      positions: of the queries.
      window: how many keys a query sees at most; None or 0 for all.
    """
    batch, time, heads, dim = queries.shape
    kv_heads, capacity = keys.shape[1], keys.shape[3]
    # Queries of one key/value head as rows of one matrix: with the dimensions left apart, XLA's CPU backend took 4.2 ms
    # where it takes 0.9 (6 layers, 16 slots, capacity 192).
    rows = time * heads // kv_heads
    grouped = jnp.moveaxis(queries.reshape(batch, time, kv_heads, -1, dim), 1, 2).reshape(batch, kv_heads, rows, dim)
    places = jnp.repeat(positions, heads // kv_heads, axis=1)[:, None, :, None]  # of each row
    lowest = jnp.finfo(jnp.float32).min

    def scored(block: Array, start: Int[Array, ""] | int) -> tuple[Array, Array]:
        """Scores `[batch, kv_heads, rows, source]` of a block of keys, and which of them count."""
        scores = jnp.einsum("bkqd,bkds->bkqs", grouped, block, preferred_element_type=jnp.float32) * dim**-0.5
        ahead = places - (start + jnp.arange(block.shape[3]))
        return scores, ahead >= 0 if window is None else (ahead >= 0) & within(window, ahead)

    def ungrouped(mixed: Array) -> Array:
        parts = mixed.astype(values.dtype).reshape(batch, kv_heads, time, heads // kv_heads, dim)
        return jnp.moveaxis(parts, 2, 1).reshape(batch, time, heads, dim)

    if capacity <= WHOLE:
        scores, seen = scored(keys, 0)
        weights = jax.nn.softmax(jnp.where(seen, scores, lowest), axis=-1).astype(values.dtype)
        return ungrouped(jnp.einsum("bkqs,bksd->bkqd", weights, values))

    def fold(index: Int[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = state
        # The last block may reach beyond the end; it is read from where it fits, and what was seen before is masked.
        start = jnp.minimum(index * BLOCK, capacity - BLOCK)
        scores, seen = scored(jax.lax.dynamic_slice_in_dim(keys, start, BLOCK, 3), start)
        seen &= start + jnp.arange(BLOCK) >= index * BLOCK
        raised = jnp.maximum(highest, jnp.max(jnp.where(seen, scores, lowest), axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - raised[..., None]), 0.0)
        shrink = jnp.exp(highest - raised)
        part = jax.lax.dynamic_slice_in_dim(values, start, BLOCK, 2)
        added = jnp.einsum("bkqs,bksd->bkqd", weights.astype(values.dtype), part, preferred_element_type=jnp.float32)
        return raised, total * shrink + jnp.sum(weights, axis=-1), mixed * shrink[..., None] + added

    shape = (batch, kv_heads, rows)
    start = (jnp.full(shape, lowest), jnp.zeros(shape), jnp.zeros((*shape, dim)))
    blocks = jnp.minimum(jnp.max(positions), capacity - 1) // BLOCK + 1
    _, total, mixed = jax.lax.fori_loop(0, blocks, fold, start)
    # At least 1 where a query sees anything: padding beyond the capacity may see nothing, and must not become NaN.
    return ungrouped(mixed / jnp.maximum(total, 1.0)[..., None])
