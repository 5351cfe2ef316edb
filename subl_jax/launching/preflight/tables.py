"""Rows of a preflight as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from subl_jax.launching.preflight import expected
from subl_jax.launching.preflight.meshes import Estimate
from subl_jax.launching.preflight.programs import Case, mesh_text
from subl_jax.launching.preflight.topology import Topology

_GIB, _GB = 2**30, 1e9
# Meshes of an estimate that are shown.
_SHOWN = 12


def heading(case: Case, place: Topology) -> str:
    """What is compiled, for what."""
    train, adapted = case.train, case.student.lora is not None
    chip = place.chip
    limit = f", {chip.memory / _GIB:.2f} GiB and {chip.flops / 1e12:.0f} TFLOP/s each" if chip else ""
    return "\n".join(
        [
            f"preflight: {place.name}, {len(place.devices)} x {place.devices[0].device_kind}{limit}",
            f"teacher {_model(case.teacher)}; student {_model(case.student)}, {'adapters' if adapted else 'all of it'} trained",
            f"{train.batch_rows} rows x {train.row_tokens} tokens in {train.accumulate} parts, {case.objective.loss}; rollout "
            f"{case.sampling.slots} slots x {case.sampling.context}, tensor={case.tensor}",
        ]
    )


def _model(config: Any) -> str:
    return f"{config.num_layers} layers of {config.d_model}, vocabulary {config.vocab_size}, remat {config.remat}"


def progress(row: dict[str, Any]) -> str:
    """One line after a compilation."""
    return f"compiled {row['program']} over {row['mesh']} in {row['compile_s']:.0f} s"


def estimates(found: Sequence[Estimate]) -> str:
    """Expected meshes, the best first."""
    rows = [
        (
            mesh_text(one.mesh, 1),
            "yes" if one.fits else "no",
            f"{one.bytes / _GIB:.1f}",
            f"{one.links / _GB:.1f}",
            f"{one.seconds:.2f}",
        )
        for one in found[:_SHOWN]
    ]
    return "\n".join(["", *aligned(("estimated mesh", "fits", "GiB/chip", "GB sent/chip", "step, s"), rows)])


def render(rows: Sequence[dict[str, Any]], collectives: bool = False) -> str:
    """The tables: memory, then work; with a recommended mesh where several were compiled."""
    blocks = [_memory(rows), _work([row for row in rows if "roofline_s" in row])]
    if collectives:
        blocks += [_listed(row) for row in rows if row.get("collective_bytes")]
    best = recommended(rows)
    if best:
        blocks.append([f"recommended mesh (data x fsdp x tensor): {best}"])
    return "\n" + "\n\n".join("\n".join(block) for block in blocks if block)


def recommended(rows: Sequence[dict[str, Any]]) -> str | None:
    """The mesh of the fastest training step that fits, of several; the one that sends least where times are equal."""
    training = [row for row in rows if row["program"] == "distill"]
    fitting = [row for row in training if row["fits"] and row.get("roofline_s")]
    if len(training) < 2 or not fitting:
        return None
    return min(fitting, key=lambda row: (round(row["roofline_s"], 3), row["wire_bytes"]))["mesh"]


def _memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = ("arguments", "outputs", "temporaries", "code", "beside")
    header = ("program", "mesh", "fits", "GiB/chip", *names, "of it held", "largest buffer, GiB", "compile, s")
    table = []
    for row in rows:
        kinds = row["bytes_by_kind"]
        held = " ".join(f"{name} {size / _GIB:.2f}" for name, size in row["held_bytes"].items() if size > 0.005 * _GIB)
        largest = (
            f"{row['largest_buffer_bytes'] / _GIB:.2f} {row['largest_buffer']}" if "largest_buffer" in row else "-"
        )
        limit = "" if row["fits"] else f" of {row['limit_bytes'] / _GIB:.2f}"
        table.append(
            (
                row["program"],
                row["mesh"],
                "yes" if row["fits"] else "NO",
                f"{row['bytes_per_chip'] / _GIB:.2f}{limit}",
                *(f"{kinds[name] / _GIB:.2f}" if name in kinds else "-" for name in names),
                held,
                largest,
                f"{row['compile_s']:.0f}",
            )
        )
    lines = aligned(header, table)
    for row in rows:
        if row.get("holds_all_logits"):
            lines.append(
                f"{row['program']} over {row['mesh']} holds the logits of all tokens: {row['holds_all_logits']}"
            )
        if "largest_batch" in row:
            lines.append(
                f"{row['program']} over {row['mesh']}: the largest batch that fits is {row['largest_batch']} rows"
            )
    return lines


def _work(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    header = (
        "program", "mesh", "TFLOP", "compiled/chip", "collectives, GB", "expected", "off by", "compute", "memory", "links, s",
        "roofline, s", "MFU <=", "tokens/s <=", "chip-hours >=",
    )  # fmt: skip
    table = []
    for row in rows:
        moved, wanted = row["collective_bytes"], row["expected_collective_bytes"]
        parts = row.get("roofline_parts_s")
        known = parts is not None
        table.append(
            (
                row["program"],
                row["mesh"],
                f"{row['flops'] / 1e12:.3g}",
                f"{row['compiled_flops_per_chip'] / 1e12:.3g}",
                f"{moved / _GB:.4g}",
                f"{wanted / _GB:.4g}",
                f"{moved / wanted - 1:+.1%}" if wanted else "-",
                *(f"{parts[name]:.3g}" if parts else "-" for name in ("compute", "memory", "links")),
                f"{row['roofline_s']:.3g}" if known else "-",
                f"{row['predicted_mfu']:.1%}" if known and row["predicted_mfu"] else "-",
                f"{row['tokens_per_s']:,.0f}" if known and row["tokens_per_s"] else "-",
                f"{row['chip_hours']:,.1f}" if row.get("chip_hours") else "-",
            )
        )
    return aligned(header, table)


def _listed(row: dict[str, Any]) -> list[str]:
    kinds = [
        (kind, f"{row['expected_by_kind'][kind]:,}", f"{row['collective_by_kind'][kind]:,}")
        for kind in expected.KINDS
        if row["expected_by_kind"][kind] or row["collective_by_kind"][kind]
    ]
    wanted = [(term["cause"], term["kind"], f"{term['bytes']:,}") for term in row["expected"]]
    compiled = [
        (" ".join(one["arrays"])[:70], one["kind"], str(one["times"]), str(one["group"]), f"{one['bytes']:,}")
        for one in row["collectives"]
    ]
    return [
        f"{row['program']} over {row['mesh']}",
        *aligned(("kind", "expected, B", "compiled, B"), kinds),
        "",
        *aligned(("expected", "kind", "bytes"), wanted),
        "",
        *aligned(("compiled", "kind", "times", "devices", "bytes"), compiled),
    ]


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header and a rule: the first column to the left, the others to the right, two spaces between."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
