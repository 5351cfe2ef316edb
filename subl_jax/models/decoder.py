"""The decoder as a pure function: parameters and tokens in, hidden states and cache out.

The vocabulary head is not applied in the pass: losses and samplers apply it (`logits`, `head_matrix`), so that nobody is
forced to materialise `[batch, time, vocab]`. Parameters are a plain pytree whose layers are stacked on a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from subl_jax.models import attention
from subl_jax.models.backends import attend_documents, choose_backend
from subl_jax.models.cache import Cache, write
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout

Params = Mapping[str, Any]

# The logit of a padding row of the vocabulary: its probability is exactly 0 in float32, and no arithmetic on it is NaN.
PADDING_LOGIT = -1e30

# The products of `_Dense`, by name: a policy does not look into their gradient rule.
_PRODUCT = "product"
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(_PRODUCT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


# One layer's keys and values in a cache.
_Store = tuple[Float[Array, "slots kv_heads dim capacity"], Float[Array, "slots kv_heads capacity dim"]]


class _Where(NamedTuple):
    """What every layer is told of the tokens.

    Attributes:
      positions: place of each token in its document.
      segments: document of each token, or whether it is to be appended to the cache.
      mask: which keys a query may see; None where a backend works it out from the segments, or with a cache.
      ahead: how many tokens before its query each key stands; given only where layers have windows and a mask.
      rows: with a cache, the slot of each row of the batch; None where row i is slot i.
    """

    positions: Int[Array, "batch time"]
    segments: Int[Array, "batch time"]
    mask: Bool[Array, "batch time source"] | None
    ahead: Int[Array, "*batch time source"] | None
    rows: Int[Array, " batch"] | None = None


def _constrain(layout: Layout | None, x: Array, *names: str | None) -> Array:
    """Pins an activation to its place on the mesh; without a layout there is one device and nothing to say."""
    return x if layout is None else layout.constrain(x, *names)


class _RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


@jax.custom_vjp
def _product(
    x: Float[Array, "*tokens source"], kernel: Float[Array, "source target"]
) -> Float[Array, "*tokens target"]:
    """The product x W, in the dtype of x.

    The gradient by W is x^T dy as it stands, added up in float32. JAX's own rule asks for dy^T x and transposes that; XLA on a
    CPU then works the activation's derivative out element by element while it transposes dy: 346 ms against 241 ms for the
    backward pass of a 10 M decoder at 512 tokens.
    """
    return x @ kernel.astype(x.dtype)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    tokens = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (((dy.ndim - 1,), (1,)), ((), ())))
    dw = jax.lax.dot_general(x, dy, ((tokens, tokens), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw.astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


class _Dense(nn.Module):
    """x W (+ b) (+ scale · dropout(x) A B) in the dtype of x, whatever the weights are held in."""

    features: int
    bias: bool
    lora: LoraConfig | None
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        fan_in = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (fan_in, self.features))
        y = checkpoint_name(_product(x, kernel), _PRODUCT)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        if self.lora is not None:
            down = self.param("lora_a", _init_lora_a, (fan_in, self.lora.rank))
            up = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
            dropped = nn.Dropout(self.lora.dropout, deterministic=self.deterministic)(x)
            y += self.lora.scale * ((dropped @ down.astype(x.dtype)) @ up.astype(x.dtype))
        return y


class _HeadAdapter(nn.Module):
    """The adapter on the vocabulary head; like the head it is only held here, see `low_rank`."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        assert self.config.lora is not None
        rank = self.config.lora.rank
        self.param("lora_a", _init_lora_a, (self.config.d_model, rank))
        self.param("lora_b", nn.initializers.zeros, (rank, self.config.vocab_size))


