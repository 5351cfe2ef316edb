"""Replicas over eight fake devices, and the CPU split by name."""

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


def test_the_mesh_leaves_no_context_that_pmap_would_trip_over():
    mesh = devices.data_mesh()
    assert (mesh.axis_names, mesh.size) == (("data",), len(jax.devices()))
    devices.replicate(np.zeros(8), mesh)
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
