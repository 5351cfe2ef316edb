"""The KV cache: one buffer for all layers, with a length of its own for every slot, so that slots advance unevenly."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subl_jax.models.config import ModelConfig


class Cache(NamedTuple):
    """Keys and values of every layer, and how many tokens each slot holds."""

    keys: Float[Array, "layers slots capacity kv_heads dim"]
    values: Float[Array, "layers slots capacity kv_heads dim"]
    lengths: Int[Array, " slots"]

    @property
    def capacity(self) -> int:
        """Tokens a slot can hold."""
        return self.keys.shape[2]


def empty_cache(config: ModelConfig, slots: int, capacity: int) -> Cache:
    """A cache with no tokens in any slot, in the dtype that the model computes in."""
    shape, dtype = (config.num_layers, slots, capacity, config.num_kv_heads, config.head_dim), config.compute_dtype
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((slots,), jnp.int32))


def write(
    buffer: Float[Array, "layers slots capacity kv_heads dim"],
    layer: Int[Array, ""],
    new: Float[Array, "slots time kv_heads dim"],
    positions: Int[Array, "slots time"],
    valid: Int[Array, "slots time"],
) -> Float[Array, "layers slots capacity kv_heads dim"]:
    """Writes one layer's new keys or values at their positions; tokens with valid == 0 are not written."""
    # An index past the end is dropped by the scatter: that is how padding leaves no trace.
    target = jnp.where(valid > 0, positions, buffer.shape[2])
    slots = jnp.arange(buffer.shape[1])[:, None]
    return buffer.at[layer, slots, target].set(new.astype(buffer.dtype), mode="drop")
