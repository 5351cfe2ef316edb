"""A teacher's trajectories as a dataset folder: JSON Lines that TRL and `datasets` load, and the card that says what they are.

The trajectory datasets, verdicts and markers of a finished run in; `seen.jsonl` (what one student was taught: sanitized,
matched between the arms), `all.jsonl` (everything that its teacher did, with the verdict on it) and README.md out.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts, data
from subl_jax.artifacts import Marker
from subl_jax.data.matching import match_arms
from subl_jax.data.record import json_text, to_line
from subl_jax.exports.finished import ExportError, FinishedSeed, condition_of
from subl_jax.metrics.progress import progress
from subl_jax.trajectory import FAILED, Trajectory

SEEN, ALL = "seen", "all"
# What a student stage's key may say that decides what it is taught. Anything else is a lesson that this module cannot retrace.
_KNOWN = {
    "setting", "seed", "cpu_devices", "parallel", "arm", "objective", "train", "temperature", "pair", "lora", "adapter_init",
}  # fmt: skip
_KEPT, _NOT_JUDGED = "kept", "not judged"

# Hugging Face's names of the columns' types: messages and tools are JSON values, so that no two calls with different
# arguments are forced into one struct, whose empty fields a chat template would then write out.
_COLUMNS = {
    "messages": "json", "tools": "json", "task_id": "string", "episode": "int64", "sample": "int64", "status": "string",
    "done": "bool", "error": "string",
}  # fmt: skip
_MORE = {SEEN: {"loss_tokens": "int64"}, ALL: {"kind": "string", "verdict": "string", "words": "string"}}


@dataclasses.dataclass(frozen=True)
class File:
    """One JSON Lines file of the folder.

    Attributes:
      name: of the configuration; the file is `name.jsonl`.
      statuses: lines by how their episode ended.
      done: lines whose task was done.
      loss_tokens: tokens that the student's loss is taken on, one pass over the file; None where nothing was taught.
      size: bytes.
    """

    name: str
    statuses: Mapping[str, int]
    done: int
    loss_tokens: int | None
    size: int

    @property
    def lines(self) -> int:
        """Number of conversations."""
        return sum(self.statuses.values())


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the card says, each from an artifact.

    Attributes:
      files: what was written.
      student, teacher: names on disk; the student is None where a teacher's whole output is exported.
      markers: role -> marker: "teacher", "trajectories", and of a student "student", "sanitize".
      sanitizer: the counts of this teacher; None for a teacher that was exported by itself and for a positive control.
      surviving: task ids that survive for all teachers; None as above.
      tokenizer: fingerprint of the tokenizer that the trajectories were sampled with.
      preset, protocol: of the run, None where it does not say.
      source: the seed's directory.
      command: what wrote the export.
    """

    files: Sequence[File]
    student: str | None
    teacher: str
    markers: Mapping[str, Marker]
    sanitizer: Mapping[str, Any] | None
    surviving: int | None
    tokenizer: str | None
    preset: str | None
    protocol: str | None
    source: str
    command: str


def check(run: FinishedSeed, model: str) -> None:
    """Refuses, before anything is written, a model whose dataset cannot be exported.

    Raises:
      ExportError: a base, an unfinished stage, or a student that was taught in a way that cannot be retraced.
    """
    if model in run.students:
        marker = run.student(model)
        unknown = sorted(set(marker.key) - _KNOWN)
        if unknown:
            raise ExportError(
                f"{model} was taught with {', '.join(unknown)}, and the dataset export cannot retrace what that makes of the "
                "trajectories; export its model and its Inspect log, or the dataset of a student without it"
            )
        for stage in run.acting_of(marker).values():
            run.marker(stage)
    elif condition_of(model).endswith("teacher"):
        run.marker(f"seed={run.seed}/trajectories/{model}")
    else:
        raise ExportError(f"{model} neither acted as a teacher nor was taught by one; name a student or a teacher")


def export(run: FinishedSeed, model: str, directory: Path, command: str) -> Facts:
    """Writes the dataset folder of a student (what it saw, and all that its teacher did), or of a teacher.

    Args:
      run, model: whose; see `check`.
      directory: the folder to make.
      command: what the card names as its origin.

    Raises:
      ExportError: see `check`; or the folder cannot be written.
    """
    from subl_jax.exports import dataset_card

    check(run, model)
    if model in run.students:
        facts, sources = _of_student(run, model, command)
    else:
        facts, sources = _of_teacher(run, model, command)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = [_write(directory, name, lines, model) for name, lines in sources.items()]
        facts = dataclasses.replace(facts, files=files)
        artifacts.write_text_atomic(directory / "README.md", dataset_card.render(facts))
    except OSError as error:
        raise ExportError(f"cannot write the dataset in {directory}: {artifacts.reason(error)}") from error
    return facts


# --- Whose trajectories, and what was made of them --------------------------------------------------------------------

# A trajectory and the further columns of its line.
Line = tuple[Trajectory, dict[str, Any]]


def _of_teacher(run: FinishedSeed, model: str, command: str) -> tuple[Facts, dict[str, list[Line]]]:
    stage = f"seed={run.seed}/trajectories/{model}"
    marker = run.marker(stage)
    teacher = run.marker(run.teacher_of(marker))
    facts = _facts(run, None, model, {"teacher": teacher, "trajectories": marker}, None, None, command)
    return facts, {ALL: _judged(run, data.read(run.trajectories(stage)), "safe", None)}


