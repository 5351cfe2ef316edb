"""Which devices a run uses, and how weights get onto them for per-device programs (rollouts): replicated once, ahead."""

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


def replicate(tree: Tree, devices: Sequence[Device] | Mesh) -> Tree:
    """Copies a tree of arrays onto every device once, ahead of the loop (pmap would broadcast it at each call)."""
    mesh = devices if isinstance(devices, Mesh) else data_mesh(devices)
    return jax.device_put(tree, NamedSharding(mesh, P()))
