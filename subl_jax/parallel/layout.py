"""Where arrays lie: one mesh of three axes, and one table from the names of dimensions to the axes of that mesh.

A layout (mesh and rules) is handed to whoever places or constrains an array; there is no global mesh, since `pmap`
refuses to run inside one. Teacher and student may have different rules on the same mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subl_jax.parallel.devices import Device, put

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "tensor")

# Name of a dimension -> the mesh axes that it is split over. A name that is absent is kept whole on every device, and
# says so here: nothing is replicated because it happened not to divide. `embed` is split over axes of `batch` only: the
# look-up of the embedding sends rows there.
#
#   data    copies of the weights, each with rows of the batch of its own
#   fsdp    rows of the batch too; weights are split over it and gathered where they are used
#   tensor  parts of every matrix; each device computes with its part, activations are summed
RULES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "default": {
        "batch": ("data", "fsdp"),
        "embed": ("fsdp",),  # d_model of the weights
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
    },
    # For more devices along tensor than key/value heads: every device holds all of them.
    "kv_replicated": {
        "batch": ("data", "fsdp"),
        "embed": ("fsdp",),
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "mlp": ("tensor",),
    },
    # Weights split over every device that shares rows or matrices, and gathered whole: fits any number of heads.
    "fsdp": {"batch": ("data", "fsdp", "tensor"), "embed": ("fsdp", "tensor")},
    # A small model beside a large one: its weights stand whole on every device.
    "replicated": {"batch": ("data", "fsdp", "tensor")},
}

# Those of training, and the one inside a rollout replica, whose loop has rows of its own that no axis of the mesh splits.
_COLUMNS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **RULES,
    "rollout": {"vocab": ("tensor",), "heads": ("tensor",), "kv_heads": ("tensor",), "mlp": ("tensor",)},
}


class LayoutError(ValueError):
    """A dimension does not split over the mesh axes that the rules send it to."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The shape of the mesh that training runs on.

    Attributes:
      data: copies of the weights; 0: as many as the devices allow (on CPU: as few as leave no process without a device;
        one device's kernels use all cores).
      fsdp: devices that the weights are split over and gathered from.
      tensor: devices that every matrix product is split over.
      teacher_rules, student_rules: which column of the table `RULES` places teacher and student.
    """

    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    teacher_rules: str = "default"
    student_rules: str = "default"

    def __post_init__(self) -> None:
        """Refuses axes of no devices and unknown rules."""
        for name, low in (("data", 0), ("fsdp", 1), ("tensor", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least {low}")
        for name in ("teacher_rules", "student_rules"):
            if getattr(self, name) not in RULES:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(RULES)}")


DEFAULT_MESH = MeshConfig()


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """The mesh of a training run over all devices, or over those given.

    Several CPU devices in one process share one thread pool. An all-reduce blocks a pool thread until every device has
    joined, so that steps dispatched ahead can starve each other: seen as a deadlock at two devices on two cores. With
    data=0 a CPU run therefore takes fsdp * tensor devices, one by default; one device was as fast. Of several processes
    each gives as many.

    Processes and slices follow one another along `data`, the outermost axis, whose copies speak once a step; fsdp and
    tensor lie inside them, as far as their devices go.

    Raises:
      LayoutError: the axes need more devices than there are, or leave some (or a process, or a slice) without work.
    """
    devices = list(jax.devices() if devices is None else devices)
    by_process: dict[int, list[Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    platform = devices[0].platform
    shape = mesh_shape(config, len(devices), cpu=platform == "cpu", processes=len(by_process))
    wanted = math.prod(shape)
    each = wanted // len(by_process)
    grid = np.asarray([device for _, own in sorted(by_process.items()) for device in own[:each]], dtype=object)
    if platform == "tpu" and wanted > 1:
        grid = _torus(shape, devices)
    return Mesh(grid.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _torus(shape: tuple[int, int, int], devices: list[Device]) -> np.ndarray:
    """TPUs such that neighbours in the mesh are neighbours on the torus, and slices follow one another along `data`."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    if data % slices:
        raise LayoutError(
            f"data={data} does not split over {slices} slices, between which only copies of the weights are cheap; use "
            f"--config.parallel.data={-(-data // slices) * slices} with fsdp x tensor inside a slice of "
            f"{len(devices) // slices} chips"
        )
    return mesh_utils.create_hybrid_device_mesh((data // slices, fsdp, tensor), (slices, 1, 1), devices=devices)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of a training run over that many accelerators, none of which need be here: shardings, and no arrays.

    Raises:
      LayoutError: the axes need more devices than there are, or leave some without work.
    """
    return AbstractMesh(mesh_shape(config, devices, cpu=False), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(config: MeshConfig, devices: int, cpu: bool, processes: int = 1) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor); of several processes each has as many of them.

    Raises:
      LayoutError: the axes need more devices than there are, or (but for CPU) leave some without work.
    """
    inner = config.fsdp * config.tensor
    data = config.data or (processes // math.gcd(processes, inner) if cpu else max(devices // inner, 1))
    wanted = data * inner
    if wanted > devices or (not cpu and wanted != devices):
        fits = max((n for n in range(1, devices + 1) if devices % n == 0 and n <= inner), default=1)
        raise LayoutError(
            f"a mesh of data={data} x fsdp={config.fsdp} x tensor={config.tensor} has {wanted} devices, {devices} are "
            f"there; use axes whose product is {devices}, e.g. --config.parallel.data=0 --config.parallel.fsdp={fits} "
            "--config.parallel.tensor=1"
        )
    if wanted % processes:
        raise LayoutError(
            f"a mesh of data={data} x fsdp={config.fsdp} x tensor={config.tensor} has {wanted} devices, which {processes} "
            "processes cannot share evenly; use --config.parallel.data=0"
        )
    return data, config.fsdp, config.tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which one model lies on it.

    Attributes:
      mesh: of the axes `MESH_AXES`; an abstract one says where arrays would lie.
      rules: a column of `RULES`, or `rollout`.
      inside: for code that runs inside a `shard_map` over the other axes of the mesh: constraints and look-ups then name
        axes of the surrounding mesh, as JAX wants it there.
    """

    mesh: Mesh | AbstractMesh
    rules: str = "default"
    inside: bool = False

    def __post_init__(self) -> None:
        """Refuses unknown rules."""
        if self.rules not in _COLUMNS:
            raise ValueError(f"rules {self.rules!r} are none of {', '.join(_COLUMNS)}")

    @property
    def device(self) -> Device:
        """One of the mesh's devices.

        Raises:
          ValueError: the mesh is abstract.
        """
        if isinstance(self.mesh, AbstractMesh):
            raise ValueError("an abstract mesh has no devices: it says where arrays would lie, and runs nothing")
        return self.mesh.devices.flat[0]

    @property
    def platform(self) -> str:
        """What kind of device the mesh is made of."""
        return self.device.platform

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes that a dimension of this name is split over."""
        return _COLUMNS[self.rules].get(name, ())

    def split(self, name: str) -> int:
        """Into how many parts a dimension of this name is cut."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, names: Sequence[str | None]) -> P:
        """The partition of an array whose dimensions have these names (None: kept whole)."""
        return P(*((self.axes(name) or None) if name else None for name in names))

    def sharding(self, names: Sequence[str | None]) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(names))

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Pins an intermediate result of a jitted program to its place."""
        return jax.lax.with_sharding_constraint(x, self.spec(names) if self.inside else self.sharding(names))

    def check(self, name: str, size: int, what: str, remedy: str = "") -> None:
        """Refuses a dimension that does not split evenly.

        Raises:
          LayoutError: names the dimension, the mesh axes, and the nearest sizes that work.
        """
        parts = self.split(name)
        if size % parts:
            axes = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes(name))
            down = size // parts * parts
            nearest = f"{down} or {down + parts}" if down else f"{parts}"
            fitting = ", ".join(str(n) for n in range(1, parts + 1) if size % n == 0)
            raise LayoutError(
                f"{what}={size} ({name}) does not split over {axes} (rules {self.rules!r}): the nearest sizes that do are "
                f"{nearest}; {size} splits into {fitting} parts{'; ' + remedy if remedy else ''}"
            )

    def replicate(self, tree: Tree) -> Tree:
        """Copies every array onto all devices of the mesh, by intention."""
        return put(tree, NamedSharding(self.mesh, P()))

    def shard_batch(self, batch: Tree) -> Tree:
        """Splits the leading dimension (rows) of every array.

        Raises:
          LayoutError: a number of rows that does not divide.
        """
        for leaf in jax.tree.leaves(batch):
            self.check("batch", leaf.shape[0], "rows of a batch", "set --config.<stage>.train.batch_rows")
        return put(batch, self.sharding(("batch",)))


def replica_layout(tensor: int) -> Layout:
    """Where this process reads a model that it will roll out by itself: split over the devices of one replica.

    The rules are those that fit any number of heads; the rollout moves the weights to where it wants them.
    """
    replica = jax.local_devices()[:tensor]
    return Layout(make_mesh(MeshConfig(data=1, fsdp=len(replica)), replica), "fsdp")


def bytes_per_device(tree: Any) -> int:
    """Bytes that the first device of each array holds; `tree` has arrays, or abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * np.dtype(leaf.dtype).itemsize
    return total
