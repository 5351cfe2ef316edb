"""Adds up what a compiled program does: collectives and their bytes, matrix products, memory traffic, the largest buffer.

A parsed module comes in, counts of one device come out, each instruction as often as the loops around it run it.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from subl_jax.launching.preflight.hlo import Array, Computation, Instruction, Module

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: `all-gather`, `reduce-scatter`, `all-reduce`, `all-to-all` or `collective-permute`. An all-reduce of which each
        device keeps a part, in one fusion, is a reduce-scatter.
      bytes: of one device, of its larger side, each time that it is run.
      group: devices that take part together.
      times: how often it is run; loops of unknown length count once.
      arrays: its larger side.
      cause: the operation of the traced program that it comes from.
      unknown: it stands in a loop of unknown length.
    """

    kind: str
    bytes: int
    group: int
    times: int
    arrays: tuple[Array, ...]
    cause: str
    unknown: bool

    @property
    def total(self) -> int:
        """Bytes of all its runs."""
        return self.bytes * self.times

    @property
    def wire(self) -> float:
        """Bytes that a device sends in all its runs, by the algorithm that sends the least (a ring's two phases for a sum)."""
        phases = 2 if self.kind == "all-reduce" else 1
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return phases * share * self.total


def collectives(module: Module, devices: int) -> list[Collective]:
    """Every collective of the program, which runs on so many devices.

    A TPU runs some beside other work, in a chain of fusions each of which names the collective: that is one.
    """
    found, chains = [], set()
    for where, scheduled, one, times, _, unknown in module.walk():
        kind, started = one.opcode.removesuffix("-start"), one.opcode.endswith("-start")
        if kind not in _COLLECTIVES:
            continue
        chain = re.search(r'chain_id="(\d+)"', one.rest)
        if chain:
            channel = re.search(r"channel_id=(\d+)", one.rest)
            link = (scheduled, kind, chain.group(1), channel and channel.group(1))
            if link in chains:
                continue
            chains.add(link)
        group = _group(one.rest, devices)
        given = tuple(array for name in one.operands for array in where.instructions[name].shape)
        arrays, size = given, sum(array.bytes for array in given)
        if kind == "all-gather":
            size *= group
            # Of an asynchronous one the result also lists what went in.
            arrays = one.shape[len(given) :] if started else one.shape
            size = size if started else one.bytes
        if kind == "all-reduce" and _scattered(where, one):
            kind = "reduce-scatter"
        cause = re.search(r'op_name="([^"]*)"', one.rest)
        found.append(
            Collective(
                kind.removeprefix("ragged-"), size, group, times, arrays, cause.group(1) if cause else "", unknown
            )
        )
    return found


def matrix_flops(module: Module) -> float:
    """Operations of all matrix products (2 a multiplication and addition) of one device; kernels are not seen into."""
    return sum(visit.times * product_flops(visit.computation, visit.instruction) for visit in module.walk())


def traffic(module: Module) -> float:
    """Bytes that one device's memory reads and writes, as if each instruction outside fusions read and wrote all once.

    Of an array of which an instruction takes or replaces a slice, the slice counts; what stays on the chip does not.
    """
    return sum(
        visit.times * _moved(module, visit.computation, visit.instruction) for visit in module.walk() if not visit.fused
    )


def _moved(module: Module, where: Computation, one: Instruction) -> float:
    if one.opcode in _FREE:
        return 0
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * one.bytes
    if one.opcode in ("copy-start", "slice-start"):  # the result lists what is read, and what of it is written
        return sum(min(array.bytes for array in one.shape[:2]) for array in one.shape[:2] if not array.space)
    operands = [where.instructions[name] for name in one.operands]
    if one.opcode == "dynamic-update-slice":
        return 2 * operands[1].bytes
    if one.opcode != "fusion":
        return one.far_bytes + sum(operand.far_bytes for operand in operands)
    inner = module.computations[str(one.attribute("calls"))]
    moved, replaced = 0, 0
    for number, operand in enumerate(operands):
        parameter = inner.parameters.get(number)
        users = inner.users.get(parameter.name, []) if parameter else []
        if (
            parameter
            and users
            and all(
                user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter.name
                for user in users
            )
        ):
            moved += sum(user.bytes for user in users)
        elif (
            parameter
            and users
            and all(
                user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == parameter.name
                for user in users
            )
        ):
            updates = sum(
                inner.instructions[user.operands[-1 if user.opcode == "scatter" else 1]].bytes for user in users
            )
            moved += updates
            replaced += operand.bytes - updates  # the result is the operand, of which the slice is written
        else:
            moved += operand.far_bytes
    return moved + max(one.far_bytes - replaced, 0)


