"""Which devices a run uses, and how weights get onto them for per-device programs (rollouts): replicated once, ahead."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")
# JAX exports its device class as a variable, which type checkers do not take for a type.
Device = Any


def configure_cpu(devices: int) -> None:
    """Splits the CPU into `devices` JAX devices, unless XLA_FLAGS already says how many.

    Two single-threaded programs use two cores better than one program whose small kernels are split between them.
    Must run before JAX touches a device; has no effect on GPU and TPU.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def data_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """One mesh axis, `data`, over the given devices (all by default)."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def put(tree: Tree, where: Any) -> Tree:
    """`jax.device_put`, also where the devices are those of several processes: each then sends its own part alone.

    (`device_put` would have all of them compare what they send, a collective at each call.)

    Args:
      tree: arrays, the same in every process where they are not global ones already.
      where: a sharding, or a tree of shardings like `tree` or a prefix of it.
    """
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(where)):
        return jax.device_put(tree, where)

    def one(sharding: jax.sharding.Sharding, part: Any) -> Any:
        return jax.tree.map(lambda leaf: _global(leaf, sharding), part)

    return jax.tree.map(one, where, tree)


def _global(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # from shards to shards
    return jax.make_array_from_callback(np.shape(leaf), sharding, lambda index: np.asarray(leaf[index]))


def on_host(array: Any) -> np.ndarray:
    """An array's values. Of one that is spread over several processes, all of them have to ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        mesh = array.sharding.mesh  # type: ignore[attr-defined]
        array = jax.jit(lambda values: values, out_shardings=NamedSharding(mesh, P()))(array)
    return np.asarray(array)


def replicate(tree: Tree, devices: Sequence[Device] | Mesh) -> Tree:
    """Copies a tree of arrays onto every device once, ahead of the loop (pmap would broadcast it at each call)."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return put(tree, NamedSharding(mesh, P()))


def machine() -> str:
    """What this runs on, in words: accelerators, processor, cores."""
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}, "
    return f"{kind}{_processor()}, {len(os.sched_getaffinity(0))} cores"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
