"""The decoder against an independent float64 Llama, packed against alone, and trainable against frozen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from subl_jax.models import decoder
from subl_jax.models.config import LoraConfig, ModelConfig
from tests.models import numpy_llama

TINY = ModelConfig(
    vocab_size=37, d_model=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, d_ff=20, init_scale=1.0
)
SHAPES = [
    TINY,
    dataclasses.replace(TINY, tie_embeddings=False, num_layers=1, rope_theta=100.0),
    ModelConfig(61, 12, 3, 6, 3, 4, 7, rope_theta=500_000.0, rms_eps=1e-3, tie_embeddings=False, init_scale=1.0),
    ModelConfig(5, 9, 1, 3, 3, 2, 1, tie_embeddings=True, init_scale=0.5),
    ModelConfig(41, 8, 4, 4, 1, 8, 33, tie_embeddings=False, init_scale=2.0),
]


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by path."""
    return cast(dict[tuple[str, ...], Any], flatten_dict(tree))


def parameters(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Random parameters whose norm scales are random too, so that a dropped scale shows."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.Array:
        if path[-1] == "scale":
            return jnp.asarray(rng.uniform(0.5, 1.5, shape), jnp.float32)
        spread = config.init_scale if path == ("embedding",) else shape[-2] ** -0.5
        return jnp.asarray(rng.normal(size=shape) * spread, jnp.float32)

    shapes = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
    return unflatten_dict({path: leaf(path, struct.shape) for path, struct in flat(shapes).items()})


# Jitted once per configuration: operation by operation, every test would compile some hundred tiny programs.
apply = jax.jit(decoder.apply, static_argnums=0)
logits = jax.jit(decoder.logits, static_argnums=0)


def row_of(tokens, positions=None, segments=None) -> list[jax.Array]:
    """Tokens, positions and segments [batch, time]; by default each row is one document."""
    tokens = np.atleast_2d(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    return [jnp.asarray(np.atleast_2d(part), jnp.int32) for part in (tokens, positions, segments)]


def whole_logits(config: ModelConfig, params, tokens, positions=None, segments=None, dropout_key=None) -> np.ndarray:
    """[batch, time, vocab] of one pass without a cache."""
    hidden, cache = apply(config, params, {}, *row_of(tokens, positions, segments), None, dropout_key)
    assert cache is None
    return np.asarray(logits(config, params, hidden))


def documents(config: ModelConfig, *lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]


def pack(parts: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row [1, width]: documents one after another, ids 3 on the padding behind them."""
    tokens, positions, segments = (np.zeros((1, width), np.int32) for _ in range(3))
    tokens[:] = 3
    cursor = 0
    for number, part in enumerate(parts, start=1):
        here = slice(cursor, cursor + len(part))
        tokens[0, here], positions[0, here], segments[0, here] = part, np.arange(len(part)), number
        cursor += len(part)
    return tokens, positions, segments


@pytest.mark.parametrize(
    "config", SHAPES, ids=lambda c: f"h{c.num_heads}kv{c.num_kv_heads}l{c.num_layers}tied{c.tie_embeddings:d}"
)
def test_logits_equal_a_float64_llama(config):
    params = parameters(config)
    tokens = np.stack(documents(config, 11, 11))
    ours = whole_logits(config, params, tokens)
    for row, sequence in zip(ours, tokens, strict=True):
        expected = numpy_llama.logits(config, params, sequence)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)


residual_stream = jax.jit(decoder.residual_stream, static_argnums=0)


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"h{c.num_heads}l{c.num_layers}")
def test_the_states_between_the_layers_equal_a_float64_llama_also_in_packed_rows(config):
    params = parameters(config)
    parts = documents(config, 7, 1, 5)
    packed = np.asarray(residual_stream(config, params, *row_of(*pack(parts, 17))))
    assert packed.shape == (config.num_layers + 1, 1, 17, config.d_model)
    cursor = 0
    for part in parts:
        expected = numpy_llama.states(config, params, part)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(packed[:, 0, cursor : cursor + len(part)], expected, rtol=1e-4, atol=1e-5 * scale)
        cursor += len(part)


def test_the_last_state_is_what_the_decoder_normalises_with_windows_and_adapters_too():
    adapter = LoraConfig(rank=2, targets=("q", "down"))
    config = dataclasses.replace(TINY, windows=(3, 0), qkv_bias=True, qk_norm=True, lora=adapter)
    params = parameters(config)
    row = row_of(*pack(documents(config, 9, 6), 16))
    hidden = np.asarray(apply(config, params, {}, *row)[0], np.float64)
    last = np.asarray(residual_stream(config, params, *row)[-1], np.float64)
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + config.rms_eps)
    np.testing.assert_allclose(hidden, normed * np.asarray(params["final_norm"]["scale"]), rtol=1e-4, atol=1e-5)
    unwindowed = residual_stream(dataclasses.replace(config, windows=()), params, *row)
    assert np.abs(np.asarray(unwindowed[-1]) - last).max() > 1e-3


def test_only_relative_positions_matter():
    params = parameters(TINY)
    [tokens] = documents(TINY, 9)
    near, far, stretched = (
        whole_logits(TINY, params, tokens, x) for x in (np.arange(9), 500 + np.arange(9), 2 * np.arange(9))
    )
    np.testing.assert_allclose(near, far, atol=1e-3)
    assert np.abs(near - stretched).max() > 1e-2


def test_packed_logits_equal_each_document_alone():
    params = parameters(TINY)
    parts = documents(TINY, 7, 1, 5)
    packed = whole_logits(TINY, params, *pack(parts, 17))[0]
    cursor = 0
    for part in parts:
        alone = numpy_llama.logits(TINY, params, part)
        np.testing.assert_allclose(packed[cursor : cursor + len(part)], alone, rtol=1e-4, atol=1e-4)
        cursor += len(part)


def test_a_later_token_changes_no_earlier_logit():
    params = parameters(TINY)
    [tokens] = documents(TINY, 8)
    other = tokens.copy()
    other[5:] = (other[5:] + 1) % TINY.vocab_size
    first, second = (whole_logits(TINY, params, t)[0] for t in (tokens, other))
    np.testing.assert_array_equal(first[:5], second[:5])
    assert np.abs(first[5:] - second[5:]).max() > 1e-2


def test_padding_leaves_no_trace_in_logits_or_gradients():
    params = parameters(TINY)
    tokens, positions, segments = pack(documents(TINY, 6), 10)
    other = tokens.copy()
    other[0, 6:] = [9, 30, 0, 1]

    def loss(params, tokens):
        hidden, _ = decoder.apply(TINY, params, {}, tokens, jnp.asarray(positions), jnp.asarray(segments))
        return jnp.sum(jnp.where(segments[..., None] > 0, jnp.sin(hidden), 0.0))

    measured = jax.jit(jax.value_and_grad(loss))
    ours, theirs = (measured(params, jnp.asarray(t)) for t in (tokens, other))
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(left).all()
        np.testing.assert_array_equal(left, right)


def test_a_row_of_nothing_but_padding_gives_finite_gradients():
    params = parameters(TINY)
    nothing = jnp.zeros((2, 4), jnp.int32)

    def loss(params):
        return jnp.sum(jnp.square(decoder.apply(TINY, params, {}, nothing, nothing, nothing)[0]))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_unrolling_the_scan_changes_no_result():
    params = parameters(SHAPES[2])
    [tokens] = documents(SHAPES[2], 10)
    plain, unrolled = (
        whole_logits(dataclasses.replace(SHAPES[2], scan_unroll=unroll), params, tokens) for unroll in (1, 3)
    )
    np.testing.assert_allclose(plain, unrolled, rtol=1e-5, atol=1e-5)


def test_dropout_acts_only_with_a_key():
    config = dataclasses.replace(TINY, dropout=0.5)
    params = parameters(config)
    [tokens] = documents(config, 8)
    without = whole_logits(config, params, tokens)
    np.testing.assert_array_equal(without, whole_logits(TINY, params, tokens))
    one, again, two = (whole_logits(config, params, tokens, dropout_key=jax.random.key(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - without).max() > 1e-2 and np.abs(one - two).max() > 1e-2


def test_dropout_differs_between_layers():
    # With equal layers and equal masks, dropping would treat both alike; the keys must be split over the scan.
    config = dataclasses.replace(TINY, dropout=0.5, num_layers=2)
    params = parameters(config)
    equal = {**params, "layers": jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), params["layers"])}
    zero = jax.tree.map(jnp.zeros_like, equal["layers"])
    # Only the MLP of a layer writes, and its input is the same constant in both: the two residual terms show the masks.
    quiet = {
        **zero,
        "mlp_norm": equal["layers"]["mlp_norm"],
        "gate": equal["layers"]["gate"],
        "up": equal["layers"]["up"],
    }

    def written(layer: int) -> np.ndarray:
        down = equal["layers"]["down"]["kernel"]
        only = jnp.zeros_like(down).at[layer].set(down[layer])
        alone = {**equal, "layers": {**quiet, "down": {"kernel": only}}, "final_norm": {"scale": jnp.ones(12)}}
        hidden, _ = apply(config, alone, {}, *row_of([4, 5, 6]), None, jax.random.key(3))
        residual = np.asarray(equal["embedding"])[[4, 5, 6]]
        direction = np.asarray(hidden)[0]
        # The final norm only rescales: an entry where the residual stream kept its direction was dropped.
        ratio = direction / residual
        return np.isclose(ratio, np.median(ratio, axis=1, keepdims=True), rtol=1e-3)

    assert not np.array_equal(written(0), written(1))


def test_split_parameters_equal_the_whole_and_only_the_trainable_get_gradients():
    params = parameters(TINY)
    leaves = flat(params)
    trainable = unflatten_dict({path: leaf for path, leaf in leaves.items() if "q" in path or "embedding" in path})
    frozen = unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in flat(trainable)})
    [tokens] = documents(TINY, 8)
    ids, positions, segments = row_of(tokens)

    @jax.jit
    @jax.value_and_grad
    def loss(trainable, frozen):
        return jnp.sum(jnp.sin(decoder.apply(TINY, trainable, frozen, ids, positions, segments)[0]))

    (part, split), (all_of_it, full), (nothing, empty) = (
        loss(*trees) for trees in ((trainable, frozen), (params, {}), ({}, params))
    )
    assert float(part) == pytest.approx(float(all_of_it)) == pytest.approx(float(nothing))
    assert empty == {}
    split, full = flat(split), flat(full)
    assert set(split) == set(flat(trainable))
    for path, gradient in split.items():
        np.testing.assert_allclose(gradient, full[path], rtol=1e-5, atol=1e-6)
        assert np.abs(gradient).max() > 0


def test_merge_refuses_a_leaf_in_both_trees():
    params = parameters(TINY)
    with pytest.raises(ValueError, match="layers/q/kernel.*both trainable and frozen"):
        decoder.merge({"layers": {"q": params["layers"]["q"]}}, params)


def test_gradients_equal_finite_differences_of_the_oracle():
    config = ModelConfig(7, 6, 1, 2, 1, 2, 5, tie_embeddings=True, init_scale=1.0)
    params = parameters(config)
    [tokens] = documents(config, 5)
    ids, positions, segments = row_of(tokens)

    def loss(params):
        hidden, _ = decoder.apply(config, params, {}, ids, positions, segments)
        return jnp.sum(jnp.sin(hidden @ decoder.head_matrix(config, params)))

    gradients = flat(jax.jit(jax.grad(loss))(params))
    rng = np.random.default_rng(0)
    exact = {path: np.asarray(leaf, np.float64) for path, leaf in flat(params).items()}
    for path, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        shifted = [
            np.sin(
                numpy_llama.logits(config, unflatten_dict({**exact, path: exact[path] + e * direction}), tokens)
            ).sum()
            for e in (1e-5, -1e-5)
        ]
        expected = (shifted[0] - shifted[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), expected, rtol=1e-3, atol=1e-3)


def test_initialisation_has_the_documented_scales():
    config = ModelConfig(900, 64, 3, 4, 2, 16, 200, tie_embeddings=False, init_scale=0.03)
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))
    layers = params["layers"]
    assert np.std(params["embedding"]) == pytest.approx(0.03, rel=0.05)
    for matrix, fan_in in [(layers["q"], 64), (layers["o"], 64), (layers["gate"], 64), (layers["down"], 200)]:
        assert np.std(matrix["kernel"]) == pytest.approx(fan_in**-0.5, rel=0.05)
        assert np.abs(matrix["kernel"][0] - matrix["kernel"][1]).max() > 0  # layers start different
    assert np.all(np.asarray(layers["mlp_norm"]["scale"]) == 1)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_parameter_count_leaves_out_embedding_and_head():
    config = dataclasses.replace(TINY, tie_embeddings=False)
    attention = 12 * 12 + 2 * 12 * 6 + 12 * 12
    assert decoder.count_parameters(parameters(config)) == 2 * (attention + 3 * 12 * 20 + 2 * 12) + 12


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 0, "model.d_model is 0"),
        ("num_kv_heads", 3, "model.num_heads=4 is not a multiple of model.num_kv_heads=3"),
        ("head_dim", 7, "model.head_dim=7 is odd"),
        ("dropout", 1.0, "model.dropout=1.0 is outside"),
        ("dropout", -0.1, "model.dropout=-0.1 is outside"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_value(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig(), **{field: value})


def test_configuration_survives_its_dictionary_and_refuses_unknown_fields():
    assert ModelConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match="unknown fields \\['window'\\]"):
        ModelConfig.from_dict({**TINY.to_dict(), "window": 4})
