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


def cached_mask(query_positions: Int[Array, "batch time"], capacity: int) -> Bool[Array, "batch time capacity"]:
    """A query at position p sees cache entries 0..p of its own slot."""
    return jnp.arange(capacity) <= query_positions[:, :, None]


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
