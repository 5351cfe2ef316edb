"""Adapters against their formula in float64, against merged weights, in training, in a rollout, and in checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from subl_jax import checkpoint
from subl_jax.models import cache as kv
from subl_jax.models import decoder, lora
from subl_jax.models.config import LAYER_TARGETS, LORA_TARGETS, LoraConfig, ModelConfig
from subl_jax.rollout.engine import rollout
from tests.models import numpy_llama
from tests.models.test_decoder import TINY, apply, documents, flat, parameters, row_of, whole_logits
from tests.rollout import policies

ALL = LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=LAYER_TARGETS)
SOME = LoraConfig(rank=2, alpha=5.0, dropout=0.5, targets=("v", "down"))


def on(config: ModelConfig, adapter: LoraConfig | None) -> ModelConfig:
    return dataclasses.replace(config, lora=adapter)


def random_adapters(config: ModelConfig, seed: int = 1, size: float = 0.3) -> dict[str, Any]:
    """Adapters with B random too: as they are drawn they change nothing."""
    rng = np.random.default_rng(seed)
    adapters = jax.eval_shape(lambda: lora.init_adapters(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), adapters)


def folded(config: ModelConfig, params: Any, adapters: Any) -> dict[str, Any]:
    """W + alpha / rank · A B in float64, matrix by matrix."""
    assert config.lora is not None
    weights = {path: np.asarray(leaf, np.float64) for path, leaf in flat(params).items()}
    for target in config.lora.targets:
        a, b = (np.asarray(adapters["layers"][target][name], np.float64) for name in ("lora_a", "lora_b"))
        for layer in range(config.num_layers):
            weights["layers", target, "kernel"][layer] += config.lora.alpha / config.lora.rank * a[layer] @ b[layer]
    return unflatten_dict(weights)


# --- The function -----------------------------------------------------------------------------------------------------


def test_fresh_adapters_leave_every_logit_as_it_was():
    config, params = on(TINY, ALL), parameters(TINY)
    [tokens] = documents(TINY, 9)
    fresh = lora.init_adapters(config, jax.random.key(3))
    with_adapters = whole_logits(config, decoder.merge(fresh, params), tokens)
    np.testing.assert_array_equal(with_adapters, whole_logits(TINY, params, tokens))


@pytest.mark.parametrize("adapter", [ALL, SOME], ids=["every_matrix", "two"])
def test_adapters_equal_the_formula_in_float64_and_the_merged_weights(adapter):
    config, params = on(TINY, adapter), parameters(TINY)
    adapters = random_adapters(config)
    [tokens] = documents(TINY, 9)
    both = decoder.merge(adapters, params)
    ours, merged = whole_logits(config, both, tokens)[0], lora.merged(config, both)
    np.testing.assert_allclose(ours, whole_logits(TINY, merged, tokens)[0], rtol=1e-5, atol=1e-5)
    exact = folded(config, params, adapters)
    np.testing.assert_allclose(ours, numpy_llama.logits(TINY, exact, tokens), rtol=1e-4, atol=1e-4)
    assert np.abs(ours - whole_logits(TINY, params, tokens)[0]).max() > 0.1  # or the comparison would say nothing
    assert set(flat(merged)) == set(flat(params))
    for path, leaf in flat(merged).items():
        np.testing.assert_allclose(leaf, flat(exact)[path], rtol=1e-6, atol=1e-6)


def test_cached_decoding_with_adapters_equals_one_pass_over_the_whole():
    config, params = on(TINY, ALL), parameters(TINY)
    adapters = random_adapters(config)
    [tokens] = documents(TINY, 8)
    cache: Any = kv.empty_cache(config, 1, 8)
    seen = []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8)):
        row = row_of(tokens[start:stop], np.arange(start, stop))
        hidden, cache = apply(config, adapters, params, *row, cache)
        seen.append(np.asarray(hidden)[0] @ np.asarray(decoder.head_matrix(config, params)))
    exact = numpy_llama.logits(TINY, folded(config, params, adapters), tokens)
    np.testing.assert_allclose(np.concatenate(seen), exact, rtol=1e-4, atol=1e-4)


def test_merging_into_bfloat16_rounds_once():
    config = on(TINY, ALL)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters(TINY))
    adapters = random_adapters(config)
    merged = lora.merged(config, decoder.merge(adapters, params))
    exact = folded(config, params, adapters)
    rounded_twice = 0
    for name in LAYER_TARGETS:
        ours, before = merged["layers"][name]["kernel"], params["layers"][name]["kernel"]
        sum_of_both = exact["layers"][name]["kernel"]
        assert ours.dtype == jnp.bfloat16
        # 8 bits of mantissa: half a unit in the last place, and what float32 adds to the sum.
        half = 2.0 ** (np.floor(np.log2(np.abs(sum_of_both))) - 8)
        assert np.all(np.abs(np.asarray(ours, np.float64) - sum_of_both) <= half + 1e-5)
        update = jnp.asarray(sum_of_both - np.asarray(before, np.float64), jnp.bfloat16)
        rounded_twice += np.sum(np.abs(np.asarray(before + update, np.float64) - sum_of_both) > half + 1e-5)
    assert rounded_twice > 0  # the bound tells the two apart


def test_merging_without_adapters_gives_the_weights():
    params = parameters(TINY)
    assert flat(lora.merged(TINY, params)) == flat(params)


def test_a_tree_splits_into_adapters_and_weights_and_merges_back():
    config, params = on(TINY, SOME), parameters(TINY)
    adapters = random_adapters(config)
    first, second = lora.split(decoder.merge(adapters, params))
    assert set(flat(first)) == {("layers", name, leaf) for name in ("v", "down") for leaf in ("lora_a", "lora_b")}
    assert flat(first) == flat(adapters) and flat(second) == flat(params)


# --- Initialisation ---------------------------------------------------------------------------------------------------


def test_a_is_uniform_within_one_over_root_fan_in_and_b_is_zero():
    config = on(ModelConfig(50, 64, 3, 4, 2, 24, 200), LoraConfig(rank=16, targets=LAYER_TARGETS))
    layers = lora.init_adapters(config, jax.random.key(0))["layers"]
    fan_in = {**dict.fromkeys(("q", "k", "v", "gate", "up"), 64), "o": 96, "down": 200}
    fan_out = {"q": 96, "k": 48, "v": 48, "o": 64, "gate": 200, "up": 200, "down": 64}
    assert set(layers) == set(fan_in)
    for name, width in fan_in.items():
        a, b = np.asarray(layers[name]["lora_a"]), np.asarray(layers[name]["lora_b"])
        assert a.shape == (3, width, 16) and b.shape == (3, 16, fan_out[name])
        assert a.dtype == b.dtype == np.float32 and not b.any()
        bound = width**-0.5
        assert 0.99 * bound < a.max() <= bound and -bound <= a.min() < -0.99 * bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.05) and abs(a.mean()) < 0.05 * bound
    drawn = [np.asarray(layers[name]["lora_a"])[layer] for name in ("q", "k", "v") for layer in range(3)]
    assert len({part.tobytes() for part in drawn}) == 9  # layers and matrices start different


def test_initialisation_is_the_keys_and_refused_without_a_configuration():
    config = on(TINY, ALL)
    one, again, other = (lora.init_adapters(config, jax.random.key(seed)) for seed in (1, 1, 2))
    for left, same, different in zip(*(jax.tree.leaves(tree) for tree in (one, again, other)), strict=True):
        np.testing.assert_array_equal(left, same)
        assert not np.any(left) or np.abs(left - different).max() > 0
    with pytest.raises(ValueError, match="lora is None"):
        lora.init_adapters(TINY, jax.random.key(0))


# --- Dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_on_the_adapters_path_alone_and_only_with_a_key():
    config, params = on(TINY, SOME), parameters(TINY)
    [tokens] = documents(TINY, 9)
    adapters = random_adapters(config)
    fresh = decoder.merge(lora.init_adapters(config, jax.random.key(0)), params)
    base = whole_logits(TINY, params, tokens)
    # With B = 0 the adapter adds nothing, whatever it dropped: anything that changed would be on the weights' path.
    np.testing.assert_array_equal(whole_logits(config, fresh, tokens, dropout_key=jax.random.key(1)), base)
    both = decoder.merge(adapters, params)
    without = whole_logits(config, both, tokens)  # equal to the formula, see above
    one, again, two = (whole_logits(config, both, tokens, dropout_key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - without).max() > 1e-2 and np.abs(one - two).max() > 1e-2


def test_what_dropout_keeps_is_scaled_to_the_same_mean():
    # One layer that writes only the adapter of o, with A B = 1 and V = 1: a single token's residual stream becomes
    # x + dropped(x / rms(x)), and the final norm only rescales it.
    width = 16
    config = ModelConfig(8, width, 1, 1, 1, width, 4, rms_eps=1e-12, lora=LoraConfig(width, width, 0.5, ("o",)))
    one = jnp.eye(width)[None]
    params = jax.tree.map(jnp.zeros_like, parameters(on(config, None)))
    params["embedding"] = parameters(on(config, None))["embedding"]
    params["final_norm"]["scale"] = jnp.ones(width)
    params["layers"]["attention_norm"]["scale"] = jnp.ones((1, width))
    params["layers"]["v"]["kernel"] = one
    adapters = {"layers": {"o": {"lora_a": one, "lora_b": one}}}
    hidden, _ = apply(config, adapters, params, *row_of([3]), dropout_key=jax.random.key(0))
    x = np.asarray(params["embedding"])[3]
    ratio = np.asarray(hidden)[0, 0] / x
    kept = ratio > (ratio.min() + ratio.max()) / 2
    assert 0 < kept.sum() < width
    np.testing.assert_allclose(ratio[~kept], ratio.min(), rtol=1e-4)
    rms = np.sqrt(np.mean(x**2))
    np.testing.assert_allclose(ratio[kept] / ratio.min(), 1 + 1 / (1 - 0.5) / rms, rtol=1e-4)


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_adapters_alone_and_follow_from_those_of_the_merged_weights():
    config, params = on(TINY, ALL), parameters(TINY)
    adapters = random_adapters(config)
    ids, positions, segments = row_of(documents(TINY, 8)[0])

    def loss(config, trainable, frozen):
        return jnp.sum(jnp.sin(decoder.apply(config, trainable, frozen, ids, positions, segments)[0]))

    ours = jax.jit(jax.grad(lambda trainable, frozen: loss(config, trainable, frozen)))(adapters, params)
    assert set(flat(ours)) == set(flat(adapters))
    merged = lora.merged(config, decoder.merge(adapters, params))
    whole = jax.jit(jax.grad(lambda trainable: loss(TINY, trainable, {})))(merged)
    for name in LAYER_TARGETS:
        a, b = (np.asarray(adapters["layers"][name][leaf], np.float64) for leaf in ("lora_a", "lora_b"))
        # W' = W + s A B, hence dA = s dW' B^T and dB = s A^T dW'.
        change = 7.0 / 3 * np.asarray(whole["layers"][name]["kernel"], np.float64)
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(ours["layers"][name]["lora_a"], change @ b.swapaxes(1, 2), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours["layers"][name]["lora_b"], a.swapaxes(1, 2) @ change, rtol=1e-3, atol=1e-4)


# --- Configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "adapter.rank=0; it must be at least 1"),
        ("alpha", 0.0, "adapter.alpha=0.0; it must be positive"),
        ("alpha", float("nan"), "adapter.alpha=nan; it must be positive"),
        ("dropout", 1.0, "adapter.dropout=1.0 is outside"),
        ("dropout", -0.1, "adapter.dropout=-0.1 is outside"),
        ("targets", (), "adapter.targets=: name each matrix once"),
        ("targets", ("q", "q"), "adapter.targets=q,q: name each matrix once"),
        ("targets", ("q", "q_proj"), "adapter.targets=q,q_proj: .*of q,k,v,o,gate,up,down"),
    ],
)
def test_adapters_that_could_not_be_trained_are_refused_by_value(field, value, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{field: value})


def test_adapters_survive_the_configurations_dictionary_and_are_no_part_of_the_architecture():
    config = on(TINY, SOME)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.architecture() == TINY.architecture()


# --- Rollouts ---------------------------------------------------------------------------------------------------------


def test_a_rollout_with_adapters_gives_the_tokens_of_the_merged_weights():
    config = on(policies.CONFIG, LoraConfig(4, 8.0, 0.1, LORA_TARGETS))
    base = policies.scripted(policies.CALL + "<|end|>", strength=11.0, restless=1.0)
    both = decoder.merge(random_adapters(config, size=0.2), base)

    def run(config: ModelConfig, params: Any) -> list[list[int]]:
        todo = policies.episodes(3)
        found = rollout(config, params, policies.RENDERER, todo, policies.GREEDY, seed=5, devices=jax.devices()[:1])
        return [trajectory.tokens.tolist() for trajectory in found]

    tokens = run(config, both)
    assert tokens == run(policies.CONFIG, lora.merged(config, both))
    assert tokens != run(policies.CONFIG, base)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def saved(directory: Any, config: ModelConfig, tree: Any, **more: Any) -> Any:
    metadata = {"model": config.architecture(), "lora": config.to_dict()["lora"], **more}
    checkpoint.save_model(directory, tree, metadata)
    return directory


def test_an_adapter_checkpoint_merges_into_its_base(tmp_path):
    config, params = on(TINY, SOME), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters(TINY))
    adapters = random_adapters(config)
    expected = {"config_hash": "aa", "seed": 3}
    base = saved(tmp_path / "base", TINY, params, tokenizer="t", config_hash="aa", seed=3, stage="base")
    there = saved(tmp_path / "adapters", config, adapters, tokenizer="t", base=expected, config_hash="bb")
    read, back, metadata = lora.load_adapters(there)
    assert read.architecture() == TINY.architecture() and read.lora == SOME
    assert metadata["base"] == expected
    merged_config, merged = lora.merge_checkpoint(there, base)
    assert merged_config.architecture() == TINY.architecture() and merged_config.lora is None
    wanted = lora.merged(config, decoder.merge(adapters, params))
    for path, leaf in flat(adapters).items():
        np.testing.assert_array_equal(flat(back)[path], leaf)
    assert set(flat(merged)) == set(flat(params))
    for path, leaf in flat(wanted).items():
        assert flat(merged)[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(flat(merged)[path], leaf)


def test_adapters_and_a_base_that_do_not_fit_are_refused_by_name(tmp_path):
    config, params = on(TINY, SOME), parameters(TINY)
    adapters = random_adapters(config)
    there = saved(tmp_path / "adapters", config, adapters, tokenizer="t", base={"config_hash": "aa"})
    wide = dataclasses.replace(TINY, rope_theta=500.0)
    base = saved(tmp_path / "base", TINY, params, tokenizer="t", config_hash="aa")
    for name, made, message in [
        ("theta", dict(config=wide, tree=params), "was not trained on .*theta .*rope_theta: 500.0 in the base"),
        ("words", dict(config=TINY, tree=params, tokenizer="u"), 'tokenizer: "u" in the base, "t" in the adapters'),
        ("hash", dict(config=TINY, tree=params, config_hash="b"), 'config_hash: "b" in the base, "aa" in the adapters'),
        ("no_hash", dict(config=TINY, tree=params), 'config_hash: null in the base, "aa" in the adapters'),
        ("adapters_too", dict(config=config, tree=adapters), "adapters_too holds adapters itself"),
    ]:
        with pytest.raises(checkpoint.CheckpointMismatch, match=message):
            lora.merge_checkpoint(there, saved(tmp_path / name, **made))
    with pytest.raises(checkpoint.CheckpointMismatch, match="base holds no adapters .*lora=None"):
        lora.merge_checkpoint(base, base)
    with pytest.raises(checkpoint.CheckpointError, match="no usable checkpoint in .*nowhere"):
        lora.merge_checkpoint(tmp_path / "nowhere", base)


def test_an_adapter_checkpoint_that_contradicts_its_metadata_is_refused(tmp_path):
    config = on(TINY, SOME)
    other = on(TINY, dataclasses.replace(SOME, rank=4))
    with pytest.raises(checkpoint.CheckpointMismatch, match=r"layers/\w+/lora_a.*4.* in the checkpoint.* 2"):
        lora.load_adapters(saved(tmp_path / "m", config, random_adapters(other)))


def test_the_distance_of_parameters_is_the_euclidean_norm_over_all_leaves():
    left = {"a": np.array([1.0, 2.0], np.float32), "b": {"c": np.full((2, 2), 3.0, np.float32)}}
    right = {"a": np.array([1.0, 5.0], np.float32), "b": {"c": np.full((2, 2), 1.0, np.float32)}}
    assert lora.delta_norm(TINY, left, right) == pytest.approx(5.0)  # sqrt(3² + 4·2²)
    assert lora.delta_norm(TINY, left, left) == 0.0


def test_the_distance_of_adapters_is_that_of_the_weights_they_are_folded_into():
    config, params = on(TINY, ALL), parameters(TINY)
    adapters = random_adapters(config)
    whole = flat(folded(config, params, adapters))
    expected = np.sqrt(
        sum(np.sum((leaf - np.asarray(flat(params)[path], np.float64)) ** 2) for path, leaf in whole.items())
    )
    assert lora.delta_norm(config, decoder.merge(adapters, params), params) == pytest.approx(expected, rel=1e-6)


def angle(*changes: np.ndarray) -> float:
    """The cosine between two changes, in plain float64."""
    one, other = (change.astype(np.float64).ravel() for change in changes)
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def moved(config: ModelConfig, params: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.01 * rng.standard_normal(leaf.shape).astype(np.float32), params)


def changes(params: Any, base: Any) -> np.ndarray:
    before = flat(base)
    return np.concatenate(
        [(np.asarray(leaf, np.float64) - before[path]).ravel() for path, leaf in sorted(flat(params).items())]
    )


def test_the_cosine_of_two_changes_is_that_of_all_weights_in_one_vector():
    base, other_base = parameters(TINY), moved(TINY, parameters(TINY), 5)
    left, right = moved(TINY, base, 1), moved(TINY, other_base, 2)
    found = lora.delta_cosine((TINY, left, base), (TINY, right, other_base))
    assert found == pytest.approx(angle(changes(left, base), changes(right, other_base)), abs=1e-9)
    assert lora.delta_cosine((TINY, left, base), (TINY, left, base)) == pytest.approx(1.0)
    back = jax.tree.map(lambda now, then: 2 * then - now, left, base)
    assert lora.delta_cosine((TINY, left, base), (TINY, back, base)) == pytest.approx(-1.0, abs=1e-4)
    assert lora.delta_cosine((TINY, base, base), (TINY, left, base)) is None  # no direction


def test_the_cosine_of_adapters_is_that_of_the_weights_they_are_folded_into():
    config, params = on(TINY, ALL), parameters(TINY)
    one, two = random_adapters(config, 0), random_adapters(config, 1)
    expected = angle(*(changes(folded(config, params, each), params) for each in (one, two)))
    both = [(config, decoder.merge(each, params), params) for each in (one, two)]
    assert lora.delta_cosine(*both) == pytest.approx(expected, abs=1e-6)
    # Against a model that was trained whole.
    whole = moved(TINY, params, 3)
    expected = angle(changes(folded(config, params, one), params), changes(whole, params))
    assert lora.delta_cosine(both[0], (TINY, whole, params)) == pytest.approx(expected, abs=1e-6)


def test_only_models_of_one_shape_have_an_angle():
    assert lora.comparable(on(TINY, ALL), TINY)
    assert not lora.comparable(TINY, dataclasses.replace(TINY, d_ff=TINY.d_ff + 8))
    assert not lora.comparable(TINY, dataclasses.replace(TINY, qkv_bias=not TINY.qkv_bias))