def _init_lora_a(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Uniform in ±1/sqrt(fan_in), as PEFT draws it (Kaiming's with a = sqrt 5)."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class _Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMSNorm and added to the residual stream."""

    config: ModelConfig
    layout: Layout | None
    deterministic: bool

    @nn.compact
    def __call__(self, x: Array, window: Array | None, where: _Where, store: _Store | None = None):
        config, layout = self.config, self.layout

        def dense(features: int, name: str, bias: bool = False) -> _Dense:
            lora = config.lora if config.lora is not None and name in config.lora.targets else None
            return _Dense(features, bias, lora, self.deterministic, name=name)

        def heads(x: Array, count: int, names: str) -> Array:
            return _constrain(layout, x.reshape(*x.shape[:2], count, config.head_dim), "batch", None, names, None)

        # Attention
        normed = _RMSNorm(config.rms_eps, name="attention_norm")(x)
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        queries = heads(dense(width, "q", config.qkv_bias)(normed), config.num_heads, "heads")
        keys = heads(dense(kv_width, "k", config.qkv_bias)(normed), config.num_kv_heads, "kv_heads")
        values = heads(dense(kv_width, "v", config.qkv_bias)(normed), config.num_kv_heads, "kv_heads")
        if config.qk_norm:
            queries = _RMSNorm(config.rms_eps, name="q_norm")(queries)
            keys = _RMSNorm(config.rms_eps, name="k_norm")(keys)
        frequency = attention.frequencies(config)
        queries = attention.rotary(queries, where.positions, frequency)
        keys = attention.rotary(keys, where.positions, frequency)
        if store is not None:
            rows = jnp.arange(queries.shape[0]) if where.rows is None else where.rows
            store = write(*store, keys, values, rows, where.positions, where.segments, layout)
            stored_keys, stored_values = (_constrain(layout, part, None, "kv_heads", None, None) for part in store)
            store = stored_keys, stored_values
            # A copy where rows are picked out (prefill), none where the batch is all slots.
            seen = store if where.rows is None else (stored_keys[rows], stored_values[rows])
            cached_keys, cached_values = (part.astype(queries.dtype) for part in seen)
            mixed = attention.attend_cached(queries, cached_keys, cached_values, where.positions, window)
        elif where.mask is None:
            mixed = attend_documents(queries, keys, values, where.segments, config, layout)
        else:
            mask = where.mask
            if window is not None and where.ahead is not None:
                mask &= attention.within(window, where.ahead)
            mixed = attention.attend(queries, keys, values, mask)
        mixed = dense(config.d_model, "o", config.o_bias)(mixed.reshape(*mixed.shape[:2], -1))
        x = x + nn.Dropout(config.dropout, deterministic=self.deterministic)(mixed)
        x = _constrain(layout, x, "batch", None, None)

        # SwiGLU
        normed = _RMSNorm(config.rms_eps, name="mlp_norm")(x)
        gated = nn.silu(dense(config.d_ff, "gate")(normed)) * dense(config.d_ff, "up")(normed)
        gated = _constrain(layout, gated, "batch", None, "mlp")
        x = x + nn.Dropout(config.dropout, deterministic=self.deterministic)(dense(config.d_model, "down")(gated))
        x = _constrain(layout, x, "batch", None, None)
        return x, store


class _Decoder(nn.Module):
    """The pass over whole documents, its layers scanned."""

    config: ModelConfig
    layout: Layout | None
    deterministic: bool

    @nn.compact
    def __call__(self, tokens: Array, where: _Where, embedded: Array | None = None):
        config = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(config.init_scale), (config.vocab_size, config.d_model)
        )
        if not config.tie_embeddings:
            self.param("head", nn.initializers.lecun_normal(), (config.d_model, config.vocab_size))
        if config.adapts_head:
            _HeadAdapter(config, name="head_adapter")()
        x = _look_up(embedding, tokens, self.layout) if embedded is None else embedded
        x = x.astype(config.compute_dtype)
        block = _Block
        if config.remat != "none":
            block = nn.remat(_Block, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=cast(Any, (0, nn.broadcast)),
            length=config.num_layers,
            unroll=config.scan_unroll,
        )
        x, _ = layers(config, self.layout, self.deterministic, name="layers")(x, _windows(config), where)
        return _RMSNorm(config.rms_eps, name="final_norm")(x)


def _windows(config: ModelConfig) -> Int[Array, " layers"] | None:
    return jnp.asarray(config.windows, jnp.int32) if any(config.windows) else None


def _cached_pass(
    config: ModelConfig, params: Params, tokens: Array, where: _Where, cache: Cache, layout: Layout | None
) -> tuple[Float[Array, "batch time d_model"], list[_Store]]:
    """The pass over new tokens of a cache, layer by layer: a scan would copy every layer's buffers out and in again."""
    x = _look_up(params["embedding"], tokens, layout).astype(config.compute_dtype)
    block, windows, stores = _Block(config, layout, True), _windows(config), []
    for layer in range(config.num_layers):
        stacked = params["layers"]
        own = stacked[layer] if isinstance(stacked, tuple) else jax.tree.map(lambda leaf, i=layer: leaf[i], stacked)
        window = None if windows is None else windows[layer]
        x, store = cast(Any, block.apply({"params": own}, x, window, where, (cache.keys[layer], cache.values[layer])))
        stores.append(store)
    return cast(Array, _RMSNorm(config.rms_eps).apply({"params": params["final_norm"]}, x)), stores


def unstack(config: ModelConfig, params: Params) -> dict[str, Any]:
    """Parameters whose layers are a tuple of trees: what a program that decodes token by token reads without copies.

    Only passes with a cache take them. A slice of a stacked matrix that feeds a product is a copy of that matrix.
    """
    layers = tuple(jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]) for layer in range(config.num_layers))
    return {**params, "layers": layers}


