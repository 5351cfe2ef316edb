"""The pipeline workload: a whole experiment as users run it, on several devices and in several processes.

Cases come in by name; rows come out. A case is a number of JAX devices and of processes that hold them. Each runs
`experiments.api_deletion` in fresh processes with an empty work directory; figures come from the artifacts that it leaves.
Fake devices share the same cores: what is compared is overhead and whether the outcome is the same, not speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from subl_jax.benchmark import harness, machine, pipeline_runs, pipeline_table
from subl_jax.benchmark.harness import BenchmarkError, Timing
from subl_jax.benchmark.pipeline_runs import Comparison, Run
from subl_jax.benchmark.registry import Options, Workload, known
from subl_jax.benchmark.results import Absent, Row
from subl_jax.parallel import contract
from subl_jax.presets import PRESETS

NAME = "pipeline"
REPOSITORY = Path(__file__).parents[2]
PRESET_NAMES = tuple(name for name in PRESETS if name != "paper")  # that one starts from checkpoints


@dataclasses.dataclass(frozen=True)
class Case:
    """Where a run takes place.

    Attributes:
      devices: of all processes together; None: all that this machine has.
      processes: that share them evenly.
      references: cases that it is compared with, where they were measured too.
    """

    devices: int | None
    processes: int = 1
    references: tuple[str, ...] = ("devices=1",)


CASES: Mapping[str, Case] = {
    "devices=1": Case(1, references=()),
    "devices=2": Case(2),
    "devices=4": Case(4),
    "devices=8": Case(8),
    # Against two devices of one process only the way between them differs.
    "processes=2": Case(2, 2, ("devices=1", "devices=2")),
    "devices=all": Case(None, references=()),
}
ON_ACCELERATORS = "devices=all"
ROUNDS = 1
# A run that takes longer has hung: tiny takes some minutes.
LIMIT_S = 3600.0
_LOOK_S, _SAY_S, _GRACE_S = 0.2, 15.0, 40.0
_HOST_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Here:
    """JAX's platform on this machine, its local devices, and their name."""

    platform: str
    devices: int
    kind: str


def describe(cases: Sequence[str]) -> list[str]:
    """One line for what is common and one per case."""
    lines = [
        f"{NAME}: python -m experiments.api_deletion, seed 0, in fresh processes with an empty work directory; equal slots per "
        "device; the same batch in all cases, raised where the preset's rows do not split over the devices"
    ]
    for name in cases:
        case = CASES[name]
        where = "all local accelerators" if case.devices is None else f"{case.devices} fake CPU device(s) in all"
        against = f", compared with {' and '.join(case.references)}" if case.references else ""
        lines.append(f"  {name}: {where}, {case.processes} process(es){against}")
    return lines


# --- One run ----------------------------------------------------------------------------------------------------------


def find_devices() -> Here:
    """What JAX finds, asked for in a process of its own: a GPU that this one held would be lost to the runs.

    Raises:
      BenchmarkError: JAX does not start.
    """
    code = "import jax; d = jax.local_devices(); print(d[0].platform, len(d), d[0].device_kind, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"JAX finds no devices: {_last_line(done.stderr)}")
    platform, count, kind = done.stdout.strip().splitlines()[-3:]
    return Here(platform, int(count), machine.processor() if platform == "cpu" else kind)


def choose(cases: Sequence[str], here: Here) -> tuple[str, ...]:
    """Those of the cases that run here: fake devices on a CPU, all local devices on accelerators.

    Raises:
      BenchmarkError: cases were picked of which one does not run here.
    """
    fits = [name for name in cases if (name == ON_ACCELERATORS) == (here.platform != "cpu")]
    if len(fits) < len(cases) < len(CASES) or not fits:
        odd = next(name for name in cases if name not in fits)
        which = [name for name in CASES if (name == ON_ACCELERATORS) == (here.platform != "cpu")]
        remedy = "" if here.platform == "cpu" else ", or set JAX_PLATFORMS=cpu"
        raise BenchmarkError(
            f"--cases={odd} does not run on this machine's {here.devices} {here.platform} device(s); "
            f"give {', '.join(which)}{remedy}"
        )
    return tuple(fits)


def batch_rows(preset: str, devices: int) -> int:
    """Rows of a training batch: the preset's, raised to the next multiple that splits over so many devices.

    Raises:
      BenchmarkError: there is no such preset.
    """
    config = PRESETS[known(preset, PRESET_NAMES, "--preset")]("api")
    return math.lcm(devices, *(spec.train.batch_rows for spec in (config.base, config.teacher, config.student)))


