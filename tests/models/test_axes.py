"""The names of parameters' dimensions: every parameter has them, an unknown one is an error, a bad size is refused."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import LORA_TARGETS, LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, make_mesh

# All dimensions distinct: a size says which dimension it is.
MODEL = ModelConfig(vocab_size=80, d_model=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=6, d_ff=40)
EVERYTHING = dataclasses.replace(
    MODEL, tie_embeddings=False, qkv_bias=True, o_bias=True, qk_norm=True, lora=LoraConfig(3, targets=LORA_TARGETS)
)


@functools.cache
def layout(fsdp: int, tensor: int, rules: str = "default") -> Layout:
    return Layout(make_mesh(MeshConfig(1, fsdp, tensor)), rules)


def shapes(config: ModelConfig):
    return jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))


def test_every_dimension_of_every_parameter_is_named_by_what_it_is():
    # 8 query heads and 4 key/value heads of 6. The layers, the rank and the numbers of one head have no name.
    names = {80: "vocab", 32: "embed", 48: "heads", 24: "kv_heads", 40: "mlp"}
    leaves: dict[tuple[str, ...], Any] = flatten_dict(shapes(EVERYTHING))
    for path, leaf in leaves.items():
        norm = path[-1] == "scale"  # norms are kept whole
        assert axes.names_of(path) == tuple(None if norm else names.get(size) for size in leaf.shape), path


@pytest.mark.parametrize("path", [("layers", "router", "kernel"), ("layers", "q", "lora_c"), ("layers", "q", "scales")])
def test_a_parameter_that_nobody_named_is_an_error_and_not_replicated(path):
    with pytest.raises(KeyError):
        axes.names_of(path)


@pytest.mark.parametrize(
    ("field", "value", "fsdp", "tensor", "message"),
    [
        ("d_model", 26, 4, 1, r"d_model=26 \(embed\) .* over fsdp=4 .* 24 or 28; .*--config\.parallel\.fsdp"),
        ("vocab_size", 50, 1, 4, r"vocab_size=50 \(vocab\) .* over tensor=4 .* 48 or 52; .*--config\.parallel\.tensor"),
        ("d_ff", 42, 1, 4, r"d_ff=42 \(mlp\) .* 40 or 44; .*--config\.parallel\.tensor"),
        ("num_heads", 12, 1, 8, r"num_heads=12 \(heads\) .* 8 or 16; 12 splits into 1, 2, 3, 4, 6 parts; .*tensor"),
        # 4 heads of 6 numbers split into 8 parts of 3, but a part of a head attends to nothing.
        ("num_kv_heads", 4, 1, 8, r"num_kv_heads=4 \(kv_heads\) .* over tensor=8 .* are 8; .*or the rules kv_replicated"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_split_is_refused_by_field_before_anything_is_placed(field, value, fsdp, tensor, message):
    config = dataclasses.replace(MODEL, **{field: value})
    with pytest.raises(LayoutError, match=message):
        axes.place(shapes(config), config, layout(fsdp, tensor))


def test_rules_that_keep_key_value_heads_whole_take_more_devices_than_there_are_heads():
    axes.check_layout(MODEL, layout(1, 8, "kv_replicated"))


def test_placed_parameters_keep_their_values_and_go_where_their_names_say():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes(EVERYTHING))
    placed = axes.place(params, EVERYTHING, layout(2, 4))
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert placed["embedding"].sharding.spec == P(("tensor",), ("fsdp",))
    assert placed["head"].sharding.spec == P(("fsdp",), ("tensor",))
    layers = placed["layers"]
    assert layers["o"]["kernel"].sharding.spec == P(None, ("tensor",), ("fsdp",))
    # The part of the second device along tensor, first along fsdp: heads 2 and 3, the first half of d_model.
    (part,) = (shard for shard in layers["o"]["kernel"].addressable_shards if shard.device == jax.devices()[1])
    np.testing.assert_array_equal(part.data, params["layers"]["o"]["kernel"][:, 12:24, :16])


def test_nothing_is_placed_where_there_is_nothing():
    assert axes.place({}, MODEL, layout(2, 4)) == {}


def test_adapters_are_placed_without_the_weights_that_they_sit_on():
    config = dataclasses.replace(MODEL, lora=LoraConfig(3, targets=("q", "down")))
    adapters = axes.place(lora.init_adapters(config, jax.random.key(0)), config, layout(2, 4))
    leaves: dict[tuple[str, ...], Any] = flatten_dict(adapters)
    specs = {"/".join(path): leaf.sharding.spec for path, leaf in leaves.items()}
    assert specs == {
        "layers/q/lora_a": P(None, ("fsdp",), None), "layers/q/lora_b": P(None, None, ("tensor",)),
        "layers/down/lora_a": P(None, ("tensor",), None), "layers/down/lora_b": P(None, None, ("fsdp",)),
    }  # fmt: skip


def test_abstract_parameters_have_the_shapes_dtypes_and_places_of_real_ones():
    params = unflatten_dict({("embedding",): jnp.zeros((80, 32), jnp.bfloat16), ("final_norm", "scale"): jnp.zeros(32)})
    for where in (None, layout(2, 4)):
        found = axes.abstract(params, where)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), params
        )
        expected = None if where is None else axes.place(params, MODEL, where)["embedding"].sharding
        assert found["embedding"].sharding == expected
