"""`experiments.throughput`: flags in, a table on standard output and, with --out, its JSON; errors as one line."""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags, logging

from subl_jax import artifacts
from subl_jax.benchmark import harness, machine, registry, results
from subl_jax.benchmark.harness import BenchmarkError


def define_flags(into: flags.FlagValues = flags.FLAGS) -> None:
    """The command's flags."""
    workloads = ", ".join(registry.WORKLOADS)
    flags.DEFINE_string("workload", None, f"What is measured: {workloads}.", flag_values=into)
    flags.DEFINE_list(
        "against",
        [],
        "Peers, timed interleaved with ours; which there are depends on the workload (rollout: transformers, "
        "transformers_compile, tunix; distill: torch, torch_compile, trl, tunix). None: ours alone.",
        flag_values=into,
    )
    flags.DEFINE_list(
        "cases", [], "Names or patterns (small_*) of the workload's cases; all by default.", flag_values=into
    )
    flags.DEFINE_integer(
        "rounds",
        None,
        "Timed runs of each program; by default 20, or 5 where one exceeds 2 s (pipeline: 1).",
        lower_bound=1,
        flag_values=into,
    )
    flags.DEFINE_integer(
        "cores", None, "Hold every program to so many cores; by default all that are allowed.", flag_values=into
    )
    flags.DEFINE_string(
        "preset",
        None,
        "Of --workload=pipeline: the experiment's preset, micro (default) or tiny.",
        flag_values=into,
    )
    flags.DEFINE_string(
        "out",
        None,
        "File to write rows, definitions of the cases, machine and versions to, as JSON.",
        flag_values=into,
    )
    flags.DEFINE_string(
        "tunix_python",
        None,
        "Python of an environment with google-tunix, for --against=tunix: python3.11 -m venv DIR; DIR/bin/pip install "
        "google-tunix; --tunix_python=DIR/bin/python.",
        flag_values=into,
    )


def main() -> None:
    """Runs the command that the flags describe; turns expected failures into one line and exit code 1."""
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        logging.debug("failed", exc_info=True)
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)


def run(given: flags.FlagValues) -> None:
    """Measures and prints; see `main`.

    Raises:
      BenchmarkError: an unknown name, or a measurement that would not mean what its row says.
    """
    if given.workload is None:
        raise BenchmarkError(f"--workload is not given; there is {', '.join(registry.WORKLOADS)}")
    out = Path(given.out) if given.out else None
    if out is not None and not out.parent.is_dir():
        raise BenchmarkError(f"--out={out}: {out.parent} is not a directory; make it first")
    # Before anything that makes threads is imported.
    held = machine.pin(given.cores)
    workload = registry.get_workload(given.workload)
    if given.preset is not None and workload.name != "pipeline":
        raise BenchmarkError(f"--preset={given.preset} belongs to --workload=pipeline; leave it out")
    cases = registry.matching(given.cases, workload.cases, "--cases")
    peers = tuple(dict.fromkeys(registry.known(name, workload.peers, "--against") for name in given.against))
    described = workload.describe(cases)
    harness.say("\n".join([held.describe(), *described]))
    rows: list[results.Row] = []
    absent: list[results.Absent] = []
    options = registry.Options(held, given.rounds, given.tunix_python, preset=given.preset)
    for found in workload.measure(cases, peers, options):
        if isinstance(found, results.Absent):
            absent.append(found)
            harness.say(f"{found.peer} is absent: {found.reason}")
            continue
        rows.append(found)
        harness.say(workload.table([found]).splitlines()[-1])
    print(workload.table(rows))
    busy = [row.case for row in rows if row.busy]
    if busy:
        print(
            f"other processes computed meanwhile (busy_cores) in {', '.join(dict.fromkeys(busy))}: their times and "
            "ratios are no results, measure again on an idle machine"
        )
    for gone in absent:
        print(f"absent: {gone.peer}: {gone.reason}")
    if out is not None:
        artifacts.write_json_atomic(out, results.document(rows, absent, held, described))
        print(out)
    wrong = workload.failures(rows)
    if wrong:
        raise BenchmarkError("; ".join(wrong))