def command(case: Case, devices: int, preset: str, rows: int, workdir: Path, stage: str | None = None) -> list[str]:
    """The command line of a run.

    Args:
      case, devices: where; preset, rows: what; workdir: of its artifacts.
      stage: after which it stops; None: it runs to its end.
    """
    line = [
        "-m", "experiments.api_deletion", f"--preset={preset}", f"--workdir={workdir}",
        f"--config.cpu_devices={devices // case.processes}", f"--config.parallel.data={devices}",
        *(f"--config.{who}.train.batch_rows={rows}" for who in ("base", "teacher", "student")),
        *([] if stage is None else [f"--stage={stage}"]),
    ]  # fmt: skip
    if case.processes == 1:
        return [sys.executable, *line]
    each = devices // case.processes
    launcher = ["-m", "launch.local", f"--processes={case.processes}", f"--devices_per_process={each}", "--", "python"]
    return [sys.executable, *launcher, *line]


def environment(case: Case, base: Mapping[str, str]) -> dict[str, str]:
    """What a run's processes inherit: nothing of another run of several processes; on a CPU so many fake devices."""
    told = (contract.COORDINATOR, contract.NUM_PROCESSES, contract.PROCESS_ID)
    found = {name: value for name, value in base.items() if name not in told}
    if case.devices is not None:
        kept = [word for word in found.get("XLA_FLAGS", "").split() if not word.startswith(_HOST_DEVICES)]
        found["XLA_FLAGS"] = " ".join([*kept, f"{_HOST_DEVICES}={case.devices // case.processes}"])
        found["JAX_PLATFORMS"] = "cpu"
    return found


def execute(line: Sequence[str], told: Mapping[str, str], workdir: Path, label: str) -> float:
    """Runs a command to its end, says how far it is, and returns its wall seconds.

    Raises:
      BenchmarkError: it fails or hangs; its last line is given.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    log = workdir.parent / f"{workdir.name}.log"
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        began = said = time.perf_counter()
        process = subprocess.Popen(
            line, cwd=REPOSITORY, env=dict(told), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                # Its end is looked for often: that is what is timed.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_S)
                now = time.perf_counter()
                if now - began > LIMIT_S:
                    raise BenchmarkError(
                        f"{label}: no end after {LIMIT_S:.0f} s; {_last_line(log.read_text(errors='replace'))}"
                    )
                if now - said > _SAY_S:
                    said = now
                    done = list(pipeline_runs.find_markers(workdir))
                    last = f", last {done[-1].removeprefix(f'{pipeline_runs.SEED}/')}" if done else ""
                    harness.say(f"  {label}: {len(done)} stages done{last}, {now - began:.0f} s")
            seconds = time.perf_counter() - began
        finally:
            _end(process)
    if process.returncode:
        raise BenchmarkError(f"{label}: exit code {process.returncode}: {_last_line(log.read_text(errors='replace'))}")
    return seconds


def _end(process: subprocess.Popen) -> None:
    """Ends a run that is still there (an interrupt, a limit); a launcher ends its processes."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(text: str) -> str:
    """What a failed run said: its line of error, or else its last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "error:" in line.lower()), lines[-1] if lines else "it said nothing"
    )


# --- The measurement --------------------------------------------------------------------------------------------------


def measure(
    cases: Sequence[str], peers: Sequence[str], options: Options, *,
    here: Here | None = None, run: Callable[..., float] = execute,
) -> Iterator[Row | Absent]:  # fmt: skip
    """A row of each case that runs here.

    Args:
      cases, peers, options: what is asked for; there are no peers.
      here, run: the machine and what runs a command; replaced in tests.

    Raises:
      BenchmarkError: a case or preset that does not run here, a run that fails, or artifacts that lack a stage.
    """
    del peers
    preset, rounds = options.preset or "micro", options.rounds or ROUNDS
    known(preset, PRESET_NAMES, "--preset")
    here = here or find_devices()
    chosen = choose(cases, here)
    # Artifacts are read here; accelerators belong to the runs.
    jax.config.update("jax_platforms", "cpu")
    most = here.devices if chosen == (ON_ACCELERATORS,) else max(case.devices or 1 for case in CASES.values())
    rows = batch_rows(preset, most)
    harness.say(f"preset {preset}, {rows} batch rows; {', '.join(chosen)}; {rounds} run(s) of each")
    done: dict[str, list[Run]] = {name: [] for name in chosen}
    busy: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory(prefix="subl_jax_pipeline_") as temporary:
        for number in range(rounds):
            for name in chosen:
                case, root = CASES[name], Path(temporary) / f"{name}_{number}"
                devices = case.devices or here.devices
                before = options.others and options.others()
                line = command(case, devices, preset, rows, root)
                wall = run(line, environment(case, os.environ), root, name)
                after = options.others and options.others()
                if before is not None and after is not None:
                    busy[name].append(max(0.0, after - before) / wall)
                done[name].append(pipeline_runs.read(root, wall))
                harness.say(f"{name}: {wall:.1f} s")
                if number == rounds - 1:
                    compared = {
                        other: _compare(
                            name, devices, preset, rows, done[name][0], done[other][0], Path(temporary), run
                        )
                        for other in case.references
                        if other in done
                    }
                    first = done[chosen[0]] if chosen[0] == "devices=1" else None
                    yield make_row(name, here, rows, done[name], compared, busy[name], first)
                if number:
                    shutil.rmtree(root)  # only the first are compared


def _compare(
    name: str,
    devices: int,
    preset: str,
    rows: int,
    own: Run,
    reference: Run,
    temporary: Path,
    run: Callable[..., float],
) -> Comparison:
    """Compares a case with another; where their teachers differ, it rolls out the other's on its own devices."""
    if pipeline_runs.weights_equal(own.workdir, reference.workdir):
        return pipeline_runs.compare(own, reference)
    case, label = CASES[name], f"{name} with the teachers of {reference.workdir.name.rpartition('_')[0]}"
    borrowed = temporary / f"borrowed_{name}_{reference.workdir.name}"
    layout = {"cpu_devices": own.config["cpu_devices"], "parallel": own.config["parallel"]}
    pipeline_runs.borrow(reference, borrowed, layout)
    harness.say(f"{label}: rolling out")
    line = command(case, devices, preset, rows, borrowed, "trajectories")
    run(line, environment(case, os.environ), borrowed, label)
    return pipeline_runs.compare(own, reference, borrowed)


