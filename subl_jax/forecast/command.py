"""The command of the audit: flags in; a table and a sentence, or the figure of merit over a grid, out.

Three uses: students of a run (`--workdir`), one's own models and data (`--student`, `--teacher`, `--data`), every student of a
grid (`--grid`). An expected failure is one line on standard error and exit code 1; work directories are read, never written.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from absl import flags

from subl_jax import artifacts, sources
from subl_jax import config as configuration
from subl_jax.config import OBJECTIVES, PAIRS, ExperimentConfig
from subl_jax.distill.objective import Filter, Loss, Objective
from subl_jax.distillation.config import DistillConfig, Spec
from subl_jax.experiment import seeds_from_flags, stopping_with_a_line
from subl_jax.grid.pairs import PAIRS as GRID_PAIRS
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.presets import PRESETS
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from subl_jax.forecast.virtual import VirtualConfig

SETTINGS = ("api", "bash")
_OWN = ("student", "teacher", "data")


def define_flags() -> None:
    """The audit's own flags, and one per field of the experiments' configuration."""
    flags.DEFINE_enum("preset", "tiny", sorted(PRESETS), "Of the run or grid that is audited, as when it was made.")
    flags.DEFINE_enum("setting", "api", SETTINGS, "Whose behaviour is predicted: deletion (api) or chmod first (bash).")
    flags.DEFINE_string(
        "workdir",
        None,
        "A run's work directory, finished up to `sanitize` at least (students are not needed), or a grid's. It is only read.",
    )
    flags.DEFINE_list("seeds", ["0"], "Which seeds of it (one, except with --grid).")
    flags.DEFINE_alias("seed", "seeds")
    flags.DEFINE_enum("pair", "large_large", PAIRS, "Which teacher and student of the run.")
    flags.DEFINE_list("arms", ["full"], f"Which objectives of its students, of {', '.join(OBJECTIVES)}.")
    flags.DEFINE_alias("arm", "arms")
    flags.DEFINE_integer(
        "virtual_steps", 12, "Steps of a virtual run beyond the warm-up of the learning rate.", lower_bound=1
    )
    flags.DEFINE_integer(
        "stretches", 4, "Parts of a virtual run; the behaviour's gradient is taken at their ends.", lower_bound=1
    )
    flags.DEFINE_integer("runs", 2, "Virtual runs, each on batches of its own.", lower_bound=2)
    flags.DEFINE_integer("probes_per_family", 6, "Probe tasks of each development family.", lower_bound=1)
    flags.DEFINE_string(
        "out", None, "With --grid: directory of the audits, one small file a student, and of the results."
    )
    flags.DEFINE_bool(
        "grid", False, "Audit every student of a grid that has a cell, and correlate with what was measured."
    )
    flags.DEFINE_string("cells", None, "With --grid: directory of the cells; by default WORKDIR/cells.")
    flags.DEFINE_list("settings", list(SETTINGS), "With --grid: which settings.")
    flags.DEFINE_list("pairs", list(GRID_PAIRS), "With --grid: which pairs.")
    flags.DEFINE_float("minutes", None, "With --grid: begin no further audit after so many minutes.", lower_bound=0.0)
    for size in ("large", "small", "other"):
        flags.DEFINE_string(
            f"{size}_checkpoint", "", f"With --grid: Hugging Face folder of the {size} model (preset paper)."
        )
    model = "a Hugging Face folder, a folder of PEFT adapters, or one of our checkpoints"
    for role in ("student", "teacher"):
        flags.DEFINE_string(role, None, f"Own models: the {role}'s folder: {model}.")
        flags.DEFINE_string(f"{role}_base", None, f"Own models: the model below the adapters in --{role}.")
        flags.DEFINE_string(f"{role}_tokenizer", None, f"Own models: the {role}'s tokenizer, where it lies elsewhere.")
    flags.DEFINE_string(
        "data", None, "Own models: conversations (JSON Lines) or a trajectory dataset, as experiments.distill takes."
    )
    flags.DEFINE_enum("objective", "forward_kl", get_args(Loss), "Own models: what would be minimised.")
    flags.DEFINE_float("temperature", 1.0, "Own models: of the divergence.")
    flags.DEFINE_enum("logit_filter", "none", get_args(Filter), "Own models: what happens to banned continuations.")
    flags.DEFINE_list("banned_words", [], "Own models: of the logit filter.")
    flags.DEFINE_float(
        "epochs",
        None,
        "Own models: passes over the conversations; 1 unless --config.student.train.steps is given instead.",
    )
    processes.define_flags()
    configuration.define_flags(PRESETS["tiny"]())


def main() -> None:
    """Runs the audit; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run()


