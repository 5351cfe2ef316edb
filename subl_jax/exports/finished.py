"""What stands in the work directory of a finished run: its models by name, what each was made of, and how it was measured.

A work directory and a seed in; markers, evaluation rows and the paths of checkpoints out. Everything is read off the stage
markers, so that it is what was run, whatever the configuration says today. Nothing here writes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.artifacts import Marker
from subl_jax.config import STUDENT_OF, TEACHERS
from subl_jax.evaluate.summary import SummaryError, indexed

# Whatever makes a model another one than its condition in the run's own pair and configuration stands behind one of these.
_ENDINGS = re.compile("[@~]")
# Where an experiment and a grid keep the protocol, seen from a setting's work directory.
_PROTOCOLS = ("protocol.json", "../protocol.json")


class ExportError(ValueError):
    """Something cannot be exported; one line with what, why, and what to do."""


def condition_of(model: str) -> str:
    """The condition of a model by its name on disk: `student_hard@large_small` -> `student_hard`."""
    return _ENDINGS.split(model, maxsplit=1)[0]


def control_of(model: str) -> str | None:
    """The counter-bias control of a student or of a biased teacher, by name on disk; None for any other model."""
    condition, ending = condition_of(model), model[len(condition_of(model)) :]
    for name, control in (("teacher", "control_teacher"), (STUDENT_OF["teacher"], STUDENT_OF["control_teacher"])):
        if condition == name or (name == "student" and condition.startswith("student_")):
            return control + condition.removeprefix(name) + ending
    return None


def benign_of(model: str) -> str | None:
    """The benign control of the same model, as `control_of`."""
    control = control_of(model)
    return None if control is None else control.replace("control_", "benign_", 1)


def resolve(wanted: str, known: Sequence[str], where: str) -> str:
    """The one model that a name means: its name on disk, or a condition that only one model on disk has.

    Raises:
      ExportError: there is no such model (the nearest is named), or there are several.
    """
    if wanted in known:
        return wanted
    same = [name for name in known if condition_of(name) == wanted]
    if len(same) == 1:
        return same[0]
    if same:
        raise ExportError(f"--condition={wanted} means several models of {where}: name one of {', '.join(same)}")
    near = difflib.get_close_matches(wanted, known, 1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ExportError(f"--condition={wanted} is no model of {where}, which has {', '.join(known) or 'none'}{hint}")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One evaluation, and where it comes from.

    Attributes:
      row: as `SeedPipeline.make_evaluation` writes it; `examples` are the episodes whose conversation was kept.
      model: its name on disk.
      setting, hash: of the run; the output hash of the evaluation stage.
      source: the file, as whoever reads the export would name it.
      written: when that file was last changed, in seconds since the epoch; seconds: how long the evaluation took.
      preset, pair, parser, protocol, machine: as far as they are recorded, else None.
      versions: of the packages that measured.
      evaluation: the key of the evaluation stage (tasks, samples, sampling); empty where only a cell is there.
      training: figures of the training stage; empty where there was none.
    """

    row: Mapping[str, Any]
    model: str
    setting: str
    hash: str
    source: str
    written: float
    seconds: float | None
    preset: str | None
    pair: str | None
    parser: str | None
    protocol: str | None
    machine: str | None
    versions: Mapping[str, str]
    evaluation: Mapping[str, Any]
    training: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.row["seed"])


