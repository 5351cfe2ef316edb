"""Accelerators of GKE: node labels, chips of a host, and the topologies that exist.

Topologies and machine types: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

from __future__ import annotations

import dataclasses
import math

from subl_jax.launching.command import LaunchError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Beyond one cube of 4x4x4, a v5p slice is made of whole cubes, its sides in ascending order, up to 6,144 chips.
_V5P_MOST = 6144
_V5P_SIDES = (16, 16, 24)


def _v5p() -> tuple[str, ...]:
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)]
    a, b, c = (range(4, most + 1, 4) for most in _V5P_SIDES)
    cubes = [(x, y, z) for x in a for y in b for z in c if x <= y <= z and 64 < x * y * z <= _V5P_MOST]
    return tuple("x".join(map(str, shape)) for shape in small + sorted(cubes, key=math.prod))


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: its node labels, hosts, and chips of each host."""

    label: str
    topology: str
    hosts: int
    chips: int


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: its node label, and how many a host of its usual machine type has."""

    label: str
    per_host: int


LABELS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
TOPOLOGIES: dict[str, tuple[str, ...]] = {"v5e": _FLAT, "v5p": _v5p(), "v6e": _FLAT}
GPUS = {
    "l4": Gpu("nvidia-l4", 1),
    "a100": Gpu("nvidia-tesla-a100", 8),
    "a100-80gb": Gpu("nvidia-a100-80gb", 8),
    "h100": Gpu("nvidia-h100-80gb", 8),
    "h100-mega": Gpu("nvidia-h100-mega-80gb", 8),
    "h200": Gpu("nvidia-h200-141gb", 8),
    "b200": Gpu("nvidia-b200", 8),
}
CPU = "cpu"


def names() -> list[str]:
    """Every accelerator that can be asked for."""
    return [*TOPOLOGIES, *GPUS, CPU]


def _chips(topology: str) -> int:
    return math.prod(int(side) for side in topology.split("x"))


def tpu_slice(kind: str, topology: str, chips_per_host: int = 0) -> Slice:
    """A slice of a kind and topology.

    Args:
      kind: v5e, v5p or v6e.
      topology: its shape in chips, as 4x4.
      chips_per_host: 8 takes the machines that hold a 2x4 of v5e or v6e in one host; 0 the usual ones of 4.

    Raises:
      LaunchError: it does not exist; the nearest ones are named.
    """
    known = TOPOLOGIES[kind]
    if topology not in known:
        sides = topology.split("x")
        if all(side.isdigit() and int(side) for side in sides):
            wanted = _chips(topology)
            # The same number of sides first, then the nearest in size.
            order = sorted(
                known, key=lambda other: (other.count("x") != len(sides) - 1, abs(math.log(_chips(other) / wanted)))
            )
            hint = f"nearest: {', '.join(order[:3])}"
        else:
            hint = f"one reads as {known[3]}"
        raise LaunchError(f"--topology={topology or 'nothing'} does not exist for {kind}; {hint}")
    chips = _chips(topology)
    usual = min(chips, 4)
    per_host = chips_per_host or usual
    if per_host != usual and not (per_host == 8 and topology == "2x4" and kind != "v5p"):
        raise LaunchError(
            f"--chips_per_host={per_host} does not exist for {kind} {topology}: hosts have {usual} chips"
            + (", or all 8 of a 2x4" if kind != "v5p" else "")
        )
    return Slice(LABELS[kind], topology, chips // per_host, per_host)
