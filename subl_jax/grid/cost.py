"""What a grid costs before it starts: seconds per kind of stage, from stages that were run, scaled to this machine.

Unfinished stages in, and figures of finished ones: of this work directory first, of the cells that are there second (other
seeds, other machines), of the record that the package ships last. An estimate out; kinds that nobody has timed are counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from subl_jax import artifacts
from subl_jax.stages import family_of

RECORD = "costs.json"
# Setting -> kind of stage -> seconds.
Costs = Mapping[str, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that stages will take.

    Attributes:
      seconds: of the stages about which something is known.
      by_family: the same by family of stages.
      stages: how many there are.
      guessed: how many of them are of a kind that nobody has timed, and are taken as what they are a variant of, or as the
        mean of their family.
      unknown: how many are of a family that nobody has timed, and count as nothing.
    """

    seconds: float
    by_family: Mapping[str, float]
    stages: int
    guessed: int
    unknown: int

    def __add__(self, other: Estimate) -> Estimate:
        """Of both together."""
        families = {
            name: self.by_family.get(name, 0.0) + other.by_family.get(name, 0.0)
            for name in dict.fromkeys([*self.by_family, *other.by_family])
        }
        return Estimate(
            self.seconds + other.seconds,
            families,
            self.stages + other.stages,
            self.guessed + other.guessed,
            self.unknown + other.unknown,
        )


NOTHING = Estimate(0.0, {}, 0, 0, 0)


def kind_of(stage: str) -> str:
    """What a stage's time depends on, besides the setting: its name without the seed; the three arms of a match are one.

    "seed=3/students/control_student_hard@large_small" is of the kind "students/student_hard@large_small".
    """
    name = re.sub(r"^seed=\d+/", "", stage)
    return re.sub(r"(^|/)(control|benign)_", r"\1", name)


def estimate(setting: str, stages: Iterable[str], costs: Sequence[Costs]) -> Estimate:
    """The time of stages of one setting.

    Args:
      setting: which.
      stages: their names.
      costs: figures, the best first; a kind is looked up in each in turn.
    """
    known: dict[str, float] = {}
    for found in reversed(costs):
        known |= found.get(setting, {})
    alike: dict[str, list[float]] = defaultdict(list)
    for kind, seconds in known.items():
        alike[family_of(kind)].append(seconds)
    families, count, guessed, unknown = defaultdict(float), 0, 0, 0
    for stage in stages:
        kind, family = kind_of(stage), family_of(stage)
        count += 1
        if kind not in known:
            guessed += family in alike
            unknown += family not in alike
        if family in alike:
            # A variant's stage takes about as long as the one that it is a variant of.
            families[family] += known.get(kind, known.get(kind.partition("~")[0], float(np.mean(alike[family]))))
    return Estimate(sum(families.values()), dict(families), count, guessed, unknown)


def of_stages(timed: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, float]]:
    """Costs from stages that were run: (setting, stage, seconds); the mean of each kind."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for setting, stage, seconds in timed:
        found[setting][kind_of(stage)].append(seconds)
    return {setting: {kind: float(np.mean(every)) for kind, every in kinds.items()} for setting, kinds in found.items()}


def of_cells(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Costs from cells (see `grid.cells.read_cell`): their evaluation, their training, and their teacher's rollout."""
    timed: list[tuple[str, str, float]] = []
    for row in rows:
        model, seconds = row["model"], row["seconds"]
        name, _, size = model.partition("~")[0].partition("@")
        source = (
            f"base/{size or 'large'}"
            if name == "base"
            else f"{'teachers' if 'teacher' in name else 'students'}/{model}"
        )
        for stage, what in ((f"eval/{model}", "evaluate"), (source, "train"), (f"trajectories/{model}", "rollout")):
            if what in seconds:
                timed.append((row["setting"], stage, seconds[what]))
    return of_stages(timed)


def probe() -> float:
    """Seconds of a core that this machine takes for a fixed piece of work: NumPy element by element, and plain Python.

    Half of a grid's time is arithmetic and half is bookkeeping, tools and sandboxes. Of this thread's own time, the best of
    three: what else runs here counts little. A product of matrices would not do: its threads wait for each other, and on
    two busy cores it has taken forty times as long.
    """
    numbers = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    found = []
    for _ in range(3):
        began = time.thread_time()
        for _ in range(10):
            np.sort(np.exp(numbers))
        text = json.dumps({str(number): number for number in range(20_000)})
        json.loads(text)
        found.append(time.thread_time() - began)
    return min(found)


def recorded(preset: str, seconds_of_probe: float) -> Costs:
    """The record that the package ships, scaled by the probe; empty for a preset that nobody has recorded."""
    record = json.loads(resources.files("subl_jax.grid").joinpath(RECORD).read_text(encoding="utf-8"))
    if preset not in record:
        return {}
    scale = seconds_of_probe / record[preset]["probe"]
    return {
        setting: {kind: scale * seconds for kind, seconds in kinds.items()}
        for setting, kinds in record[preset]["seconds"].items()
    }


def write_record(path: Path, preset: str, costs: Costs, seconds_of_probe: float, machine: str) -> None:
    """Writes, or adds to, a record: what later estimates start from.

    Raises:
      WorkdirError: the file cannot be written.
    """
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record[preset] = {
        "machine": machine,
        "probe": round(seconds_of_probe, 4),
        "seconds": {
            setting: {kind: round(seconds, 2) for kind, seconds in sorted(kinds.items())}
            for setting, kinds in sorted(costs.items())
        },
    }
    artifacts.write_json_atomic(path, record)


def duration(seconds: float) -> str:
    """Seconds in words, as precise as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