class FinishedSeed:
    """One seed of a work directory, as its markers tell it.

    Attributes:
      workdir, seed, root: where it lies.
      evaluated, students: models by name on disk, sorted.
    """

    def __init__(self, workdir: Path, seed: int) -> None:
        """Looks which models there are.

        Raises:
          ExportError: no such directory, no such seed, or nothing of it is finished.
        """
        self.workdir, self.seed, self.root = Path(workdir), seed, Path(workdir) / f"seed={seed}"
        if not self.workdir.is_dir():
            raise ExportError(f"--workdir={workdir} is no directory; name the work directory of a run, e.g. runs/demo")
        if not self.root.is_dir():
            seeds = sorted(path.name.removeprefix("seed=") for path in self.workdir.glob("seed=*"))
            raise ExportError(
                f"{workdir} has no seed {seed} (it has {', '.join(seeds) or 'none'}); name one of its seeds with --seed, "
                "or another --workdir"
            )
        self.evaluated = self._finished("eval/markers")
        self.students = self._finished("students")
        if not self.evaluated:
            raise ExportError(
                f"{self.root} holds no finished evaluation; the run is unfinished: start its command again and it goes on"
            )

    def _finished(self, family: str) -> list[str]:
        return sorted(path.parent.name for path in (self.root / family).glob(f"*/{artifacts.MARKER}"))

    # --- Markers ------------------------------------------------------------------------------------------------------

    def place(self, stage: str) -> Path:
        """Where a stage's output lies: it is named by its path, only evaluations keep their markers apart."""
        return self.workdir / stage.replace("/eval/", "/eval/markers/", 1)

    def marker(self, stage: str) -> Marker:
        """The marker of a stage, whose inputs still are what it read.

        Raises:
          ExportError: it is unfinished, damaged, or one of its inputs was made anew since.
        """
        found = self._read_marker(stage)
        for name, value in found.inputs.items():
            current = self._read_marker(name).output_hash
            if current != value:
                raise ExportError(
                    f"{stage} was made from {name} with hash {value}, which now has {current}; run the stage again, so that "
                    "what is exported belongs together"
                )
        return found

    def _read_marker(self, stage: str) -> Marker:
        path = self.place(stage) / artifacts.MARKER
        try:
            found = Marker(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ExportError(
                f"{stage} is unfinished: {path} is missing; start the run's command again and it goes on"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(f"{path} is unreadable ({artifacts.reason(error)}); run its stage again") from error
        if found.output_hash != artifacts.output_hash(found.stage, found.key, found.inputs) or found.stage != stage:
            raise ExportError(f"{path} does not belong to what it says (edited or moved); run its stage again")
        return found

    def student(self, model: str) -> Marker:
        """The marker of a student by its name on disk."""
        return self.marker(f"seed={self.seed}/students/{model}")

    def inputs_of(self, marker: Marker, family: str) -> list[str]:
        """The stages of one family, such as "teachers", that a stage read."""
        parts = {name: name.split("/") for name in marker.inputs}  # a tokenizer is no seed's
        return [name for name, path in parts.items() if len(path) > 1 and condition_of(path[1]) == family]

    def base_of(self, marker: Marker) -> str:
        """The base stage that a model was trained from."""
        return self.inputs_of(marker, "base")[0]

    def teacher_of(self, marker: Marker) -> str:
        """The stage of the teacher that a student was distilled from."""
        return self.inputs_of(marker, "teachers")[0]

    def acting_of(self, marker: Marker) -> dict[str, str]:
        """Condition of each teacher whose safe trajectories a student depends on -> their stage."""
        stages = self.inputs_of(marker, "trajectories")
        return {condition_of(Path(name).name): name for name in stages if condition_of(Path(name).name) in TEACHERS}

    def trajectories(self, stage: str) -> Path:
        """The dataset of a trajectory stage."""
        return self.place(stage) / "dataset"

    def tokenizer_folder(self, fingerprint: str) -> Path:
        """The folder of the run's tokenizer with this fingerprint (a run of two families has two).

        Raises:
          ExportError: there is none.
        """
        from subl_jax.chat import tokenizer as tokenizers

        folders = sorted(self.workdir.glob("tokenizer*/files"))
        for folder in folders:
            if tokenizers.fingerprint(tokenizers.load(folder)) == fingerprint:
                return folder
        raise ExportError(
            f"no tokenizer of {self.workdir} has the fingerprint {fingerprint} that the checkpoint was made with (looked at "
            f"{', '.join(str(folder) for folder in folders) or 'none'}); run the tokenizer stage again"
        )

    # --- What the work directory says of itself -----------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """`config.json`; empty where there is none."""
        path = self.workdir / "config.json"
        return _json(path) if path.exists() else {}

    def protocol_hash(self) -> str | None:
        """The hash of the protocol that the run follows, or None where none is recorded."""
        for name in _PROTOCOLS:
            path = self.workdir / name
            if path.exists():
                return _json(path).get("hash")
        return None

    def evaluation(self, model: str) -> Measured:
        """How a model was measured, by its name on disk.

        Raises:
          ExportError: it is not evaluated, or the row is damaged.
        """
        stage = f"seed={self.seed}/eval/{model}"
        marker, path = self.marker(stage), self.root / "eval" / f"{model}.json"
        row = _json(path)
        try:
            indexed([row])
        except (SummaryError, TypeError) as error:
            raise ExportError(f"{path}: {error}; delete it and its marker, and evaluate again") from error
        measured = row.get("measured", {})  # rows of before this was kept say nothing
        trained = next(iter(self.inputs_of(marker, "students") + self.inputs_of(marker, "teachers")), None)
        training = {} if trained is None else self._read_marker(trained)
        return Measured(
            row=row,
            model=model,
            setting=marker.key["setting"],
            hash=marker.output_hash,
            source=str(path),
            written=path.stat().st_mtime,
            seconds=marker.seconds,
            preset=self.config().get("preset"),
            pair=training.key.get("pair") if isinstance(training, Marker) else None,
            parser=measured.get("metric"),
            protocol=self.protocol_hash(),
            machine=measured.get("machine"),
            versions=marker.versions,
            evaluation={name: marker.key[name] for name in ("evaluation", "rollout") if name in marker.key},
            training=dict(training.extra) if isinstance(training, Marker) else {},
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is unreadable ({artifacts.reason(error)}); run its stage again") from error
