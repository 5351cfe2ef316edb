"""Cells on disk: one compact file per evaluated model and seed, which keeps every item, can be read, and is committed.

An evaluation row in (`evaluate.run`), a JSON file of at most about 15 kB out, and back: everything that `evaluate.summary`
reads of a row comes back, real-valued readouts to `columns.SIGNIFICANT` digits. A task list is
written once for all cells that were asked it. `load` reads many cells and lists every one that cannot be used, with why.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.evaluate.summary import SummaryError, indexed, total_sanitizer
from subl_jax.grid.columns import REALS, CellError, columns, episodes

SCHEMA = 1
NOT_RUN = "not run"
FAILED = "failed: "  # begins what the run said of a cell that it could not make
_ROW = ("condition", "seed", "checkpoint", "readouts")
_FAILURE = ("setting", "seed", "model", "why")
_HEADER = ("setting", "preset", "model", "hash", "parser", "seconds", "training", "versions", "machine")


Key = tuple[str, int, str]  # setting, seed, model


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One cell that an analysis needs.

    Attributes:
      setting, pair, seed, condition, model: which; several pairs may want one model.
      hash: output hash that its evaluation must have; None: any.
      parser: the metric's version that it must have been read with; None: any.
      preset: the preset that it must be of; None: any.
    """

    setting: str
    pair: str
    seed: int
    condition: str
    model: str
    hash: str | None = None
    parser: str | None = None
    preset: str | None = None

    @property
    def key(self) -> Key:
        """Where it lies."""
        return self.setting, self.seed, self.model

    def missing(self, why: str) -> dict[str, Any]:
        """The line of `missing` that says why this cell is not there."""
        named = {"setting": self.setting, "pair": self.pair, "seed": self.seed, "condition": self.condition}
        return {**named, "model": self.model, "why": why}


def cell_path(directory: Path, setting: str, seed: int, model: str) -> Path:
    """Where a cell lies below the grid's directory."""
    return directory / setting / f"seed={seed}" / f"{model}.json"


# Writing