def largest(module: Module) -> tuple[int, str]:
    """The largest single array that an instruction outside fusions makes or gets: bytes, and its type as text."""
    size, text = 0, ""
    for visit in module.walk():
        for array in () if visit.fused else visit.instruction.shape:
            if array.bytes > size:
                size, text = array.bytes, f"{array.dtype}[{','.join(map(str, array.dims))}]"
    return size, text


_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
        "partition-id", "replica-id", "iota", "copy-done", "slice-done", "async-start", "async-done", "optimization-barrier",
    }
)  # fmt: skip


def _scattered(where: Computation, one: Instruction) -> bool:
    """Whether an all-reduce is one half of a fusion that keeps this device's slice of it."""
    if "all-reduce-scatter" in where.name:
        return True
    users = where.users.get(one.name, [])
    return bool(users) and "fused" in where.name and all(user.opcode == "dynamic-slice" for user in users)


def _group(rest: str, devices: int) -> int:
    """Devices of one group, in any of the forms in which HLO writes groups."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{('[^}]*)\}", rest)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        part = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))
        return math.prod(int(size) if size else sizes[name] for name, size in part)
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if counted:
        return int(counted.group(2))
    listed = re.search(r"replica_groups=\{\{([^}]*)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    return devices


# --- Matrix products ----------------------------------------------------------------------------------------------------


def product_flops(where: Computation, one: Instruction) -> float:
    """2 x multiplications of a `dot` or a `convolution` (which TPUs make of every product); 0 for anything else."""
    if one.opcode not in ("dot", "convolution"):
        return 0
    left, right = (where.instructions[name].shape[0] for name in one.operands[:2])
    result = one.shape[0]
    if one.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        inner = math.prod(left.dims[int(axis)] for axis in axes.group(1).split(",") if axis) if axes else 1
        return 2.0 * result.elements * inner
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        return 0
    sides = [
        dict(zip(text, array.dims, strict=True))
        for text, array in zip(labels.groups(), (left, right, result), strict=True)
    ]
    image, kernel, out = sides
    places = math.prod(
        _pairs(one.rest, number, image[axis], kernel[axis], out[axis])
        for number, axis in enumerate(sorted(label for label in kernel if label.isdigit()))
    )
    batch = re.search(r"batch_group_count=(\d+)", one.rest)
    groups = int(batch.group(1)) if batch else 1
    return (
        2.0 * out["b"] * out["f"] * kernel["i"] * places / groups
        if groups > 1
        else 2.0 * out["b"] * out["f"] * kernel["i"] * places
    )


def _pairs(rest: str, number: int, image: int, kernel: int, out: int) -> int:
    """How many (output place, kernel place) of one spatial dimension meet an element that is no padding."""
    window = re.search(r"window=\{([^}]*)\}", rest)

    def of(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", window.group(1)) if window else None
        return found.group(1).split("x")[number] if found else default

    stride, low = int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    spread, dilated = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    length = (image - 1) * spread + 1
    count = 0
    for place in range(kernel):
        offset = place * dilated - low
        count += sum(
            1 for at in range(out) if 0 <= at * stride + offset < length and (at * stride + offset) % spread == 0
        )
    return count


def holds(module: Module, tokens: int, ids: int, width: int) -> str | None:
    """The first array outside fusions that is as large as the logits of all tokens, as text; None: there is none.

    Args:
      module: of one device.
      tokens: of this device; ids: of the vocabulary that it holds.
      width: d_model: [ids, width] is the head.
    """
    for visit in module.walk():
        for array in () if visit.fused else visit.instruction.shape:
            if ids in array.dims and array.elements // ids >= tokens and array.elements // ids != width:
                return f"{array.dtype}[{','.join(map(str, array.dims))}]"
    return None