def _look_up(
    embedding: Float[Array, "vocab d_model"], tokens: Int[Array, "batch time"], layout: Layout | None
) -> Float[Array, "batch time d_model"]:
    """Rows of the embedding; under a layout without gathering the table, which automatic partitioning would do.

    Rows of the batch share their ids with the devices that hold other columns of the table; each device looks in its part
    of the vocabulary; the parts are summed, and every row goes back, with all of its columns, to the device it belongs to.
    """
    if layout is None:
        return embedding[tokens]
    vocab, columns = layout.axes("vocab"), layout.axes("embed")

    def look_up(table: Float[Array, "rows part"], ids: Int[Array, "mine time"]) -> Float[Array, "mine time d_model"]:
        if columns:
            ids = jax.lax.all_gather(ids, columns, tiled=True)
        if vocab:
            ids = ids - jax.lax.axis_index(vocab) * table.shape[0]
        inside = (ids >= 0) & (ids < table.shape[0])
        found = jnp.where(inside[..., None], table[jnp.clip(ids, 0, table.shape[0] - 1)], 0)
        if vocab:
            found = jax.lax.psum(found, vocab)
        if columns:
            found = jax.lax.all_to_all(found, columns, split_axis=0, concat_axis=2, tiled=True)
        return found

    # Inside another shard_map the mesh is that one's, and only the axes that are still whole can be split.
    where: dict[str, Any] = {"axis_names": {*vocab, *columns}} if layout.inside else {"mesh": layout.mesh}
    return jax.shard_map(
        look_up,
        in_specs=(layout.spec(("vocab", "embed")), layout.spec(("batch", None))),
        out_specs=layout.spec(("batch", None, None)),
        **where,
    )(embedding, tokens)


@jax.custom_vjp
def tied(
    embedding: Float[Array, "vocab d_model"], tokens: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time d_model"], Float[Array, "vocab d_model"]]:
    """A tied table in its two uses: its rows for `apply` (`embedded`), and itself for the head.

    Their gradients meet in one table: rows are added into the head's, where JAX's own rules fill a second table with zeros,
    add the rows to that, and add the two. On one device.
    """
    return embedding[tokens], embedding


def _tied_forward(embedding: Array, tokens: Array) -> tuple[tuple[Array, Array], Array]:
    return tied(embedding, tokens), tokens


def _tied_backward(tokens: Array, gradients: tuple[Array, Array]) -> tuple[Array, None]:
    rows, head = gradients
    return head.at[tokens].add(rows), None


tied.defvjp(_tied_forward, _tied_backward)


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Random float32 parameters: normal(init_scale) embedding, 1/sqrt(fan_in) matrices, unit norms, zero biases.

    Adapters, where the configuration has them, are among the leaves; they start as no change.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    where = _Where(tokens, tokens, attention.packed_mask(jnp.ones_like(tokens)), None)
    return cast(dict[str, Any], _Decoder(config, None, True).init(key, tokens, where)["params"])


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
    layout: Layout | None = None,
    rows: Int[Array, " batch"] | None = None,
    embedded: Float[Array, "batch time d_model"] | None = None,
) -> tuple[Float[Array, "batch time d_model"], Cache | None]:
    """Runs the decoder.

    Args:
      config: the model's shape.
      trainable, frozen: two disjoint parts of the parameters; gradients are taken of the first. Either may be empty.
      tokens: ids.
      positions: place of each token in its document. With a cache: lengths[slot] + offset for the valid tokens.
      segments: without a cache, the packed document of each token (0 = padding). With a cache, 1 for tokens that are
        to be appended to their slot and 0 for padding, which must stand on the right.
      cache: keys and values of earlier tokens, or None for a pass over whole documents. Such passes take no gradients and
        no dropout.
      dropout_key: turns dropout on.
      layout: where activations lie in a program over a mesh; None in a program of one device.
      rows: with a cache, the slot that each row of the batch belongs to; a row beyond the slots is padding. None: row i is
        slot i, for all slots.
      embedded: the tokens' rows of the embedding, where the caller has looked them up (`tied`); without a cache only.

    Returns:
      Hidden states after the final norm in `config.compute_dtype`, and the cache with the new tokens appended (None if
      none was given).
    """
    if cache is not None:
        where = _Where(positions, segments, None, None, rows)
        hidden, stores = _cached_pass(config, merge(trainable, frozen), tokens, where, cache, layout)
        added = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        lengths = cache.lengths + added if rows is None else cache.lengths.at[rows].add(added, mode="drop")
        keys, values = zip(*stores, strict=True)
        return hidden, Cache(keys, values, lengths)
    where = _documents(config, tokens, positions, segments, layout)
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    module, variables = _Decoder(config, layout, dropout_key is None), {"params": merge(trainable, frozen)}
    hidden = cast(Any, module.apply(variables, tokens, where, embedded, rngs=rngs))
    return hidden, None


