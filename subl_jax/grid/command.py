"""The command of the grid: flags in; cells, `grid.json`, `report.html`, figures and a table out.

An expected failure is one line on standard error and exit code 1; nothing is overwritten by it.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from subl_jax import artifacts
from subl_jax import config as configuration
from subl_jax.evaluate import power
from subl_jax.experiment import seeds_from_flags, stopping_with_a_line
from subl_jax.grid import cost, table
from subl_jax.grid import protocol as protocols
from subl_jax.grid.choice import SETTINGS, allowed_by_checkpoints, pairs_from_flags, with_checkpoints
from subl_jax.grid.pairs import PAIRS
from subl_jax.grid.protocol import GridProtocol
from subl_jax.parallel import processes
from subl_jax.parallel.devices import configure_cpu
from subl_jax.presets import PRESETS
from subl_jax.settings.registry import get_setting

if TYPE_CHECKING:
    from subl_jax.grid.run import Failure, GridRun, Unit

# Setting -> standard deviation over seeds of the per-seed difference student - control_student, a share, before this grid
# has seeds of its own: docs/api_tiny_summary.json (six seeds) and docs/bash_tiny_summary.json (three).
ASSUMED_SPREAD = {"api": 0.135, "bash": 0.068}
_FAMILIES = ("base", "teachers", "trajectories", "sanitize", "students", "eval")


def define_flags() -> None:
    """The grid's flags, and one per configuration field."""
    flags.DEFINE_enum(
        "preset",
        "tiny",
        sorted(PRESETS),
        "Sizes and lengths: tiny are organisms for two CPU cores; paper takes --large_checkpoint and its like; micro only "
        "exercises the stages.",
    )
    flags.DEFINE_string(
        "workdir", None, "Directory of all artifacts, one work directory per setting; a run resumes there."
    )
    flags.DEFINE_string(
        "cells", None, "Directory of the cells, which alone the report needs; by default WORKDIR/cells."
    )
    flags.DEFINE_list("settings", list(SETTINGS), "Which settings.")
    flags.DEFINE_list(
        "pairs",
        list(PAIRS),
        f"Which pairs, of {', '.join(PAIRS)}; SETTING:PAIR names one of a single setting. By default all, with preset paper "
        "those that its checkpoints allow.",
    )
    flags.DEFINE_list(
        "seeds", ["0", "1", "2", "3", "4"], "Replicates: each is a whole run from pre-training to evaluation."
    )
    flags.DEFINE_integer(
        "index", 0, "Which part of the grid this process runs, counted from 0; see --of.", lower_bound=0
    )
    flags.DEFINE_integer(
        "of", 1, "How many processes or machines share the grid; a part is some seeds of some settings.", lower_bound=1
    )
    flags.DEFINE_float(
        "minutes",
        None,
        "After so many minutes end behind the stage that is running; a later call goes on. By default until all is done.",
        lower_bound=0.0,
    )
    flags.DEFINE_bool(
        "dry_run", False, "Print what is to be run, what it costs, and the power of the design; stop there."
    )
    flags.DEFINE_bool("report_only", False, "Run nothing: analyse the cells that are there. Needs no --workdir.")
    flags.DEFINE_bool("freeze_protocol", False, "Write the protocol of these flags as the frozen one, and stop.")
    flags.DEFINE_string(
        "record_costs", None, "Write the seconds of the stages of this grid to this file; estimates start from it."
    )
    for size in ("large", "small", "other"):
        flags.DEFINE_string(f"{size}_checkpoint", "", f"Hugging Face folder of the {size} model (preset paper).")
    processes.define_flags()
    configuration.define_flags(PRESETS["tiny"]())


def main() -> None:
    """Runs the grid; turns expected failures into one line and exit code 1."""
    with stopping_with_a_line():
        _run()


def frozen_path(preset: str) -> Path:
    """Where the frozen protocol of the grid of a preset is committed."""
    return Path(__file__).parents[2] / "experiments" / "protocols" / "grid" / f"{preset}.json"


