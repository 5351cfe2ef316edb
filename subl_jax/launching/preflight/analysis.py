"""Compiles a program and tells what it holds, computes and moves: one plain row per program and mesh."""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from subl_jax.launching.preflight import counts, expected
from subl_jax.launching.preflight.hlo import Module
from subl_jax.launching.preflight.programs import Program
from subl_jax.launching.preflight.topology import Chip, Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# How the TPU compiler says that a program does not fit; the first number is what it needs.
_EXCEEDS = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds|Used ([\d.]+)([KMGT]?)B? of")
# A collective of fewer bytes in all is not listed by itself.
_LISTED = 1_000_000


def analyse(program: Program, topology: Topology, steps: int = 1) -> dict[str, Any]:
    """Compiles a program; a row of plain JSON (`docs/PREFLIGHT.md` explains every field).

    Args:
      program: of `programs`.
      topology: whose devices it was made for.
      steps: of a run, for its chip-hours.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the program for another reason than memory.
    """
    row: dict[str, Any] = {
        "topology": topology.name,
        "mesh": program.mesh,
        "program": program.name,
        "devices": program.devices,
        "held_bytes": dict(program.held),
        "limit_bytes": topology.chip.memory if topology.chip else None,
        "flops": program.flops,
        "tokens": program.tokens,
        "expected_collective_bytes": sum(term.bytes for term in program.terms),
        "expected_by_kind": expected.by_kind(program.terms),
        "expected": [term._asdict() for term in program.terms],
    }
    began = time.perf_counter()
    lowered = program.lower()
    row["lower_s"] = time.perf_counter() - began
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exceeded(str(error))
        if needed is None:
            raise
        return row | {
            "compile_s": time.perf_counter() - began,
            "fits": False,
            "bytes_per_chip": needed + program.beside,
            "bytes_by_kind": {"needed": needed, "beside": program.beside},
        }
    row["compile_s"] = time.perf_counter() - began
    return row | _memory(compiled, program, topology) | _work(compiled, program, topology.chip, steps)


def exceeded(message: str) -> float | None:
    """Bytes that a program needs, of the compiler's message that they are too many; None if it says something else."""
    found = _EXCEEDS.search(message)
    if found is None:
        return None
    number, unit = (found.group(1), found.group(2)) if found.group(1) else (found.group(3), found.group(4))
    return float(number) * _UNITS[unit]


def _memory(compiled: Any, program: Program, topology: Topology) -> dict[str, Any]:
    stats = compiled.memory_analysis()
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        # Donated arguments come out in their own place.
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "beside": program.beside,
    }
    total = sum(kinds.values())
    return {
        "fits": topology.chip is None or total <= topology.chip.memory,
        "bytes_per_chip": total,
        "bytes_by_kind": kinds,
    }


def _work(compiled: Any, program: Program, chip: Chip | None, steps: int) -> dict[str, Any]:
    module = Module(compiled.as_text())
    collectives = counts.collectives(module, program.devices)
    moved = dict.fromkeys(expected.KINDS, 0)
    for one in collectives:
        moved[one.kind] += one.total
    size, text = counts.largest(module)
    matrices, traffic = counts.matrix_flops(module), counts.traffic(module)
    wire = sum(one.wire for one in collectives)
    row: dict[str, Any] = {
        "compiled_flops_per_chip": matrices + program.kernel_flops,
        "memory_bytes_per_chip": program.required_bytes or traffic,
        "collective_bytes": sum(moved.values()),
        "collective_by_kind": moved,
        "wire_bytes": wire,
        "collectives": [
            {
                "kind": one.kind,
                "bytes": one.total,
                "times": one.times,
                "group": one.group,
                "arrays": [f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in one.arrays],
                "cause": one.cause,
            }
            for one in sorted(collectives, key=lambda one: -one.total)
            if one.total >= _LISTED
        ],
        "largest_buffer_bytes": size,
        "largest_buffer": text,
        "holds_all_logits": counts.holds(module, *program.logits) if program.logits else None,
        "loops_of_unknown_length": module.unknown_loops(),
        "xla_flops_loops_once": (compiled.cost_analysis() or {}).get("flops"),
    }
    if chip is None:
        return row | dict.fromkeys(("roofline_s", "predicted_mfu", "tokens_per_s", "chip_hours"))
    parts = {
        "compute": row["compiled_flops_per_chip"] / chip.flops,
        "memory": row["memory_bytes_per_chip"] / chip.bandwidth,
        "links": wire / chip.links,
    }
    seconds = max(parts.values())
    return row | {
        "roofline_s": seconds,
        "roofline_parts_s": parts,
        "bound": max(parts, key=lambda name: parts[name]),
        "predicted_mfu": program.flops / (seconds * chip.flops * program.devices) if seconds else None,
        "tokens_per_s": program.tokens / seconds if seconds else None,
        "chip_hours": steps * seconds * program.devices / 3600 if program.name == "distill" else None,
    }
