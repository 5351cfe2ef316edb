"""What finished runs of an experiment say: where the time went, how many tokens a second, and whether two runs agree.

A work directory with its markers, datasets, checkpoints and summary comes in; seconds and shares per family of stages, and
the comparison of two work directories, come out. Nothing here starts a run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from subl_jax import artifacts, checkpoint, data
from subl_jax.benchmark.harness import BenchmarkError
from subl_jax.conditions import TEACHERS

FAMILIES = ("tokenizer", "audit", "base", "teachers", "trajectories", "sanitize", "students", "eval")
TRAINED = ("base", "teachers", "students")
# Of the wall time: interpreter, imports, joining of processes, summary and report.
OUTSIDE = "outside"
SEED = "seed=0"
# A rerun with equal floats has equal losses. Sums over other devices are rounded otherwise, and some tens of steps carry
# that on; a wrong batch or gradient changes losses in their first digits.
LOSS_BAR = 1e-3
# Stages whose data is the same in every run, so that their losses can be compared whatever the rollouts drew.
_SAME_DATA = ("base", "teachers")


@dataclasses.dataclass(frozen=True)
class Spent:
    """What one family of stages took.

    Attributes:
      seconds: of all its stages; share: of the whole command's wall time.
      tokens: sampled (trajectories) or trained on, padding not counted (base, teachers, students); None: none are counted.
      tokens_per_s: tokens over seconds, with loading, compilation and writing.
      compile_s: that the stages tell of compilation.
    """

    seconds: float
    share: float
    tokens: int | None = None
    tokens_per_s: float | None = None
    compile_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: of its artifacts.
      wall_s: of the command, from its start to its exit.
      markers: by name of the stage; directories: where each lies, likewise.
      config, summary: as the run wrote them.
    """

    workdir: Path
    wall_s: float
    markers: Mapping[str, artifacts.Marker]
    directories: Mapping[str, Path]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


def find_markers(workdir: Path) -> dict[str, Path]:
    """The finished stages so far: directory of each by name, in the order in which they ended."""
    found = sorted(workdir.rglob(artifacts.MARKER), key=lambda path: path.stat().st_mtime)
    return {json.loads(path.read_text(encoding="utf-8"))["stage"]: path.parent for path in found}