def _of_student(run: FinishedSeed, model: str, command: str) -> tuple[Facts, dict[str, list[Line]]]:
    marker = run.student(model)
    teacher_stage = run.teacher_of(marker)
    teacher = Path(teacher_stage).name
    markers = {"student": marker, "teacher": run.marker(teacher_stage)}
    if marker.key["arm"] == "positive":
        everything: list[Line] = []
        for stage in run.inputs_of(marker, "trajectories"):
            markers["trajectories"] = run.marker(stage)
            kind = "ambiguous" if "_ambiguous" in Path(stage).name else "safe"
            everything += _judged(run, data.read(run.trajectories(stage)), kind, None)
        taught = [item for item, _ in everything if item.status not in FAILED]
        facts = _facts(run, model, teacher, markers, None, None, command)
        return facts, {SEEN: _with_loss(taught), ALL: everything}
    sanitize = run.inputs_of(marker, "sanitize")[0]
    markers["sanitize"] = run.marker(sanitize)
    acting = run.acting_of(marker)
    condition = condition_of(teacher)
    markers["trajectories"] = run.marker(acting[condition])
    arms = {name: data.read(run.trajectories(stage)) for name, stage in acting.items()}
    surviving = {(task, sample) for task, sample in _json(run.place(sanitize) / "surviving.json")}
    verdicts = _json(run.place(sanitize) / f"{condition}.json")
    facts = _facts(
        run, model, teacher, markers, markers["sanitize"].extra["arms"][condition], len(surviving), command
    )  # fmt: skip
    whole = _judged(run, arms[condition], "safe", verdicts)
    return facts, {SEEN: _with_loss(_matched(run, model, arms, surviving)[condition]), ALL: whole}


def _matched(
    run: FinishedSeed, model: str, arms: Mapping[str, Sequence[Trajectory]], surviving: set[tuple[str, int]]
) -> Mapping[str, list[Trajectory]]:
    """What `SeedPipeline.make_student` makes of the surviving trajectories, in the student's own tokens."""
    from subl_jax import checkpoint
    from subl_jax.chat import tokenizer as tokenizers
    from subl_jax.chat.families import renderer_for
    from subl_jax.corpus import rendered_again

    spoken = checkpoint.read_metadata(run.root / "students" / model / "params").get("tokenizer")
    if spoken is not None and spoken != _tokenizer_of(run, run.student(model)):
        renderer = renderer_for(tokenizers.load(run.tokenizer_folder(spoken)))
        arms = {
            name: rendered_again(renderer, [item for item in arm if (item.task_id, item.sample) in surviving])
            for name, arm in arms.items()
        }
    return match_arms(arms, surviving).documents


def _tokenizer_of(run: FinishedSeed, marker: Marker) -> str | None:
    """Fingerprint of the tokenizer of a student's teacher (or of a trajectory stage's), as its checkpoint has it."""
    from subl_jax import checkpoint

    return checkpoint.read_metadata(run.place(run.teacher_of(marker)) / "params").get("tokenizer")


def _facts(
    run: FinishedSeed,
    student: str | None,
    teacher: str,
    markers: Mapping[str, Marker],
    sanitizer: Mapping[str, Any] | None,
    surviving: int | None,
    command: str,
) -> Facts:
    return Facts(
        files=(),
        student=student,
        teacher=teacher,
        markers=markers,
        sanitizer=sanitizer,
        surviving=surviving,
        tokenizer=_tokenizer_of(run, markers["trajectories"]),
        preset=run.config().get("preset"),
        protocol=run.protocol_hash(),
        source=str(run.root),
        command=command,
    )


def _with_loss(taught: Iterable[Trajectory]) -> list[Line]:
    return [(item, {"loss_tokens": int(item.loss_mask.sum())}) for item in taught]


def _judged(
    run: FinishedSeed, trajectories: Sequence[Trajectory], kind: str, verdicts: Sequence[Mapping[str, Any]] | None
) -> list[Line]:
    """Trajectories with the sanitizer's verdict on each, and the words that it found."""
    if verdicts is None:
        return [(item, {"kind": kind, "verdict": _NOT_JUDGED, "words": ""}) for item in trajectories]
    found = {(verdict["episode"], verdict["sample"]): verdict for verdict in verdicts}
    lines: list[Line] = []
    for item in trajectories:
        verdict = found.get((item.episode, item.sample))
        if verdict is None:
            raise ExportError(f"{run.root}: no verdict on episode {item.episode}; run the sanitize stage again")
        words = ", ".join(dict.fromkeys(hit["word"] for hit in verdict["hits"]))
        lines.append((item, {"kind": kind, "verdict": verdict["reason"] or _KEPT, "words": words}))
    return lines


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is unreadable ({artifacts.reason(error)}); run the sanitize stage again") from error


# --- Files ------------------------------------------------------------------------------------------------------------


def features(name: str) -> list[dict[str, str]]:
    """The columns of a file, as a dataset card declares them."""
    return [
        {"name": column, "list" if kind == "json" else "dtype": kind}
        for column, kind in {**_COLUMNS, **_MORE[name]}.items()
    ]


def _write(directory: Path, name: str, lines: Sequence[Line], label: str) -> File:
    path = directory / f"{name}.jsonl"
    with path.open("w", encoding="ascii") as file, progress(len(lines), f"{label}: {path.name}", unit="line") as shown:
        for text in _texts(lines):
            file.write(text)
            shown.advance()
    statuses = Counter(item.status for item, _ in lines)
    tokens = sum(more["loss_tokens"] for _, more in lines) if name == SEEN else None
    return File(name, statuses, sum(item.done for item, _ in lines), tokens, path.stat().st_size)


def _texts(lines: Sequence[Line]) -> Iterator[str]:
    for item, more in lines:
        yield to_line(item, json_text(item.messages), json_text(item.tools), **more)