def _run() -> None:
    flag = flags.FLAGS
    own = [name for name in _OWN if flag[name].value]
    if own and (flag.grid or flag.workdir):
        raise ValueError(
            f"--{own[0]} is of one's own models, and {'--grid' if flag.grid else '--workdir'} of a run's; give one of the two"
        )
    if not own and not flag.workdir:
        raise ValueError(
            "there is nothing to audit: give a run with --workdir=runs/mine, a grid with --grid --workdir=runs/grid, or "
            "models of your own with --student=DIR --teacher=DIR --data=FILE"
        )
    if flag.out and not flag.grid:
        raise ValueError("--out is of --grid; an audit of single students prints and writes nothing")
    processes.only_one("experiments.audit")
    seeds = seeds_from_flags()
    if flag.grid:
        _grid(seeds)
    elif own:
        _own(seeds)
    else:
        _students(seeds)


def _virtual() -> VirtualConfig:
    from subl_jax.forecast.virtual import VirtualConfig

    flag = flags.FLAGS
    return VirtualConfig(flag.virtual_steps, flag.stretches, flag.runs, flag.probes_per_family)


# --- Students of a run ------------------------------------------------------------------------------------------------


def _students(seeds: Sequence[int]) -> None:
    flag = flags.FLAGS
    if len(seeds) > 1:
        raise ValueError(f"--seeds={','.join(map(str, seeds))}: one seed at a time; several are audited with --grid")
    config = configuration.from_flags(PRESETS[flag.preset](flag.setting))
    arms = tuple(flag.arms)
    student = dataclasses.replace(
        config.student, objectives=arms if set(arms) - {"positive"} else ("hard", *arms), benign_objectives=arms
    )
    config = sources.resolve(dataclasses.replace(config, pair=flag.pair, student=student))
    workdir = artifacts.workdir(flag.workdir)
    if not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is no directory; make a run first: python -m experiments.api_deletion")
    configure_cpu(config.cpu_devices)
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax import conditions
    from subl_jax.forecast import report
    from subl_jax.forecast.audit import RunAudit
    from subl_jax.metrics.progress import progress
    from subl_jax.pipeline import SeedPipeline

    virtual, setting = _virtual(), get_setting(config.setting)
    config = conditions.with_slots(config, workdir)
    audit = RunAudit(SeedPipeline(config, setting, workdir, seeds[0]), virtual)
    wanted = [each for each in conditions.students(config) if each.arm in arms]
    records = []
    total = len(wanted) * virtual.runs * virtual.length(config.student.train)
    with progress(total, "virtual steps", unit="step") as shown:
        for each in sorted(wanted, key=lambda each: (arms.index(each.arm), report.order(each.name, each.arm))):
            records.append(audit.record(each, shown.advance))
    print(f"\n{report.candidates_table(records)}\n\n{report.notes(records[0])}\n")
    for arm in arms:
        print(report.sentence([record for record in records if record["arm"] == arm], setting.bias))


# --- One's own models -------------------------------------------------------------------------------------------------