def read(workdir: Path, wall_s: float) -> Run:
    """A run's artifacts.

    Raises:
      BenchmarkError: a stage or file that a whole run leaves behind is missing; it is named.
    """
    told = {}
    for name in ("config.json", "summary.json"):
        try:
            told[name] = json.loads((workdir / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BenchmarkError(f"{workdir / name} is missing: the run did not come to its end; see its log") from None
    directories = find_markers(workdir)
    markers = {
        name: artifacts.Marker(**json.loads((directory / artifacts.MARKER).read_text(encoding="utf-8")))
        for name, directory in directories.items()
    }
    missing = [name for name in _expected(told["summary.json"]) if name not in markers]
    missing += [name for name in FAMILIES if not any(family(stage) == name for stage in markers)]
    if missing:
        raise BenchmarkError(
            f"{workdir} lacks the stage {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}: "
            "shares of a part of the run would be called shares of all of it; run it to its end"
        )
    return Run(workdir, wall_s, markers, directories, told["config.json"], told["summary.json"])


def _expected(summary: Mapping[str, Any]) -> list[str]:
    """Stages that the measured conditions cannot do without."""
    conditions = list(summary["conditions"])
    students = [name for name in conditions if name != "base" and name not in TEACHERS]
    return [
        *(f"{SEED}/teachers/{name}" for name in TEACHERS),
        *(f"{SEED}/trajectories/{name}" for name in TEACHERS),
        *(f"{SEED}/students/{name}" for name in students),
        *(f"{SEED}/eval/{name}" for name in conditions),
    ]


def family(stage: str) -> str:
    """The first part of a stage's name behind the seed."""
    return next(part for part in stage.split("/") if not part.startswith("seed="))


def tokens_of(marker: artifacts.Marker) -> int | None:
    """Tokens that a stage sampled or trained on, by its own account; None where it counts none."""
    extra = marker.extra
    if "sampled_tokens" in extra:
        return int(extra["sampled_tokens"])
    if not extra.get("loss_tokens_per_s"):
        return None
    # Both rates are over the same wall time.
    return round(extra["tokens_per_s"] * extra["loss_tokens"] / extra["loss_tokens_per_s"])


def account(runs: Sequence[Run]) -> dict[str, Spent]:
    """Where the time of equal runs went, in means over them; the last entry is the time outside of all stages.

    Raises:
      BenchmarkError: stages say that they took longer than the whole command.
    """
    wall, found = sum(run.wall_s for run in runs), {}
    for name in FAMILIES:
        markers = [marker for run in runs for stage, marker in run.markers.items() if family(stage) == name]
        seconds = sum(marker.seconds for marker in markers)
        counts = [count for count in map(tokens_of, markers) if count is not None]
        compiled = [marker.extra["compile_s"] for marker in markers if marker.extra.get("compile_s") is not None]
        found[name] = Spent(
            seconds / len(runs),
            seconds / wall,
            round(sum(counts) / len(runs)) if counts else None,
            sum(counts) / seconds if counts and seconds else None,
            sum(compiled) / len(runs) if compiled else None,
        )
    rest = wall / len(runs) - sum(spent.seconds for spent in found.values())
    if rest < 0:
        raise BenchmarkError(
            f"the stages took {-rest:.2f} s longer than the command of {wall / len(runs):.2f} s: their markers are another "
            "run's; use an empty work directory"
        )
    return {**found, OUTSIDE: Spent(rest, rest * len(runs) / wall)}


def body_parameters(run: Run) -> int:
    """Parameters of the teacher's size, without embedding and head, from the layout of its checkpoint."""
    metadata = run.directories[f"{SEED}/teachers/{TEACHERS[0]}"] / "params" / "metadata.json"
    layout = json.loads(metadata.read_text(encoding="utf-8"))["layout"]
    return sum(
        math.prod(shape) for name, (shape, _) in layout.items() if name.split("/")[0] not in ("embedding", "head")
    )


# --- Whether two runs agree -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run against another.

    Attributes:
      weights_equal: whether the teachers' parameters are bitwise equal.
      episodes: compared; episodes_equal: whose tokens and loss mask are equal.
      borrowed: whether the episodes are those of a rollout of the other run's teachers, the own ones being different.
      losses: largest relative difference of the final losses, by family; None: its data differs, so nothing follows.
      rates_apart: conditions of which a rate lies outside the other run's 95 % interval; conditions: how many there are.
    """

    weights_equal: bool
    episodes: int
    episodes_equal: int
    borrowed: bool
    losses: Mapping[str, float | None]
    rates_apart: tuple[str, ...]
    conditions: int

    @property
    def wrong(self) -> list[str]:
        """What contradicts the claim that both are the same run, one phrase each."""
        found = []
        if self.episodes_equal < self.episodes:
            found.append(f"{self.episodes - self.episodes_equal} of {self.episodes} episodes of equal weights differ")
        for name, difference in self.losses.items():
            if difference is not None and not difference <= LOSS_BAR:
                found.append(f"losses of {name} differ by {difference:.1e}, the bar is {LOSS_BAR:.0e}")
        if self.rates_apart:
            found.append(f"rates of {', '.join(self.rates_apart)} lie outside each other's intervals")
        return found


def weights_equal(one: Path, other: Path) -> bool:
    """Whether all teachers of two work directories are bitwise equal."""
    for name in TEACHERS:
        trees = [checkpoint.load_model(root / SEED / "teachers" / name / "params")[0] for root in (one, other)]
        left, right = (jax.tree.leaves_with_path(tree) for tree in trees)
        if [path for path, _ in left] != [path for path, _ in right]:
            return False
        pairs = zip(left, right, strict=True)
        if any(np.asarray(a).tobytes() != np.asarray(b).tobytes() for (_, a), (_, b) in pairs):
            return False
    return True


def equal_episodes(one: Path, other: Path) -> tuple[int, int]:
    """Of the trajectories of two work directories: how many have equal tokens and loss mask, and how many there are.

    Raises:
      BenchmarkError: the two did not attempt the same tasks.
    """
    left, right = _episodes(one), _episodes(other)
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        raise BenchmarkError(f"{len(odd)} episodes are in one run only, e.g. {'/'.join(map(str, odd[0]))}")
    return sum(left[key] == right[key] for key in left), len(left)


def _episodes(workdir: Path) -> dict[tuple[str, str, int], tuple[bytes, bytes]]:
    return {
        (dataset.parent.name, each.task_id, each.sample): (each.tokens.tobytes(), each.loss_mask.tobytes())
        for dataset in sorted((workdir / SEED / "trajectories").glob("*/dataset"))
        for each in data.read(dataset)
    }


def compare(run: Run, reference: Run, borrowed: Path | None = None) -> Comparison:
    """A run against another of the same preset.

    Args:
      run, reference: of which configurations differ in devices and processes only.
      borrowed: work directory of a rollout of the reference's teachers on the run's devices, see `borrow`; needed where
        the weights of the two differ.

    Raises:
      BenchmarkError: weights differ and no rollout of equal weights is given; or the tasks differ.
    """
    same = weights_equal(run.workdir, reference.workdir)
    if not same and borrowed is None:
        raise BenchmarkError("the teachers' weights differ, so that their episodes may: roll out equal weights first")
    own_equal, count = equal_episodes(run.workdir, reference.workdir)
    equal = own_equal
    if not same and borrowed is not None:
        equal, count = equal_episodes(borrowed, reference.workdir)
    losses = {
        name: _loss_difference(run, reference, name) if name in _SAME_DATA or own_equal == count else None
        for name in TRAINED
    }
    rates, others = run.summary["conditions"], reference.summary["conditions"]
    apart = tuple(name for name in others if not _overlap(rates[name], others[name]))
    return Comparison(same, count, equal, not same, losses, apart, len(others))


def _loss_difference(run: Run, reference: Run, name: str) -> float:
    """The largest |a - b| / |b| of the final losses of a family's stages."""
    pairs = [
        (run.markers[stage].extra["loss"], marker.extra["loss"])
        for stage, marker in reference.markers.items()
        if family(stage) == name and "loss" in marker.extra
    ]
    return max((abs(a - b) / max(abs(b), 1e-30) for a, b in pairs), default=0.0)


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether each rate lies in the other's interval."""
    return all(b["ci95"][0] <= a["behaviour_rate"] <= b["ci95"][1] for a, b in ((one, other), (other, one)))


def borrow(reference: Run, into: Path, layout: Mapping[str, Any]) -> None:
    """Puts the reference's tokenizer, bases and teachers into a new work directory, as finished stages of another layout.

    A run there with --stage=trajectories then rolls out bitwise the same teachers.

    Args:
      reference: whose models are taken.
      into: the new work directory.
      layout: `cpu_devices` and `parallel` of the configuration that will run there.
    """
    hashes: dict[str, str] = {}
    stages = [(name, marker) for part in ("tokenizer", "base", "teachers") for name, marker in reference.markers.items()
              if family(name) == part]  # fmt: skip
    for name, marker in stages:
        source = reference.directories[name]
        target = into / source.relative_to(reference.workdir)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("steps", artifacts.MARKER))
        key = {part: layout.get(part, value) for part, value in marker.key.items()}
        made = artifacts.complete(
            target, stage=name, key=key, inputs={each: hashes[each] for each in marker.inputs},
            seconds=marker.seconds, extra=marker.extra,
        )  # fmt: skip
        hashes[name] = made.output_hash