def make_row(
    name: str, here: Here, rows: int, runs: Sequence[Run], compared: Mapping[str, Comparison], busy: Sequence[float],
    first: Sequence[Run] | None,
) -> Row:  # fmt: skip
    """A case's row of the contract; stages and comparisons stand in `extra`.

    Args:
      name, here, rows: case, machine, batch rows.
      runs: of the case.
      compared: with other cases, by their names.
      busy: cores that other processes used during each run.
      first: runs of the case devices=1, if it was measured.
    """
    run, stages = runs[0], pipeline_runs.account(runs)
    walls = Timing(tuple(each.wall_s for each in runs), sum(spent.compile_s or 0.0 for spent in stages.values()))
    tokens = sum(spent.tokens or 0 for spent in stages.values())
    peaks = [peak for each in runs for marker in each.markers.values() if (peak := marker.extra.get("peak_bytes"))]
    model = run.config["large"]
    base = None if first is None else Timing(tuple(each.wall_s for each in first), 0.0).median
    return Row(
        NAME, name, pipeline_runs.body_parameters(run), rows, run.config["student"]["train"]["row_tokens"],
        run.markers["tokenizer"].extra["vocabulary"], model["param_dtype"],
        f"{here.kind}, {machine.usable_cores()} cores" if here.platform == "cpu" else here.kind,
        peer=None, ratio=None, median_s=walls.median, p20_s=walls.p20, p80_s=walls.p80, runs=len(runs),
        tokens_per_s=tokens * len(runs) / sum(walls.seconds), flops=None, mfu=None, mbu=None,
        peak_bytes=max(peaks, default=None), compile_s=walls.compile_s,
        busy_cores=sum(busy) / len(busy) if busy else None,
        extra={
            "preset": run.summary["preset"],
            "devices": CASES[name].devices or here.devices,
            "processes": CASES[name].processes,
            "stages": {part: dataclasses.asdict(spent) for part, spent in stages.items()},
            "wall_over_one_device": None if base is None else walls.median / base,
            "compared": {
                other: {**dataclasses.asdict(each), "wrong": each.wrong} for other, each in compared.items()
            },
        },
    )  # fmt: skip


WORKLOAD = Workload(NAME, tuple(CASES), (), describe, measure, pipeline_table.table, pipeline_table.failures)