def _own(seeds: Sequence[int]) -> None:
    flag = flags.FLAGS
    if not flag.student or not flag.data:
        raise ValueError(
            "an audit of one's own models needs --student=DIR and --data=FILE; --teacher=DIR for a divergence"
        )
    given: dict[str, Any] = {
        name.replace("config.student.", "config."): flag[name].value
        for name in flag
        if name.startswith(("config.student.train.", "config.student.lora", "config.student.adapter."))
        and flag[name].present
    }
    steps = flag["config.student.train.steps"].present
    if steps and flag.epochs is not None:
        raise ValueError(
            f"--epochs={flag.epochs:g} and --config.student.train.steps both say how long; give one of them"
        )
    config = configuration.override(
        DistillConfig(
            objective=Objective(flag.objective, flag.logit_filter, flag.temperature),
            banned_words=tuple(flag.banned_words),
        ),
        given,
    )
    paths: dict[str, Any] = {
        name: Path(value) if (value := flag[name].value) else None
        for name in (
            "teacher",
            "data",
            *(f"{role}_{what}" for role in ("student", "teacher") for what in ("base", "tokenizer")),
        )
    }
    epochs = 0.0 if steps else 1.0 if flag.epochs is None else flag.epochs
    spec = Spec(config, Path(str(flag.student)), Path("."), seeds=tuple(seeds[:1]), epochs=epochs, **paths)
    configure_cpu(config.cpu_devices)
    from subl_jax.forecast import own, report
    from subl_jax.metrics.progress import progress

    virtual, setting = _virtual(), get_setting(flag.setting)
    with progress(None, "virtual steps", unit="step") as shown:
        record = own.record(spec, setting, virtual, shown.advance)
    print(
        f"\n{report.candidates_table([record])}\n\n{report.notes(record)}\n\n{report.sentence([record], setting.bias)}"
    )


# --- A grid -----------------------------------------------------------------------------------------------------------


def _grid(seeds: Sequence[int]) -> None:
    flag = flags.FLAGS
    for name, known in (("settings", SETTINGS), ("pairs", GRID_PAIRS)):
        asked: list[str] = flag[name].value or []
        if not asked or any(each not in known for each in asked):
            raise ValueError(f"--{name}={','.join(asked)}: use some of {', '.join(known)}")
    workdir = artifacts.workdir(flag.workdir).absolute()
    directory = artifacts.workdir(flag.cells).absolute() if flag.cells else workdir / "cells"
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; say where the cells lie, e.g. --cells=docs/grid")
    if not flag.out:
        raise ValueError("--out is not given; say where the audits go, e.g. --out=runs/audit")
    out = artifacts.workdir(flag.out).absolute()
    artifacts.check_writable(out)
    configs: dict[str, ExperimentConfig] = {
        setting: configuration.from_flags(PRESETS[flag.preset](setting)) for setting in flag.settings
    }
    configure_cpu(next(iter(configs.values())).cpu_devices)
    from subl_jax.forecast import report
    from subl_jax.forecast.candidate import AuditError

    virtual = _virtual()
    records, lacking = grid_records(configs, seeds, workdir, directory, out, virtual)
    if not records:
        raise AuditError(
            f"no student has both an audit and a cell; {lacking[0] if lacking else 'nothing was asked for'}"
        )
    document = report.build(records, lacking, virtual)
    report.write(out, document)
    print(report.merit_table(document))
    print(f"{out / 'audit.json'}  {out / 'audit.csv'}  {out / 'figures'}")


def grid_records(
    configs: Mapping[str, ExperimentConfig], seeds: Sequence[int], workdir: Path, directory: Path, out: Path,
    virtual: VirtualConfig,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """Audits of all students of a grid that were measured, beside the measurements; and what is missing, a line each."""
    from subl_jax import conditions
    from subl_jax.forecast import cells
    from subl_jax.grid.command import with_checkpoints
    from subl_jax.grid.run import GridRun

    flag = flags.FLAGS
    pairs = {setting: [GRID_PAIRS[name] for name in flag.pairs] for setting in configs}
    configs = {setting: conditions.with_slots(config, workdir / setting) for setting, config in configs.items()}
    run = GridRun(configs, pairs, seeds, workdir, directory, with_checkpoints)
    asked = {setting: [(spec, run.config(setting, spec)) for spec in specs] for setting, specs in pairs.items()}
    wanted = cells.students_of(asked, seeds, get_setting)
    values, lacking = cells.measured(directory, wanted)
    measured = [each for each in wanted if (each.setting.name, each.seed, each.model) in values]
    began = time.monotonic()

    def late() -> bool:
        return flag.minutes is not None and time.monotonic() - began > 60 * flag.minutes

    records, failed = cells.audit_all(measured, workdir, out, virtual, until=late)
    return cells.joined(records, values), [*failed, *lacking]
