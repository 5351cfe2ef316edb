"""The decoder as a pure function: parameters and tokens in, hidden states and cache out.

The vocabulary head is not applied here: the losses and the samplers own it (`head_matrix`), so that nobody is forced
to materialise `[batch, time, vocab]`. Parameters are a plain pytree whose layers are stacked on a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int

from subl_jax.models import attention
from subl_jax.models.cache import Cache, write
from subl_jax.models.config import ModelConfig

Params = Mapping[str, Any]


class _Carry(NamedTuple):
    """What runs through the layers: the residual stream and, when decoding, the whole cache (written in place)."""

    x: Float[Array, "batch time d_model"]
    keys: Float[Array, "layers batch capacity kv_heads dim"] | None
    values: Float[Array, "layers batch capacity kv_heads dim"] | None


class _RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


class _Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, carry: _Carry, layer: Array, positions: Array, segments: Array, mask: Array):
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, name=name, dtype=carry.x.dtype)

        def heads(x: Array, count: int) -> Array:
            return x.reshape(*x.shape[:2], count, config.head_dim)

        # Attention
        normed = _RMSNorm(config.rms_eps, name="attention_norm")(carry.x)
        queries = heads(dense(config.num_heads * config.head_dim, "q")(normed), config.num_heads)
        keys = heads(dense(config.num_kv_heads * config.head_dim, "k")(normed), config.num_kv_heads)
        values = heads(dense(config.num_kv_heads * config.head_dim, "v")(normed), config.num_kv_heads)
        queries = attention.rotary(queries, positions, config.rope_theta)
        keys = attention.rotary(keys, positions, config.rope_theta)
        cache_keys, cache_values = carry.keys, carry.values
        if cache_keys is not None and cache_values is not None:
            cache_keys = write(cache_keys, layer, keys, positions, segments)
            cache_values = write(cache_values, layer, values, positions, segments)
            keys, values = cache_keys[layer], cache_values[layer]
        mixed = attention.attend(queries, keys, values, mask)
        mixed = dense(config.d_model, "o")(mixed.reshape(*mixed.shape[:2], -1))
        x = carry.x + nn.Dropout(config.dropout, deterministic=self.deterministic)(mixed)

        # SwiGLU
        normed = _RMSNorm(config.rms_eps, name="mlp_norm")(x)
        gated = nn.silu(dense(config.d_ff, "gate")(normed)) * dense(config.d_ff, "up")(normed)
        x = x + nn.Dropout(config.dropout, deterministic=self.deterministic)(dense(config.d_model, "down")(gated))
        return _Carry(x, cache_keys, cache_values), None


class _Decoder(nn.Module):
    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(self, tokens: Array, positions: Array, segments: Array, mask: Array, cache: Cache | None):
        config = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(config.init_scale), (config.vocab_size, config.d_model)
        )
        if not config.tie_embeddings:
            self.param("head", nn.initializers.lecun_normal(), (config.d_model, config.vocab_size))
        carry = _Carry(embedding[tokens], cache and cache.keys, cache and cache.values)
        layers = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast, nn.broadcast, nn.broadcast)),
            length=config.num_layers,
            unroll=config.scan_unroll,
        )
        carry, _ = layers(config, self.deterministic, name="layers")(
            carry, jnp.arange(config.num_layers), positions, segments, mask
        )
        return _RMSNorm(config.rms_eps, name="final_norm")(carry.x), carry.keys, carry.values


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Random float32 parameters: normal(init_scale) embedding, 1/sqrt(fan_in) matrices, unit norms."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    mask = attention.packed_mask(jnp.ones_like(tokens))
    return cast(dict[str, Any], _Decoder(config, True).init(key, tokens, tokens, tokens, mask, None)["params"])


def merge(trainable: Params, frozen: Params) -> Params:
    """One parameter tree of a trainable and a frozen part. A leaf in both is an error: which one would be meant?"""
    if not frozen:
        return trainable
    left, right = flatten_dict(trainable), flatten_dict(frozen)
    both = sorted("/".join(path) for path in left.keys() & right.keys())
    if both:
        raise ValueError(f"parameters {both[:3]} are both trainable and frozen; leave them in one of the two trees")
    return unflatten_dict({**left, **right})


def apply(
    config: ModelConfig,
    trainable: Params,
    frozen: Params,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"],
    cache: Cache | None = None,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "batch time d_model"], Cache | None]:
    """Runs the decoder.

    Args:
      config: the model's shape.
      trainable, frozen: two disjoint parts of the parameters; gradients are taken of the first. Either may be empty.
      tokens: ids.
      positions: place of each token in its document. With a cache: lengths[slot] + offset for the valid tokens.
      segments: without a cache, the packed document of each token (0 = padding). With a cache, 1 for tokens that are
        to be appended to their slot and 0 for padding, which must stand on the right.
      cache: keys and values of earlier tokens, or None for a pass over whole documents.
      dropout_key: turns dropout on.

    Returns:
      Hidden states after the final norm, and the cache with the new tokens appended (None if none was given).
    """
    mask = attention.packed_mask(segments) if cache is None else attention.cached_mask(positions, cache.capacity)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    module, variables = _Decoder(config, dropout_key is None), {"params": merge(trainable, frozen)}
    hidden, keys, values = cast(Any, module.apply(variables, tokens, positions, segments, mask, cache, rngs=rngs))
    if cache is None:
        return hidden, None
    return hidden, Cache(keys, values, cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32))


def head_matrix(config: ModelConfig, params: Params) -> Float[Array, "d_model vocab"]:
    """The vocabulary head: the transposed embedding when tied, a matrix of its own otherwise."""
    return params["embedding"].T if config.tie_embeddings else params["head"]


def count_parameters(params: Params) -> int:
    """Parameters without embedding and head (the `P` of MEASURING: the part that scales a step's cost)."""
    return sum(
        cast(Array, leaf).size for path, leaf in flatten_dict(params).items() if path[0] not in ("embedding", "head")
    )
