"""The command of a sweep: flags in; cells, `sweep.json`, `sweep.csv`, `sweep.html`, figures and a table out.

An expected failure is one line on standard error and exit code 1; nothing is overwritten by it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from subl_jax import artifacts, sources
from subl_jax import config as configuration
from subl_jax.config import PAIRS, ExperimentConfig
from subl_jax.experiment import seeds_from_flags, stopping_with_a_line
from subl_jax.grid import cells
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.presets import PRESETS
from subl_jax.settings.registry import SETTINGS, get_setting
from subl_jax.studies import sweep
from subl_jax.studies.dissections import DISSECTIONS, listed
from subl_jax.studies.sweep import Sweep, SweepError

if TYPE_CHECKING:
    from subl_jax.studies.sweep_run import SweepRun


def define_flags() -> None:
    """The sweep's flags, and one per configuration field."""
    flags.DEFINE_multi_string(
        "vary",
        [],
        "FIELD=VALUE,VALUE,… of the configuration (with or without `config.`), e.g. student.temperature=1,2,4; given several "
        "times, every combination is a level. Parts of a list are joined by +. student.objectives=full,hard compares arms, "
        "pair=large_large,large_small pairs.",
    )
    flags.DEFINE_string("dissection", None, f"A prepared sweep instead of --vary, one of {', '.join(DISSECTIONS)}.")
    flags.DEFINE_bool("list", False, "Print the dissections with their levels, and stop.")
    flags.DEFINE_string("name", "", "Name of the sweep, of its directory too; by default the fields or the dissection.")
    flags.DEFINE_string(
        "reference",
        "",
        "Label of the level that the others are compared with; by default the one that is the configuration itself.",
    )
    flags.DEFINE_enum("setting", "api", sorted(SETTINGS), "Behavioural setting.")
    flags.DEFINE_enum(
        "preset",
        "tiny",
        sorted(PRESETS),
        "Sizes and lengths of the reference configuration: tiny are organisms for two CPU cores; paper takes "
        "--config.teacher.checkpoint; micro only exercises the stages.",
    )
    flags.DEFINE_enum("pair", None, PAIRS, "Teacher and student of the reference configuration, e.g. large_small.")
    flags.DEFINE_string(
        "workdir",
        None,
        "Work directory of an experiment, or of one setting of a grid (runs/grid/api): what is finished there is taken as it "
        "is. A killed sweep goes on there.",
    )
    flags.DEFINE_string("cells", None, "Directory of the cells and the report; by default WORKDIR/cells/NAME.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Replicates: each is a whole run from pre-training to evaluation.")
    flags.DEFINE_integer(
        "index", 0, "Which part of the seeds this process runs, counted from 0; see --of.", lower_bound=0
    )
    flags.DEFINE_integer("of", 1, "How many processes share the sweep; a part is some of the seeds.", lower_bound=1)
    flags.DEFINE_float(
        "minutes",
        None,
        "After so many minutes end behind the stage that is running; the same command goes on. By default until all is done.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool("positive_control", False, "Train and evaluate a positive control at every level besides.")
    flags.DEFINE_bool("dry_run", False, "Print the levels, what is to be run and what it costs; stop there.")
    flags.DEFINE_bool(
        "report_only", False, "Run nothing: analyse the cells of --cells, which say themselves what was swept."
    )
    processes.define_flags()
    configuration.define_flags(PRESETS["tiny"]())


def main() -> None:
    """Runs the sweep; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run()


# --- What is asked ----------------------------------------------------------------------------------------------------


def reference_from_flags() -> ExperimentConfig:
    """The reference configuration, which levels differ from.

    Raises:
      ValueError: a flag that a sweep sets itself, or more than one arm.
    """
    flag = flags.FLAGS
    ours = {
        "config.setting": "--setting",
        "config.preset": "--preset",
        "config.pair": "--pair",
        "config.student.benign_objectives": "nothing: every arm of a sweep has its benign control",
    }
    for name, instead in ours.items():
        if flag[name].present:
            raise SweepError(f"--{name} is set by the sweep: use {instead}")
    arms = flag["config.student.objectives"].value or ()
    if len(arms) > 1:
        raise SweepError(
            f"--config.student.objectives={','.join(arms)}: a level has one arm; to compare arms use "
            "--vary=student.objectives=full,hard, and for the positive one --positive_control"
        )
    config = configuration.from_flags(PRESETS[flag.preset](flag.setting))
    return sources.resolve(dataclasses.replace(config, pair=flag.pair or config.pair))


def sweep_from_flags(config: ExperimentConfig) -> Sweep:
    """What is swept.

    Raises:
      ValueError: neither or both of --vary and --dissection, or one that is unknown.
    """
    flag = flags.FLAGS
    if bool(flag.vary) == bool(flag.dissection):
        raise SweepError(
            "say what varies: either --vary=FIELD=VALUE,VALUE or --dissection=NAME, of " + ", ".join(DISSECTIONS)
        )
    if flag.dissection and flag.dissection not in DISSECTIONS:
        raise SweepError(
            f"--dissection={flag.dissection} is unknown; use one of {', '.join(DISSECTIONS)}"
            f"{sweep.near(flag.dissection, DISSECTIONS)}"
        )
    if flag.dissection:
        found = DISSECTIONS[flag.dissection]
        return dataclasses.replace(found, name=flag.name or found.name, reference=flag.reference or found.reference)
    from subl_jax.studies.sweep_variants import namer

    return sweep.from_flags(flag.vary, config, flag.name, flag.reference, namer(config))


def _places(name: str) -> tuple[Path, Path]:
    """The work directory and that of the cells."""
    flag = flags.FLAGS
    if not flag.workdir:
        raise SweepError("--workdir is not given; say where the artifacts go or lie already, e.g. --workdir=runs/sweep")
    workdir = artifacts.workdir(flag.workdir).absolute()
    if not (workdir / "config.json").exists() and (workdir / flag.setting / "config.json").exists():
        raise SweepError(
            f"{workdir} is that of a grid, which has a work directory per setting: use --workdir={workdir / flag.setting}"
        )
    directory = artifacts.workdir(flag.cells).absolute() if flag.cells else workdir / "cells" / name
    return workdir, directory


def _refuse_flags_of_a_run() -> None:
    """Refuses flags that a report from cells would not look at."""
    flag = flags.FLAGS
    fields = [name for name, _, _ in configuration.leaves(PRESETS["tiny"]())]
    named = (
        "vary",
        "dissection",
        "name",
        "reference",
        "setting",
        "preset",
        "pair",
        "seeds",
        "positive_control",
        "workdir",
    )
    given = [name for name in (*named, *fields) if flag[name].present]
    if given:
        raise SweepError(
            f"--{given[0]} does nothing with --report_only: what was swept stands in design.json beside the cells"
        )
    if not flag.cells:
        raise SweepError("--report_only needs --cells; say where the cells lie, e.g. --cells=docs/sweeps/temperature")


# --- The run ----------------------------------------------------------------------------------------------------------


def _run() -> None:
    flag = flags.FLAGS
    if flag.list:
        print(listed())
        return
    if flag.report_only:
        _refuse_flags_of_a_run()
        from subl_jax.studies.sweep_run import SweepRun, read_design

        directory = artifacts.workdir(flag.cells).absolute()
        design = read_design(directory)
        # No stage lies here: the plan only says which configuration every cell must be of.
        _report(SweepRun(design, directory / ".none", directory))
        return
    config, seeds = reference_from_flags(), seeds_from_flags()
    plan = sweep_from_flags(config)
    workdir, directory = _places(plan.name)
    if config.preset == "paper" and not sources.checkpoints(config):
        raise SweepError(
            "--preset=paper starts from checkpoints and --config.teacher.checkpoint names none; give Hugging Face folders"
        )
    processes.only_one("experiments.sweep")
    configure_cpu(config.cpu_devices)
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax import conditions
    from subl_jax.grid.command import cost_lines, known_costs, needed_stages, run_units
    from subl_jax.studies.sweep_run import Design, SweepRun, write_design

    setting = get_setting(config.setting)
    design = Design(conditions.with_slots(config, workdir), plan, seeds, flag.positive_control)
    run = SweepRun(design, workdir, directory)
    units = run.units(flag.index, flag.of)
    print("\n".join(levels_text(run)), flush=True)  # every level is checked here
    if setting.prepare is not None:
        setting.prepare()  # before anything is written
    needed, costs = needed_stages(run, units), known_costs(run, flag.preset)
    if flag.dry_run:
        print("\n".join(["", *_stages_text(needed), "", *cost_lines(needed, costs)]))
        return
    print("\n".join(["", *cost_lines(needed, costs)]), flush=True)
    artifacts.check_writable(workdir, free_bytes=run.bytes_written(units))
    if not (workdir / "config.json").exists():  # an experiment's or a grid's own stays as it is
        artifacts.write_json_atomic(workdir / "config.json", artifacts.plain(design.config))
    write_design(directory, design)
    failures = run_units(run, units, needed, costs)
    _report(run)
    if failures:
        for failure in failures:
            print(f"error: {failure.stage}: {failure.why}", file=sys.stderr)
        sys.exit(1)


def levels_text(run: SweepRun) -> list[str]:
    """A line per level: its label, and what its outputs are called besides."""
    design = run.design
    width = max(len(level.label) for level in design.sweep.levels)
    lines = [f"{design.sweep.name}: {len(design.sweep.levels)} levels, {len(design.seeds)} seeds, {design.sweep.title}"]
    for level in design.sweep.levels:
        member = design.member(level)
        student, _, _ = sweep.conditions_of_arm(member.config)
        pair = "" if member.config.pair == "large_large" else f"@{member.config.pair}"
        mark = "  (reference)" if level.label == design.sweep.reference else ""
        lines.append(f"  {level.label.ljust(width)}  {student}{pair}{member.variant.get('students', '')}{mark}")
    return lines


def _stages_text(needed: Mapping[tuple[str, int], list[str]]) -> list[str]:
    return [
        f"seed {seed}: {len(stages)} stages" + (f": {', '.join(stages)}" if stages else "")
        for (_, seed), stages in needed.items()
    ]


def _report(run: SweepRun) -> None:
    """Analyses the cells that are there; writes everything beside them, and prints the table."""
    from subl_jax.grid.locks import one_at_a_time
    from subl_jax.report import figures, sweep_table
    from subl_jax.report import sweep as report
    from subl_jax.studies.sweep_analysis import analyse

    directory, design = run.cells, run.design
    directory.mkdir(parents=True, exist_ok=True)
    # Of processes that share a sweep the last one shows what all have made.
    with one_at_a_time(directory / ".report.lock", "writes the report"):
        hashes = {key: value for unit in run.units() for key, value in run.plan(unit).hashes.items()}
        document = analyse(directory, design, hashes, cells.read_failures(directory / "failures.json"))
        artifacts.write_json_atomic(directory / "sweep.json", document)
        artifacts.write_text_atomic(directory / "sweep.csv", sweep_table.csv_text(document))
        report.write_report(directory / "sweep.html", document, artifacts.plain(design.config))
        figures.export(directory / "figures", report.drawings(document))
        print(sweep_table.render(document))
        print("  ".join(str(directory / name) for name in ("sweep.json", "sweep.csv", "sweep.html", "figures")))