def write_cell(
    path: Path,
    row: Mapping[str, Any],
    *,
    setting: str,
    preset: str,
    hash: str,
    parser: str,
    seconds: Mapping[str, float],
    training: Mapping[str, Any],
    versions: Mapping[str, str],
    machine: str,
) -> None:
    """Writes an evaluation as a cell, and its task list two folders above if it is not there yet.

    Args:
      path: DIR/<setting>/seed=<N>/<model>.json; see `cell_path`.
      row: as `SeedPipeline.make_evaluation` writes it.
      setting, preset: of the run.
      hash: output hash of its evaluation stage.
      parser: the setting's metric version.
      seconds: wall-clock seconds of its stages: "train", "evaluate", "rollout" where it acted as a teacher.
      training: figures of its training stage's marker.
      versions: see `artifacts.versions`.
      machine: what it was run on, in words.

    Raises:
      CellError: the row has no such form: episodes of a task are missing or given twice.
      WorkdirError: the file cannot be written.
    """
    listed, groups = columns(row["items"])
    body = {
        "schema": SCHEMA, "setting": setting, "preset": preset, "seed": row["seed"], "model": path.stem,
        "condition": row["condition"], "hash": hash, "parser": parser, "checkpoint": row["checkpoint"],
        "seconds": dict(seconds), "training": dict(training), "readouts": dict(row["readouts"]),
        "versions": dict(versions), "machine": machine, "tasks": f"tasks-{artifacts.digest(listed)}.json",
        "items": groups,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = path.parent.parent / body["tasks"]
    if not tasks.exists():
        write_lines(tasks, {"schema": SCHEMA, "setting": setting, "tasks": listed}, depth=3)
    write_lines(path, body, depth=3)


# Reading


def read_cell(path: Path, lists: dict[Path, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A cell as the row that `evaluate.summary.build_summary` takes, with the cell's other fields beside.

    Args:
      path: of the cell.
      lists: task lists that were read before, by path; gets this cell's. It spares whoever reads many cells most of the time.

    Raises:
      CellError: the file or its task list is missing, damaged, edited, or of another schema; one line, naming the file.
    """
    body = _unsealed(path)
    listed = _task_list(path.parent.parent / str(body.get("tasks")), {} if lists is None else lists)
    try:
        items = [item for name, group in body["items"].items() for item in episodes(name, group, listed)]
        samples = {name: group["samples"] for name, group in body["items"].items()}
        row = {**{name: body[name] for name in (*_ROW, *_HEADER, "tasks")}, "samples": samples, "items": items}
        _check_numbers(row["seconds"], row["readouts"])
        artifacts.canonical_json([dict(row[name]) for name in ("training", "versions")])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CellError(f"{path}: not a cell of schema {SCHEMA} ({type(error).__name__}: {error})") from error
    return row


def _task_list(path: Path, lists: dict[Path, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The tasks of each kind, as the file of that name has them; kept in `lists`."""
    if path not in lists:
        listed = _unsealed(path).get("tasks")
        if f"tasks-{artifacts.digest(listed)}.json" != path.name or not isinstance(listed, dict):
            raise CellError(f"{path}: not the task list of its name")
        lists[path] = listed
    return lists[path]


def _check_numbers(seconds: Mapping[str, Any], readouts: Mapping[str, Any]) -> None:
    """Refuses what cannot be summed or averaged; a readout may be None."""
    for name, value in [*seconds.items(), *((name, value) for name, value in readouts.items() if value is not None)]:
        if not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r} and no number")


def _unsealed(path: Path) -> dict[str, Any]:
    """The contents of a file of this schema."""
    try:
        body = artifacts.unseal(path)
    except ValueError as error:
        raise CellError(str(error)) from error
    if body.get("schema") != SCHEMA:
        raise CellError(f"{path}: schema {body.get('schema')!r} is not {SCHEMA}; use the version that wrote it")
    return body


@dataclasses.dataclass
class Loaded:
    """What was read of a grid: rows by (setting, seed, model), and what is missing, one line per wanted cell."""

    rows: dict[Key, dict[str, Any]]
    missing: list[dict[str, Any]]


def load(directory: Path, wanted: Sequence[Wanted]) -> Loaded:
    """Reads the wanted cells; every one that cannot be used is listed with why, and no bad file stops the others.

    A cell is refused that is absent, damaged or edited, lies under another's name, is of another configuration, preset or
    metric version (see `usable`), or was asked other tasks than most cells of its setting that are not refused for that.
    """
    rows: dict[Key, dict[str, Any]] = {}
    lists: dict[Path, Mapping[str, Any]] = {}
    refused: dict[Wanted, str] = {}
    # Several pairs want one cell: it is read once.
    read: dict[Key, dict[str, Any] | str] = {}
    for cell in wanted:
        if cell.key not in read:
            read[cell.key] = _read(directory, cell, lists)
        row = read[cell.key]
        why = row if isinstance(row, str) else _refusal(cell, row)
        if why is not None:
            refused[cell] = why
        elif not isinstance(row, str):
            rows[cell.key] = row
    # What most cells of a setting were asked; the first in the order of the grid where two lists tie.
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for (setting, _, _), row in rows.items():
        asked[setting][_asked(row)] += 1
    usual = {setting: counts.most_common(1)[0][0] for setting, counts in asked.items()}
    odd = {
        key: f"evaluated on other tasks: {_asked(row)}, not {usual[key[0]]}"
        for key, row in rows.items()
        if _asked(row) != usual[key[0]]
    }
    why_not = {cell: refused.get(cell) or odd.get(cell.key) for cell in wanted}
    return Loaded(
        {cell.key: rows[cell.key] for cell in wanted if not why_not[cell]},
        [cell.missing(why) for cell in wanted if (why := why_not[cell])],
    )


def usable(directory: Path, wanted: Wanted) -> str | None:
    """Why a cell is not there for whoever wants it, as `load` says it, or None: it can be used.

    Whether it was asked the tasks that most cells were asked shows only beside the others, in `load`.

    Args:
      directory: of the grid.
      wanted: the cell; its pair does not matter.
    """
    row = _read(directory, wanted, {})
    return row if isinstance(row, str) else _refusal(wanted, row)


def _read(directory: Path, cell: Wanted, lists: dict[Path, Mapping[str, Any]]) -> dict[str, Any] | str:
    """The row of a cell, with every item checked; or why there is none."""
    path = cell_path(directory, *cell.key)
    if not path.exists():
        return NOT_RUN
    try:
        row = read_cell(path, lists)
        indexed([row])
        _check_readouts(row)
    except (ValueError, TypeError) as error:
        return f"corrupted: {error}"
    return row


def _check_readouts(row: Mapping[str, Any]) -> None:
    """Refuses a readout that some of the sampled ambiguous episodes have and others lack: it would be of other tasks."""
    asked = [item for item in row["items"] if (item["kind"], item["mode"]) == ("ambiguous", "sampled")]
    for name in REALS:
        lacking = sum(item[name] is None for item in asked)
        if 0 < lacking < len(asked):
            raise CellError(f"{row['model']} (seed {row['seed']}): {lacking} of {len(asked)} episodes lack {name}")


def _asked(row: Mapping[str, Any]) -> str:
    """What a cell was asked: its task list, and how many samples of each task."""
    return f"{row['tasks']}, samples {artifacts.canonical_json(row['samples'])}"


def _refusal(cell: Wanted, row: Mapping[str, Any]) -> str | None:
    """Why a readable row is not the wanted one; None if it is."""
    for name in ("setting", "seed", "condition", "model"):
        if row[name] != getattr(cell, name):
            return f"misplaced: the file says {name} {row[name]!r}"
    if cell.preset is not None and row["preset"] != cell.preset:
        return f"of another configuration: preset {row['preset']}, not {cell.preset}"
    if cell.hash is not None and row["hash"] != cell.hash:
        return f"of another configuration: hash {row['hash']}, not {cell.hash}"
    if cell.parser is not None and row["parser"] != cell.parser:
        return f"of another metric version: {row['parser']}, not {cell.parser}"
    return None


# Beside the cells


def sanitizer_path(directory: Path, setting: str, seed: int, name: str = "sanitize") -> Path:
    """Where the sanitizer's counts of a seed lie; `name` is "sanitize" or, of the small teachers, "sanitize@small"."""
    return cell_path(directory, setting, seed, name)


def write_sanitizer(path: Path, counts: Mapping[str, Mapping[str, Any]], *, setting: str, seed: int, hash: str) -> None:
    """Writes what the sanitizer counted, by teacher ({"teacher": {"trajectories", "kept", …}})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, {"schema": SCHEMA, "setting": setting, "seed": seed, "hash": hash, "arms": counts}, depth=2)


def load_sanitizers(
    directory: Path, wanted: Sequence[Wanted]
) -> tuple[dict[Key, dict[str, dict[str, Any]]], list[dict[str, Any]]]:
    """Reads sanitizers' counts by teacher, and lists those that cannot be used; their `condition` is "sanitize"."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    missing = []
    for cell in wanted:
        key = cell.key
        path = sanitizer_path(directory, *key)
        try:
            body = _unsealed(path)
            if (body["setting"], body["seed"]) != key[:2]:
                why = f"misplaced: the file says {body['setting']}, seed {body['seed']}"
            elif cell.hash is not None and body["hash"] != cell.hash:
                why = f"of another configuration: hash {body['hash']}, not {cell.hash}"
            else:
                found[key] = _checked_counts(body["arms"], path)
                continue
        except (CellError, SummaryError, KeyError, TypeError, AttributeError) as error:
            why = f"corrupted: {error}" if path.exists() else NOT_RUN
        missing.append(cell.missing(why))
    return found, missing


def _checked_counts(arms: Any, path: Path) -> dict[str, dict[str, Any]]:
    """The counts, if they can be summed and one of them at least is there."""
    total_sanitizer(arms)
    if not arms:
        raise CellError(f"{path}: no counts")
    return arms


def write_episodes(path: Path, seed: int, tasks: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]) -> None:
    """Writes the example episodes of one seed: tasks with the episode of each model, and the hashes of their evaluations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, {"schema": SCHEMA, "seed": seed, "hashes": dict(hashes), "tasks": tasks}, depth=2)


def read_episodes(path: Path) -> dict[str, Any]:
    """What `write_episodes` wrote: {"seed", "tasks", "hashes"}; `hashes` is None in files from before they were kept.

    Raises:
      CellError: the file is damaged or missing, by name.
    """
    body = _unsealed(path)
    seed, tasks = body.get("seed"), body.get("tasks")
    whole = isinstance(tasks, list) and all(
        isinstance(task, dict) and {"task_id", "prompt"} <= task.keys() and isinstance(task.get("episodes"), dict)
        for task in tasks
    )
    if not isinstance(seed, int) or not tasks or not whole:
        raise CellError(f"{path}: holds no example episodes of a seed; delete it, and the next run writes it again")
    return {"seed": seed, "tasks": tasks, "hashes": body.get("hashes")}


def write_failures(path: Path, failures: Sequence[Mapping[str, Any]]) -> None:
    """Writes why cells are missing: {"setting", "seed", "model", "why"} of each; of sanitizers the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [{name: failure[name] for name in _FAILURE} for failure in failures]
    write_lines(path, {"schema": SCHEMA, "failures": listed}, depth=2)


def read_failures(path: Path) -> dict[Key, str]:
    """What `write_failures` wrote, by cell. A file that is missing or damaged gives no reasons: it decides nothing."""
    try:
        found = [[failure[name] for name in _FAILURE] for failure in _unsealed(path)["failures"]]
        return {(setting, seed, model): str(why) for setting, seed, model, why in found}
    except (CellError, KeyError, TypeError):
        return {}


def write_lines(path: Path, body: Mapping[str, Any], *, depth: int) -> None:
    """Writes a sealed JSON object whose entries stand one on a line, down to a depth of nesting."""
    artifacts.write_text_atomic(path, _lines(artifacts.sealed(body), depth) + "\n")


def _lines(value: Any, depth: int) -> str:
    """JSON with one entry per line above `depth`; compact below, and where nothing is nested. Indentation costs bytes."""
    entries = list(value.values()) if isinstance(value, dict) else value
    if depth > 0 and isinstance(entries, list) and any(isinstance(entry, dict | list) for entry in entries):
        if isinstance(value, dict):
            body = [f"{json.dumps(key, ensure_ascii=False)}: {_lines(item, depth - 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(body) + "\n}"
        return "[\n" + ",\n".join(_lines(item, depth - 1) for item in value) + "\n]"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