def _documents(config: ModelConfig, tokens: Array, positions: Array, segments: Array, layout: Layout | None) -> _Where:
    """What the layers are told in a pass over whole documents."""
    mask = ahead = None
    if choose_backend(config, tokens.shape[1], layout) == "xla":
        mask = attention.packed_mask(segments)
        # Documents are contiguous, so places in the row measure the distance as well as positions do.
        places = jnp.arange(tokens.shape[1])
        ahead = places[:, None] - places if any(config.windows) else None
    return _Where(positions, segments, mask, ahead)


def residual_stream(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"],
) -> Float[Array, "depths batch time d_model"]:
    """The states between the layers, in a pass over whole documents without gradients: for looking into a model.

    Depth 0 is the embedding, depth l what layer l has left, before the final norm; `depths` is one more than the layers.
    Arguments as of `apply`; adapters are among `params`.
    """
    where = _documents(config, tokens, positions, segments, None)
    block = _Block(config, None, True)

    def layer(x: Array, own: Any) -> tuple[Array, Array]:
        weights, window = own
        x, _ = cast(Any, block.apply({"params": weights}, x, window, where))
        return x, x

    embedded = _look_up(params["embedding"], tokens, None).astype(config.compute_dtype)
    _, states = jax.lax.scan(layer, embedded, (params["layers"], _windows(config)))
    return jnp.concatenate([embedded[None], states])


def head_matrix(config: ModelConfig, params: Params) -> Float[Array, "d_model vocab"]:
    """The vocabulary head: the transposed embedding when tied, a matrix of its own otherwise. Padding rows included.

    Raises:
      ValueError: an adapter sits on it, which this matrix does not hold.
    """
    if config.adapts_head:
        raise ValueError(
            "the head has an adapter, and its matrix alone gives other logits; use decoder.logits, or merge the adapters "
            "first (lora.merged)"
        )
    return _head_kernel(config, params)


def _head_kernel(config: ModelConfig, params: Params) -> Float[Array, "d_model vocab"]:
    return params["embedding"].T if config.tie_embeddings else params["head"]


def low_rank(
    config: ModelConfig, params: Params, hidden: Float[Array, "*tokens d_model"]
) -> Float[Array, "*tokens rank"]:
    """The head's adapter up to B: alpha / rank · h A, in the dtype of `hidden`. Times B it is added to the logits."""
    assert config.lora is not None
    return config.lora.scale * (hidden @ params["head_adapter"]["lora_a"].astype(hidden.dtype))


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "*tokens d_model"], layout: Layout | None = None
) -> Float[Array, "*tokens vocab"]:
    """Float32 logits of hidden states, the head's adapter included; padding rows of the vocabulary get `PADDING_LOGIT`.

    An untrained or foreign head gives padding rows any value: they must be neither sampled nor part of a softmax.
    """
    head = _head_kernel(config, params).astype(hidden.dtype)
    scores = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    if config.adapts_head:
        up = params["head_adapter"]["lora_b"].astype(hidden.dtype)
        scores += jnp.matmul(low_rank(config, params, hidden), up, preferred_element_type=jnp.float32)
    if layout is not None:
        scores = layout.constrain(scores, "batch", *[None] * (scores.ndim - 2), "vocab")
    return mask_padding(config, scores)


def mask_padding(config: ModelConfig, scores: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens vocab"]:
    """Logits with those of the vocabulary's padding rows at `PADDING_LOGIT`; the same array where there are none."""
    if config.known_tokens == config.vocab_size:
        return scores
    return jnp.where(jnp.arange(config.vocab_size) < config.known_tokens, scores, PADDING_LOGIT)


def count_parameters(params: Params) -> int:
    """Parameters without embedding and head (the `P` of MEASURING: the part that scales a step's cost)."""
    return sum(
        cast(Array, leaf).size for path, leaf in flatten_dict(params).items() if path[0] not in ("embedding", "head")
    )
