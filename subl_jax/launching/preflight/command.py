"""The command `launch.preflight`: flags in; tables, JSON and an exit code out.

Exit codes: 0 everything fits, 1 an expected error (one line), 3 a program does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from subl_jax import config as configuration
from subl_jax.config import PAIRS, ExperimentConfig
from subl_jax.distill.objective import Objective
from subl_jax.launching.preflight import acting, meshes, programs, search, shapes, tables, topology
from subl_jax.launching.preflight.analysis import analyse
from subl_jax.launching.preflight.programs import Case, Program
from subl_jax.launching.preflight.topology import Topology
from subl_jax.presets import PRESETS

DOES_NOT_FIT = 3
PROGRAMS = ("distill", "rollout", "evaluate")


def define_flags() -> None:
    """The flags of the command, and one per configuration field."""
    flags.DEFINE_string(
        "topology",
        "v5p:4x4x4",
        "TPU slice to compile for, v5e:8x8, v5p:4x4x4, v6e:8x8 and the like; local: the devices here.",
    )
    flags.DEFINE_enum("preset", "paper", sorted(PRESETS), "Sizes and lengths, as the experiments have them.")
    flags.DEFINE_enum("pair", "large_small", PAIRS, "Teacher and student size of the preset.")
    flags.DEFINE_string("teacher_shape", None, f"Teacher's shape in place of the preset's: {', '.join(shapes.SHAPES)}.")
    flags.DEFINE_string("student_shape", None, "Student's shape, of the same names.")
    flags.DEFINE_integer(
        "batch", None, "Rows of a step, over all devices (--config.student.train.batch_rows).", lower_bound=1
    )
    flags.DEFINE_integer("seq", None, "Tokens of a row (--config.student.train.row_tokens).", lower_bound=1)
    flags.DEFINE_integer("accumulate", None, "Parts of a step (--config.student.train.accumulate).", lower_bound=1)
    flags.DEFINE_list("programs", list(PROGRAMS), f"What is compiled, of {', '.join(PROGRAMS)}.")
    flags.DEFINE_list(
        "mesh", None,
        "Meshes of the training step, data x fsdp x tensor, e.g. 1x64x1,4x16x1; auto: the --best that the model of "
        "collectives expects to be fastest. By default what --config.parallel.* says, else auto.",
    )  # fmt: skip
    flags.DEFINE_integer("best", 2, "Of --mesh=auto, how many are compiled.", lower_bound=1)
    flags.DEFINE_bool(
        "largest_batch", False, "Find the largest batch that fits: three or more compilations for each mesh."
    )
    flags.DEFINE_bool("collectives", False, "List every collective, expected and compiled.")
    flags.DEFINE_string("out", None, "Write rows[] as JSON to this file.")
    configuration.define_flags(PRESETS["paper"]("api"), "paper preset")


def case_from_flags() -> Case:
    """What the flags describe.

    Raises:
      ValueError: an unknown shape, or values that the configuration refuses.
    """
    given = flags.FLAGS
    config: ExperimentConfig = configuration.from_flags(PRESETS[given.preset]("api"))
    config = dataclasses.replace(config, pair=given.pair)
    teacher, student = (config.model(size) for size in config.sizes())
    teacher = shapes.shape(given.teacher_shape) if given.teacher_shape else teacher
    student = shapes.shape(given.student_shape) if given.student_shape else student
    changes = {"batch_rows": given.batch, "row_tokens": given.seq, "accumulate": given.accumulate}
    train = dataclasses.replace(
        config.student.train, **{name: value for name, value in changes.items() if value is not None}
    )
    loss = configuration.OBJECTIVES[config.student.objectives[0]][0]
    return Case(
        teacher=teacher,
        student=dataclasses.replace(student, lora=config.student.adapters),
        objective=Objective(loss, temperature=config.student.temperature),  # type: ignore[arg-type]
        train=train,
        mesh=config.parallel,
        sampling=dataclasses.replace(config.rollout, slots=config.rollout.slots or 1),
        groups=config.engine.groups,
        tensor=config.engine.tensor,
    )


def main() -> None:
    """Runs the command; ends the process with its exit code."""
    try:
        code = run(flags.FLAGS.topology)
    except (ValueError, OSError) as error:
        logging.debug("failed", exc_info=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    sys.exit(code)


def run(name: str) -> int:
    """Compiles, prints, writes; the exit code."""
    wanted = _programs(flags.FLAGS.programs)
    case = case_from_flags()
    place = topology.find(name)
    print(tables.heading(case, place))
    rows: list[dict[str, Any]] = []

    def add(program: Program) -> dict[str, Any]:
        row = analyse(program, place, case.train.steps)
        rows.append(row)
        print(tables.progress(row), flush=True)
        return row

    if "distill" in wanted:
        for mesh in _meshes(case, place):
            own = dataclasses.replace(case, mesh=mesh)
            row = add(programs.distill(own, place.devices))
            if flags.FLAGS.largest_batch:
                row["largest_batch"] = largest_batch(own, place)
    if "rollout" in wanted:
        for program in acting.programs(case, place.devices):
            add(program)
    if "evaluate" in wanted:
        for role in ("student", "teacher"):
            add(programs.evaluate(case, place.devices, role))
    print(tables.render(rows, collectives=flags.FLAGS.collectives))
    if flags.FLAGS.out:
        Path(flags.FLAGS.out).parent.mkdir(parents=True, exist_ok=True)
        Path(flags.FLAGS.out).write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
        print(flags.FLAGS.out)
    return 0 if fits(rows) else DOES_NOT_FIT


def fits(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether every program fits, the training step over at least one of its meshes."""
    training = [row["fits"] for row in rows if row["program"] == "distill"]
    return all(row["fits"] for row in rows if row["program"] != "distill") and (not training or any(training))