# --- The run ----------------------------------------------------------------------------------------------------------


def _run() -> None:
    flag, seeds, pairs = flags.FLAGS, seeds_from_flags(), pairs_from_flags()
    _refuse_what_the_grid_sets()
    configs = {setting: configuration.from_flags(PRESETS[flag.preset](setting)) for setting in pairs}
    left_out: list[str] = []
    if flag.preset == "paper":
        pairs, left_out = allowed_by_checkpoints(configs, pairs)
    protocol = protocols.make_grid_protocol(configs, pairs, seeds)
    path = frozen_path(flag.preset)
    if flag.freeze_protocol:
        print(f"frozen as {protocols.freeze(path, protocol)} in {path}")
        return
    frozen = protocols.load(path) if path.exists() else None
    workdir, directory = _places()
    processes.only_one("experiments.paper_grid")
    configure_cpu(next(iter(configs.values())).cpu_devices)
    # Imported here: a wrong flag is answered without waiting for JAX's and transformers' start.
    from subl_jax import conditions
    from subl_jax.grid.run import GridRun
    from subl_jax.parallel.devices import machine

    if flag.report_only:
        # No stage lies here: the plan only says which configuration every cell must be of.
        run = GridRun(configs, pairs, seeds, directory / ".none", directory, with_checkpoints)
        _report(run, protocol, frozen, left_out)
        return
    for setting, config in configs.items():
        prepare = get_setting(setting).prepare
        if prepare is not None:
            prepare()  # before anything is written
        configs[setting] = conditions.with_slots(config, workdir / setting)
    run = GridRun(configs, pairs, seeds, workdir, directory, with_checkpoints)
    units = run.units(flag.index, flag.of)
    needed = needed_stages(run, units)
    costs = known_costs(run, flag.preset)
    print("\n".join([*left_out, *_announcement(needed, costs, protocol)]), flush=True)
    if flag.dry_run:
        return
    artifacts.check_writable(workdir, free_bytes=run.bytes_written(units))
    directory.mkdir(parents=True, exist_ok=True)
    for setting, config in configs.items():
        (workdir / setting).mkdir(exist_ok=True)
        artifacts.write_json_atomic(workdir / setting / "config.json", artifacts.plain(config))
    described = {"hash": protocols.protocol_hash(protocol), "protocol": protocols.to_json(protocol)}
    artifacts.write_json_atomic(workdir / "protocol.json", described)
    failures = run_units(run, units, needed, costs)
    if flag.record_costs:
        cost.write_record(Path(flag.record_costs), flag.preset, run.costs(), cost.probe(), machine())
    _report(run, protocol, frozen, left_out)
    if failures:
        for failure in failures:
            print(f"error: {failure.stage}: {failure.why}", file=sys.stderr)
        sys.exit(1)


def _places() -> tuple[Path, Path]:
    """The work directory and the directory of the cells; a report alone needs one of the two."""
    flag = flags.FLAGS
    if flag.report_only and flag.cells:
        directory = artifacts.workdir(flag.cells).absolute()
        workdir = directory.parent
    else:
        what = (
            "the cells lie, or say --cells, e.g. --cells=docs/grid"
            if flag.report_only
            else "the artifacts go, e.g. runs/grid"
        )
        workdir = _given("workdir", what)
        directory = artifacts.workdir(flag.cells).absolute() if flag.cells else workdir / "cells"
    if flag.report_only and not directory.is_dir():
        raise ValueError(f"{directory} is no directory; say where the cells lie, e.g. --cells=docs/grid")
    return workdir, directory


