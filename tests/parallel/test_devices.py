"""Placement over eight fake devices: replicas everywhere, batches split evenly or refused, and the CPU split by name."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.parallel import devices


def test_a_replicated_tree_lies_whole_on_every_device():
    some = jax.devices()[:3]
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.asarray(4)]}
    for place in (some, devices.data_mesh(some)):
        placed = devices.replicate(tree, place)
        for original, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
            assert {shard.device for shard in leaf.addressable_shards} == set(some)
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, original)


def test_a_batch_is_split_over_the_mesh_in_order():
    mesh = devices.data_mesh(jax.devices()[:4])
    batch = {"tokens": np.arange(24).reshape(8, 3), "count": np.arange(8)}
    placed = devices.shard_batch(batch, mesh)
    for name, leaf in placed.items():
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
        assert [shard.device for shard in shards] == list(mesh.devices)
        np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), batch[name])
        assert all(len(shard.data) == 2 for shard in shards)


@pytest.mark.parametrize(("rows", "sizes"), [(6, "4 or 8"), (9, "8 or 12"), (3, "4")])
def test_rows_that_do_not_split_are_refused_with_the_nearest_sizes(rows, sizes):
    mesh = devices.data_mesh(jax.devices()[:4])
    with pytest.raises(ValueError, match=f"a batch of {rows} rows .* data=4 devices; use {sizes} rows "):
        devices.shard_batch({"even": np.zeros(8), "uneven": np.zeros((rows, 2))}, mesh)


def test_the_mesh_leaves_no_context_that_pmap_would_trip_over():
    mesh = devices.data_mesh()
    assert (mesh.axis_names, mesh.size) == (("data",), len(jax.devices()))
    devices.shard_batch(np.zeros(8), mesh)
    np.testing.assert_array_equal(jax.pmap(lambda x: x + 1)(np.zeros(len(jax.devices()))), np.ones(len(jax.devices())))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("", 3), ("--xla_force_host_platform_device_count=5", 5), ("--xla_cpu_enable_fast_math=false", 3)],
)
def test_the_cpu_is_split_unless_the_environment_already_says_how(flags, expected):
    code = (
        "from subl_jax.parallel.devices import configure_cpu; configure_cpu(3); import jax; print(jax.device_count())"
    )
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(expected)], done.stderr
