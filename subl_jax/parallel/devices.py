"""Which devices a run uses, and how weights get onto them: replicated once for rollouts, by a named mesh for training."""

from __future__ import annotations

import os
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


def training_mesh() -> Mesh:
    """The mesh of a training run: every device of an accelerator; on CPU one device, whose kernels use all cores.

    Several CPU devices in one process share one thread pool. An all-reduce blocks a pool thread until every device has
    joined, so that steps dispatched ahead can starve each other: seen here as a deadlock at two devices on two cores
    (XLA ends the process after 40 s). One device was as fast.
    """
    devices = jax.devices()
    return data_mesh(devices[:1] if devices[0].platform == "cpu" else devices)


def replicate(tree: Tree, devices: Sequence[Device] | Mesh) -> Tree:
    """Copies a tree of arrays onto every device once, ahead of the loop (pmap would broadcast it at each call)."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Splits the leading dimension of every array over `data`.

    Raises:
      ValueError: a leading dimension that does not divide, with the nearest sizes that do.
    """
    count = mesh.shape["data"]
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % count:
            down = leaf.shape[0] // count * count
            nearest = f"{down} or {down + count}" if down else f"{count}"
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows does not split over data={count} devices; use {nearest} rows "
                "(--config.<stage>.batch_rows)"
            )
    return jax.device_put(batch, NamedSharding(mesh, P("data")))