def _programs(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in PROGRAMS:
            raise ValueError(f"--programs={','.join(names)}: {name!r} is none of {', '.join(PROGRAMS)}")
    return names


def _meshes(case: Case, place: Topology) -> list[Any]:
    texts = flags.FLAGS.mesh
    if not texts and (case.mesh.data, case.mesh.fsdp, case.mesh.tensor) != (0, 1, 1):
        return [case.mesh]
    if texts and texts != ["auto"]:
        return meshes.parse(texts, case.mesh, len(place.devices))
    found = meshes.estimates(case, place)
    if not found:
        raise ValueError(
            f"no mesh of {len(place.devices)} devices splits --batch={case.train.batch_rows} in {case.train.accumulate} parts "
            "and both models; use a batch that is a multiple of the devices times --accumulate"
        )
    print(tables.estimates(found))
    return [one.mesh for one in found[: flags.FLAGS.best]]


def largest_batch(case: Case, place: Topology, measure: Callable[[Case], float] | None = None) -> int:
    """The most rows of a step that fit, at the same number of parts; 0: none.

    Args:
      case, place: as compiled.
      measure: bytes of one chip; by default those of a compilation.
    """
    if place.chip is None:
        raise ValueError(f"--largest_batch needs a chip whose memory is known; {place.devices[0].device_kind} is none")

    def with_rows(rows: int) -> Case:
        return dataclasses.replace(case, train=dataclasses.replace(case.train, batch_rows=rows))

    def compiled(of: Case) -> float:
        row = analyse(programs.distill(of, place.devices), place)
        print(f"  {of.train.batch_rows} rows: {row['bytes_per_chip'] / 2**30:.2f} GiB", flush=True)
        return row["bytes_per_chip"]

    ask = measure or compiled
    unit = programs.rows_unit(case, place.devices)
    return search.largest(lambda rows: ask(with_rows(rows)), place.chip.memory, unit, case.train.batch_rows).rows
