"""Where arrays lie on eight fake devices: meshes, what is refused and how, and every array of a training state by hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import TrainState, state_shardings
from subl_jax.models import axes, decoder
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import (
    RULES,
    Layout,
    LayoutError,
    MeshConfig,
    abstract_mesh,
    bytes_per_device,
    make_mesh,
    mesh_shape,
)


@functools.cache
def cube(rules: str = "default") -> Layout:
    return Layout(make_mesh(MeshConfig(2, 2, 2)), rules)


# --- Meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4), (1, 1, 8), (2, 2, 2), (8, 1, 1), (3, 1, 2)])
def test_the_mesh_has_the_shape_that_was_asked_for_and_tensor_neighbours_are_neighbours(shape):
    mesh = make_mesh(MeshConfig(*shape))
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    # The last axis, which talks the most, runs over devices that follow one another.
    assert list(mesh.devices.flat) == jax.devices()[: math.prod(shape)]


@pytest.mark.parametrize(
    ("config", "count", "data"),
    [(MeshConfig(), 8, 8), (MeshConfig(fsdp=2, tensor=2), 8, 2), (MeshConfig(fsdp=8), 8, 1), (MeshConfig(), 1, 1)],
)
def test_accelerators_are_all_used_for_data_and_a_cpu_for_no_more_than_is_asked(config, count, data):
    assert abstract_mesh(config, count).shape["data"] == data
    assert make_mesh(config, jax.devices()[:count]).shape["data"] == 1


@pytest.mark.parametrize(
    ("config", "cpu", "message"),
    [
        (MeshConfig(fsdp=4, tensor=4), True, "data=1 x fsdp=4 x tensor=4 has 16 devices, 8 are there"),
        (MeshConfig(data=16), True, "data=16 x fsdp=1 x tensor=1 has 16 devices, 8 are there"),
        (MeshConfig(data=3, fsdp=3), True, "has 9 devices, 8 are there"),
        (MeshConfig(fsdp=3), False, "data=2 x fsdp=3 x tensor=1 has 6 devices, 8 are there"),  # two would idle
        (MeshConfig(data=1, fsdp=2), False, "has 2 devices, 8 are there"),
        (MeshConfig(data=5, tensor=16), False, "has 80 devices, 8 are there"),
    ],
)
def test_a_mesh_that_the_devices_do_not_fill_is_refused_and_the_remedy_is_one(config, cpu, message):
    with pytest.raises(LayoutError, match=message) as refused:
        mesh_shape(config, 8, cpu)
    # With the flags that the message names, over those that were given, the mesh can be made.
    flags = {name: int(value) for name, value in re.findall(r"--config\.parallel\.(\w+)=(\d+)", str(refused.value))}
    shape = mesh_shape(dataclasses.replace(config, **flags), 8, cpu)
    assert math.prod(shape) <= 8 if cpu else math.prod(shape) == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": -1}, "data=-1; it must be at least 0"),
        ({"fsdp": 0}, "fsdp=0; it must be at least 1"),
        ({"tensor": 0}, "tensor=0; it must be at least 1"),
        ({"student_rules": "zero3"}, "student_rules='zero3' is none of default, kv_replicated, fsdp, replicated"),
        ({"teacher_rules": ""}, "teacher_rules='' is none of default"),
    ],
)
def test_axes_of_no_devices_and_unknown_rules_are_refused_by_field(wrong, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**wrong)


def test_a_layout_of_unknown_rules_is_refused():
    with pytest.raises(ValueError, match="rules 'zero3' are none of default"):
        Layout(cube().mesh, "zero3")


def test_the_training_mesh_leaves_no_context_that_pmap_would_trip_over():
    Layout(make_mesh(MeshConfig(2, 2, 2))).shard_batch(np.zeros(8))
    np.testing.assert_array_equal(jax.pmap(lambda x: x + 1)(np.zeros(8)), np.ones(8))


# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "parts"), [("default", 4), ("kv_replicated", 4), ("fsdp", 8), ("replicated", 8)]
)  # of data=2, fsdp=2, tensor=2: rules that do not split matrices over `tensor` split rows over it
def test_a_batch_is_split_over_the_devices_in_order(rules, parts):
    batch = {"tokens": np.arange(48).reshape(16, 3), "count": np.arange(16)}
    for name, leaf in cube(rules).shard_batch(batch).items():
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.device for shard in shards] == jax.devices()
        pieces = np.split(batch[name], parts)
        for index, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, pieces[index * parts // 8])


@pytest.mark.parametrize(("rows", "sizes"), [(6, "4 or 8"), (9, "8 or 12"), (3, "4")])
def test_rows_that_do_not_split_are_refused_with_the_nearest_sizes(rows, sizes):
    with pytest.raises(
        LayoutError,
        match=rf"rows of a batch={rows} \(batch\) does not split over data=2 x fsdp=2 .*sizes that do are {sizes};"
        r".*--config\.<stage>\.train\.batch_rows",
    ):
        cube().shard_batch({"even": np.zeros(8), "uneven": np.zeros((rows, 2))})


@pytest.mark.parametrize(
    ("name", "size", "rules", "message"),
    [
        ("heads", 5, "default", r"num_x=5 \(heads\) .* over tensor=2 \(rules 'default'\): .* 4 or 6; 5 splits into 1 parts"),
        ("embed", 41, "default", r"over fsdp=2 .* 40 or 42"),
        ("embed", 42, "fsdp", r"over fsdp=2 x tensor=2 .* 40 or 44; 42 splits into 1, 2, 3 parts"),
        ("embed", 3, "fsdp", r"sizes that do are 4; 3 splits into 1, 3 parts; try this"),
    ],
)  # fmt: skip
def test_a_dimension_that_does_not_split_is_refused_by_name_with_axes_sizes_and_remedy(name, size, rules, message):
    with pytest.raises(LayoutError, match=message):
        cube(rules).check(name, size, "num_x", "try this")


def test_dimensions_that_rules_keep_whole_may_have_any_size():
    for rules, names in (
        ("replicated", ("embed", "heads", "kv_heads", "mlp", "vocab")),
        ("kv_replicated", ("kv_heads",)),
    ):
        for name in names:
            cube(rules).check(name, 1, "")


def test_a_replicated_tree_lies_whole_on_every_device():
    placed = cube().replicate({"a": jnp.arange(6.0), "b": [jnp.asarray(4)]})
    for leaf in jax.tree.leaves(placed):
        assert {shard.device for shard in leaf.addressable_shards} == set(jax.devices())
        assert all(shard.data.shape == leaf.shape for shard in leaf.addressable_shards)


# --- A whole training state -------------------------------------------------------------------------------------------

# Every kind of parameter there is, all dimensions distinct.
MODEL = ModelConfig(
    vocab_size=88, d_model=40, num_layers=3, num_heads=16, num_kv_heads=8, head_dim=6, d_ff=56, tie_embeddings=False,
    qkv_bias=True, o_bias=True, qk_norm=True, lora=LoraConfig(rank=5, targets=("q", "k", "v", "o", "gate", "up", "down")),
)  # fmt: skip

# What one of 2 x 2 x 2 devices holds of each parameter, worked out by hand: `default` halves d_model over fsdp, and over
# tensor the vocabulary, the query heads (16 x 6 = 96), the key/value heads (8 x 6 = 48) and d_ff.
DEFAULT: dict[str, tuple[int, ...]] = {
    "embedding": (44, 20), "head": (20, 44), "final_norm/scale": (40,),
    "layers/attention_norm/scale": (3, 40), "layers/mlp_norm/scale": (3, 40),
    "layers/q_norm/scale": (3, 6), "layers/k_norm/scale": (3, 6),
    "layers/q/kernel": (3, 20, 48), "layers/q/bias": (3, 48), "layers/q/lora_a": (3, 20, 5), "layers/q/lora_b": (3, 5, 48),
    "layers/k/kernel": (3, 20, 24), "layers/k/bias": (3, 24), "layers/k/lora_a": (3, 20, 5), "layers/k/lora_b": (3, 5, 24),
    "layers/v/kernel": (3, 20, 24), "layers/v/bias": (3, 24), "layers/v/lora_a": (3, 20, 5), "layers/v/lora_b": (3, 5, 24),
    "layers/o/kernel": (3, 48, 20), "layers/o/bias": (3, 20), "layers/o/lora_a": (3, 48, 5), "layers/o/lora_b": (3, 5, 20),
    "layers/gate/kernel": (3, 20, 28), "layers/gate/lora_a": (3, 20, 5), "layers/gate/lora_b": (3, 5, 28),
    "layers/up/kernel": (3, 20, 28), "layers/up/lora_a": (3, 20, 5), "layers/up/lora_b": (3, 5, 28),
    "layers/down/kernel": (3, 28, 20), "layers/down/lora_a": (3, 28, 5), "layers/down/lora_b": (3, 5, 20),
}  # fmt: skip
SHAPES: dict[str, Any] = jax.eval_shape(lambda: decoder.init(MODEL, jax.random.key(0)))
LEAVES: dict[tuple[str, ...], Any] = flatten_dict(SHAPES)
WHOLE = {"/".join(path): leaf.shape for path, leaf in LEAVES.items()}
# `fsdp` cuts d_model (the only dimension of 40) into four, but for the norms, and nothing else.
FSDP = {
    name: shape if name.endswith("scale") else tuple(10 if size == 40 else size for size in shape)
    for name, shape in WHOLE.items()
}
KV_REPLICATED = {
    **DEFAULT,
    "layers/k/kernel": (3, 20, 48), "layers/k/bias": (3, 48), "layers/k/lora_b": (3, 5, 48),
    "layers/v/kernel": (3, 20, 48), "layers/v/bias": (3, 48), "layers/v/lora_b": (3, 5, 48),
}  # fmt: skip
PER_DEVICE = {"default": DEFAULT, "kv_replicated": KV_REPLICATED, "fsdp": FSDP, "replicated": WHOLE}


@functools.cache
def state_on(rules: str) -> TrainState:
    """A state of zeros, placed the way the training loop places its own."""
    layout = cube(rules)
    transformation = make_optimizer(OptimizerConfig("adamw"), 10)
    shapes = TrainState(SHAPES, jax.eval_shape(transformation.init, SHAPES), jnp.zeros((), jnp.int32))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = state._replace(params=axes.place(state.params, MODEL, layout))
    return jax.device_put(state, state_shardings(transformation, state, layout))


def held(leaf: jax.Array) -> tuple[int, ...]:
    """The shape of what each device holds; the same on all eight."""
    shapes = {shard.data.shape for shard in leaf.addressable_shards}
    assert len(shapes) == 1 and {shard.device for shard in leaf.addressable_shards} == set(jax.devices())
    return shapes.pop()


@pytest.mark.parametrize("rules", RULES)
def test_every_array_of_a_training_state_lies_as_the_rules_say_and_none_is_replicated_silently(rules):
    state = state_on(rules)
    expected = PER_DEVICE[rules]
    params: dict[tuple[str, ...], Any] = flatten_dict(state.params)
    assert {"/".join(path): held(leaf) for path, leaf in params.items()} == expected
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        keys = [getattr(key, "key", None) for key in path]
        name = "/".join(key for key in keys if key)
        if name:
            moments += 1
            assert held(leaf) == expected[name], jax.tree_util.keystr(path)
        else:  # the optimizer's counters
            assert held(leaf) == leaf.shape == ()
    assert moments == 2 * len(expected)  # Adam's first and second
    assert held(state.step) == ()


def test_bytes_per_device_are_those_of_the_parts():
    for rules, expected in PER_DEVICE.items():
        parts = sum(math.prod(shape) for shape in expected.values())
        # Parameters and two moments in float32, two counters of the optimizer and the step in int32.
        assert bytes_per_device(state_on(rules)) == 3 * 4 * parts + 3 * 4
    # The same from shapes alone; without a layout there is one device, which holds everything.
    halves = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), SHAPES)
    assert bytes_per_device(axes.abstract(halves, cube())) == 2 * sum(math.prod(shape) for shape in DEFAULT.values())
    assert bytes_per_device(axes.abstract(halves)) == 2 * sum(math.prod(shape) for shape in WHOLE.values())
