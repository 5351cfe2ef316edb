"""Meshes for a topology: those that were asked for, or those that the model of collectives expects to be fastest.

Nothing is compiled here. Estimates rank meshes so that only few need to be.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from subl_jax.distill.memory import step_bytes
from subl_jax.distill.step import Layouts
from subl_jax.launching.preflight.programs import Case, distill, models
from subl_jax.launching.preflight.topology import Topology
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, make_mesh


class Estimate(NamedTuple):
    """What is expected of a mesh.

    Attributes:
      mesh: its axes.
      bytes: of one chip, by `distill.memory`; fits: whether that is less than there is.
      links: bytes that a chip sends in a step.
      seconds: the longer of computing and sending.
    """

    mesh: MeshConfig
    bytes: int
    fits: bool
    links: float
    seconds: float


def parse(texts: Sequence[str], like: MeshConfig, devices: int) -> list[MeshConfig]:
    """`DATAxFSDPxTENSOR` of each text, with the rules of `like`.

    Raises:
      LayoutError: another form, or a product that is not the number of devices.
    """
    found = []
    for text in texts:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise LayoutError(
                f"--mesh={text} is not data x fsdp x tensor; write for example --mesh=1x{devices}x1, or auto"
            )
        data, fsdp, tensor = (int(part) for part in text.split("x"))
        if data * fsdp * tensor != devices:
            raise LayoutError(
                f"--mesh={text} has {data * fsdp * tensor} devices, the topology {devices}; use axes whose product is "
                f"{devices}, for example --mesh=1x{devices}x1, or auto"
            )
        found.append(dataclasses.replace(like, data=data, fsdp=fsdp, tensor=tensor))
    return found


def estimates(case: Case, topology: Topology) -> list[Estimate]:
    """Every mesh that the devices and both models allow: those that are expected to fit first, the fastest first."""
    found = [one for mesh in _candidates(case.mesh, len(topology.devices)) if (one := _estimate(case, mesh, topology))]
    return sorted(found, key=lambda one: (not one.fits, one.seconds, one.links))


def _candidates(like: MeshConfig, devices: int) -> Iterator[MeshConfig]:
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for tensor in sizes:
        for fsdp in sizes:
            if devices % (tensor * fsdp) == 0:
                yield dataclasses.replace(like, data=devices // tensor // fsdp, fsdp=fsdp, tensor=tensor)


def _estimate(case: Case, mesh: MeshConfig, topology: Topology) -> Estimate | None:
    """None where something does not split."""
    try:
        program = distill(dataclasses.replace(case, mesh=mesh), topology.devices)
        made = make_mesh(mesh, topology.devices)
        layouts = Layouts(Layout(made, mesh.student_rules), Layout(made, mesh.teacher_rules))
        student, teacher = models(case)
        held = step_bytes(
            student, teacher if case.objective.needs_teacher else None, case.objective, case.train, layouts,
            case.train.row_tokens, program.tokens,
        )  # fmt: skip
    except LayoutError:
        return None
    links = 0.0
    for term in program.terms:
        group = math.prod(made.shape[axis] for axis in term.axes)
        links += term.bytes * (group - 1) / group * (2 if term.kind == "all-reduce" else 1)
    chip, total = topology.chip, sum(held.values())
    if chip is None:
        return Estimate(mesh, total, True, links, links)
    seconds = max(program.flops / made.size / chip.flops, links / chip.links)
    return Estimate(mesh, total, total <= chip.memory, links, seconds)
