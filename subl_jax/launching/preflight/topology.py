"""Accelerators by name: the devices of a TPU slice that is not here, and what one chip can do."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Mapping

import jax

from subl_jax.launching.preflight.environment import LOCAL
from subl_jax.metrics.peaks import PEAKS
from subl_jax.parallel.devices import Device

_GIB = 2**30


class TopologyError(ValueError):
    """A topology that cannot be compiled for, in one line."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at best.

    Attributes:
      flops: dense bfloat16, per second.
      bandwidth: of its memory, bytes per second; memory: bytes that a program may have of it.
      links: bytes per second that it sends to its neighbours, all links together.
    """

    flops: float
    bandwidth: float
    memory: float
    links: float


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs are compiled for.

    Attributes:
      name: as it was asked for.
      devices: in JAX's order.
      chip: None where no figures of it are known (a CPU): then there is no roofline.
    """

    name: str
    devices: tuple[Device, ...]
    chip: Chip | None


# By JAX's `device_kind`. Links: interchip interconnect bandwidth of https://cloud.google.com/tpu/docs/v5e, v5p and v6e (1,600,
# 4,800 and 3,584 Gbit/s a chip), NVLink's 900 GB/s both ways on NVIDIA's data sheets. Memory: what the TPU compiler says that
# it has left of the chip's ("exceeds available HBM"); a GPU's own of its data sheet.
_LINKS_AND_MEMORY: Mapping[str, tuple[float, float]] = {
    "TPU v5 lite": (200e9, 15.75 * _GIB),
    "TPU v5": (600e9, 95.74 * _GIB),
    "TPU v6 lite": (448e9, 31.25 * _GIB),
    "NVIDIA H100 80GB HBM3": (450e9, 80e9),
    "NVIDIA H200": (450e9, 141e9),
}
# Form of a slice by generation: what an example shows, and which dimensions there are.
_GENERATIONS = {"v5e": ("v5e:8x8", 2), "v5p": ("v5p:4x4x4", 3), "v6e": ("v6e:8x8", 2)}


def chip(device_kind: str) -> Chip | None:
    """The figures of a kind of device; None where none are known."""
    if device_kind not in _LINKS_AND_MEMORY:
        return None
    links, memory = _LINKS_AND_MEMORY[device_kind]
    peak = PEAKS[device_kind]
    return Chip(peak.flops, peak.bandwidth, memory, links)


def find(name: str) -> Topology:
    """The devices of `v5p:4x4x4` and the like, or those that are here (`local`).

    Raises:
      TopologyError: an unknown generation or shape, or libtpu is missing.
    """
    if name == LOCAL:
        devices = tuple(jax.devices())
        return Topology(name, devices, chip(devices[0].device_kind))
    generation, _, shape = name.partition(":")
    if generation not in _GENERATIONS:
        near = difflib.get_close_matches(generation, _GENERATIONS, 1)
        hint = f"did you mean {_GENERATIONS[near[0]][0]}?" if near else "for example v5p:4x4x4"
        raise TopologyError(
            f"--topology={name} is of none of the generations {', '.join(_GENERATIONS)}, nor {LOCAL}; {hint}"
        )
    example, dimensions = _GENERATIONS[generation]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{dimensions - 1}}}", shape):
        raise TopologyError(
            f"--topology={name}: a slice of {generation} has {dimensions} dimensions; write it as {example}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"--topology={name} needs libtpu, which holds the TPU's compiler; install it with `pip install -e .[tpu]` "
            "(no TPU is needed), or use --topology=local"
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0].partition("=== Source")[0].strip()
        raise TopologyError(
            f"--topology={name} is no slice that libtpu knows ({said}); use one that exists, such as {example}"
        ) from error
    devices = tuple(found.devices)
    return Topology(name, devices, chip(devices[0].device_kind))