def needed_stages(run: GridRun, units: Sequence[Unit]) -> dict[Unit, list[str]]:
    """The stages that each unit has to run; what all seeds of a setting share stands with the first."""
    needed: dict[Unit, list[str]] = {}
    shared: set[tuple[str, str]] = set()
    for unit in units:
        names = [entry.stage.name for entry in run.todo(run.plan(unit))]
        needed[unit] = [name for name in names if (unit[0], name) not in shared]
        shared |= {(unit[0], name) for name in names}
    return needed


def _given(name: str, where: str) -> Path:
    value = flags.FLAGS[name].value
    if not value:
        raise ValueError(f"--{name} is not given; say where {where}")
    return artifacts.workdir(value).absolute()


def known_costs(run: GridRun, preset: str) -> list[cost.Costs]:
    """What is known of the stages' times, the best first."""
    return [run.costs(), cost.of_cells(run.rows()), cost.recorded(preset, cost.probe())]


def cost_lines(needed: Mapping[Unit, Sequence[str]], costs: Sequence[cost.Costs]) -> list[str]:
    """What is about to be run, and what it costs."""
    total = cost.NOTHING
    for (setting, _), stages in needed.items():
        total += cost.estimate(setting, stages, costs)
    parts = ", ".join(
        f"{name} {cost.duration(total.by_family[name])}" for name in _FAMILIES if total.by_family.get(name)
    )
    lines = ["every cell is there: nothing is to be run"]
    if total.stages:
        lines = [f"{total.stages} stages to run in {len(needed)} parts (a seed of a setting each)"]
        if parts:
            lines.append(f"about {cost.duration(total.seconds)} on this machine: {parts}")
        if total.guessed:
            lines.append(
                f"{total.guessed} of them are taken as the mean of their kind or family: nobody has timed them"
            )
        if total.unknown:
            lines.append(f"nobody has timed {total.unknown} of them yet; the first part will tell")
    return lines


def _announcement(
    needed: Mapping[Unit, Sequence[str]], costs: Sequence[cost.Costs], protocol: GridProtocol
) -> list[str]:
    """What is about to be run, what it costs, and what the design can show."""
    lines = cost_lines(needed, costs)
    if len(protocol.seeds) > 1:
        for (pairs, margin), spreads in _designs(protocol).items():
            lines += ["", *power.lines(spreads, len(protocol.seeds), pairs, margin=margin)]
    else:
        lines.append("one seed: no interval over seeds, and no power; each pair is shown within this one run")
    return lines


def _designs(protocol: GridProtocol) -> dict[tuple[int, float], dict[str, float]]:
    """(pairs that share an adjustment, margin of a claimed null) -> the assumed spreads of the settings that have both."""
    found: dict[tuple[int, float], dict[str, float]] = defaultdict(dict)
    for setting in protocol.settings:
        design = len(protocol.pairs(setting)), protocol.of(setting).targets.control_margin
        found[design][f"{setting}, earlier runs"] = ASSUMED_SPREAD[setting]
    return found


class _Enough(Exception):  # noqa: N818 - no error
    """The minutes are up."""


def run_units(
    run: GridRun, units: Sequence[Unit], needed: Mapping[Unit, Sequence[str]], costs: Sequence[cost.Costs]
) -> list[Failure]:
    """Runs the units one after the other; a line behind every stage says how much is left. Returns what failed."""
    left = {unit: list(needed[unit]) for unit in units}
    total, began, until = sum(map(len, left.values())), time.monotonic(), flags.FLAGS.minutes

    def after(unit: Unit) -> Callable[[Any, Any], None]:
        def finished(stage: Any, marker: artifacts.Marker) -> None:
            del marker
            if stage.name in left[unit]:
                left[unit].remove(stage.name)
            seconds = sum(cost.estimate(setting, stages, costs).seconds for (setting, _), stages in left.items())
            count, gone = sum(map(len, left.values())), time.monotonic() - began
            logging.info(
                "grid: %s %s done, %d of %d stages, %s gone, about %s left",
                unit[0], stage.name, total - count, total, cost.duration(gone), cost.duration(seconds),
            )  # fmt: skip
            if until is not None and count and gone > 60 * until:
                raise _Enough

        return finished

    failures: list[Failure] = []
    try:
        for unit in units:
            found = run.run(unit, after(unit))
            left[unit] = []  # what another process has made meanwhile is done, too
            _record(run.cells, unit, found)
            failures += found
            costs = [run.costs(), *costs[1:]]
    except _Enough:
        print(f"stopped after --minutes={until:g}; the same command goes on where this one has stopped", flush=True)
    return failures


