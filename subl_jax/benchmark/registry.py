"""The throughput workloads by name. Adding one is a module that exports `WORKLOAD`, and its line here."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from subl_jax.benchmark.harness import BenchmarkError
from subl_jax.benchmark.machine import Machine, others_cpu_s
from subl_jax.benchmark.results import Absent, Row, table

# Name -> the module that exports `WORKLOAD`. Imported when it is asked for: a workload imports only what it measures.
WORKLOADS: Mapping[str, str] = {
    "rollout": "subl_jax.benchmark.rollout",
    "multiturn": "subl_jax.benchmark.multiturn",
    "distill": "subl_jax.benchmark.distill",
    "pipeline": "subl_jax.benchmark.pipeline",
    "seeds": "subl_jax.benchmark.seeds",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose of a measurement; everything else is fixed in the workload's file.

    Attributes:
      machine: what all programs are pinned to.
      rounds: how often each program is timed; None: as often as the protocol asks for.
      tunix_python: a Python that has google-tunix, which is not installed beside us.
      others: what other processes use, see `harness.interleave`; None counts busy rounds too.
      preset: of the experiment, where the workload runs a whole one.
    """

    machine: Machine
    rounds: int | None = None
    tunix_python: str | None = None
    others: Callable[[], float | None] | None = others_cpu_s
    preset: str | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to measure.

    Attributes:
      name: of the registry.
      cases: their names, in the order they run.
      peers: whom it can be compared with.
      describe: names of cases to the lines that define them.
      measure: cases, peers and options to rows and absent peers, as they are found.
      table: rows to text.
      failures: of rows that are no result though they were measured, what is wrong; they end the command with exit code 1.
    """

    name: str
    cases: tuple[str, ...]
    peers: tuple[str, ...]
    describe: Callable[[Sequence[str]], list[str]]
    measure: Callable[[Sequence[str], Sequence[str], Options], Iterator[Row | Absent]]
    table: Callable[[Sequence[Row]], str] = table
    failures: Callable[[Sequence[Row]], list[str]] = lambda found: []


def get_workload(name: str) -> Workload:
    """The workload of this name.

    Raises:
      BenchmarkError: no such workload; the nearest name is given.
    """
    return importlib.import_module(WORKLOADS[known(name, WORKLOADS, "--workload")]).WORKLOAD


def known(name: str, names: Iterable[str], flag: str) -> str:
    """The name, if it is one of `names`.

    Raises:
      BenchmarkError: it is not; the message lists them and gives the nearest.
    """
    names = list(names)
    if name in names:
        return name
    if not names:
        raise BenchmarkError(f"{flag}={name}: this workload is compared with nobody; leave {flag} out")
    near = difflib.get_close_matches(name, names, 1, 0.3)
    raise BenchmarkError(
        f"{flag}={name} is unknown: there {'is' if len(names) == 1 else 'are'} {', '.join(names)}"
        f"{f'; did you mean {near[0]}?' if near else ''}"
    )


def matching(patterns: Sequence[str], names: Sequence[str], flag: str) -> tuple[str, ...]:
    """Those of `names`, in their order, that a pattern ("small_*") or a name asks for; all where nothing is asked for.

    Raises:
      BenchmarkError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            known(pattern, names, flag)
    return tuple(name for name in names if not patterns or any(fnmatch.fnmatch(name, one) for one in patterns))