def _record(directory: Path, unit: Unit, failures: Sequence[Failure]) -> None:
    """Keeps why cells of a unit are missing beside the cells, for whoever analyses them; what it said before is dropped."""
    from subl_jax.grid import cells
    from subl_jax.grid.locks import one_at_a_time

    path = directory / "failures.json"
    with one_at_a_time(directory / ".failures.lock", "writes down what failed"):
        known = {key: why for key, why in cells.read_failures(path).items() if key[:2] != unit}
        known |= {key: f"{failure.stage}: {failure.why}" for failure in failures for key in failure.keys}
        if known or path.exists():
            named = ("setting", "seed", "model")
            cells.write_failures(
                path, [{**dict(zip(named, key, strict=True)), "why": why} for key, why in known.items()]
            )


def _refuse_what_the_grid_sets() -> None:
    """Refuses flags that would do nothing.

    Raises:
      ValueError: names the flag and what stands in its place.
    """
    ours = {
        "config.pair": "--pairs",
        "config.student.objectives": "the arms of each pair, see subl_jax/grid/pairs.py",
        "config.student.benign_objectives": "the arms of each pair, see subl_jax/grid/pairs.py",
        "config.teacher.checkpoint": "--large_checkpoint and its like",
        "config.student.checkpoint": "--large_checkpoint and its like",
    }
    for name, instead in ours.items():
        if flags.FLAGS[name].present:
            raise ValueError(f"--{name} is set by the grid, pair by pair: use {instead}")
    for other in ("report_only", "dry_run"):
        if flags.FLAGS.record_costs and flags.FLAGS[other].value:
            raise ValueError(
                f"--record_costs writes the times of what is run, and --{other} runs nothing; leave one out"
            )


def _report(run: GridRun, protocol: GridProtocol, frozen: GridProtocol | None, notes: Sequence[str]) -> None:
    """Analyses what is there; writes `grid.json`, the report and its figures beside the cells, and prints the table."""
    from subl_jax.grid import cells, examples
    from subl_jax.grid.analysis import analyse
    from subl_jax.grid.locks import one_at_a_time
    from subl_jax.report import figures
    from subl_jax.report import grid as report

    directory = run.cells
    directory.mkdir(parents=True, exist_ok=True)
    # Of processes that share a grid the last one shows what all have made.
    with one_at_a_time(directory / ".report.lock", "writes the report"):
        hashes = {key: value for unit in run.units() for key, value in run.plan(unit).hashes.items()}
        failures = cells.read_failures(directory / "failures.json")
        document = analyse(directory, protocol, frozen=frozen, hashes=hashes, notes=notes, failures=failures)
        episodes = {}
        for setting in protocol.settings:
            if not examples.episodes_path(directory, setting).exists():
                continue
            try:
                episodes[setting], others = examples.read(directory, setting, hashes)
            except cells.CellError as error:
                document["notes"].append(f"The example episodes of {setting} cannot be read: {error}")
                continue
            if others:
                told = ", ".join(others)
                document["notes"].append(
                    f"Example episodes of {setting} that are of other evaluations are left out: {told}."
                )
        artifacts.write_json_atomic(directory / "grid.json", document)
        report.write_report(directory / "report.html", document, episodes, artifacts.plain(run.configs))
        figures.export_grid(directory / "figures", document)
        print(table.render(document))
        print(f"{directory / 'grid.json'}  {directory / 'report.html'}  {directory / 'figures'}")
