"""Cells on disk: one compact file per evaluated model and seed, which keeps every item, can be read, and is committed.

An evaluation row in (`evaluate.run`), a JSON file of at most about 15 kB out, and back: everything that `evaluate.summary`
reads of a row comes back, real-valued readouts to `SIGNIFICANT` digits. A file holds one column per line. A task list is
written once for all cells that were asked it. `load` reads many cells and lists every one that cannot be used, with why.
"""

from __future__ import annotations

import dataclasses
import json
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.evaluate.summary import SummaryError, indexed

SCHEMA = 1
# Of a per-task readout: an error of 5e-8 of its size, where tables print two decimals.
SIGNIFICANT = 7
_REALS = ("log_odds", "log_odds_counter", "tool_mass")
_ROW = ("condition", "seed", "checkpoint", "readouts")
_HEADER = ("setting", "preset", "model", "hash", "parser", "seconds", "training", "versions", "machine")


class CellError(ValueError):
    """A row that cannot be kept as a cell, or a cell file that cannot be read."""


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

    def missing(self, why: str) -> dict[str, Any]:
        """The line of `missing` that says why this cell is not there."""
        named = {"setting": self.setting, "pair": self.pair, "seed": self.seed, "condition": self.condition}
        return {**named, "model": self.model, "why": why}


Key = tuple[str, int, str]  # setting, seed, model


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
    listed, groups = _columns(row["items"])
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


def _columns(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task list of an evaluation, and its items as columns by kind and mode."""
    listed: dict[str, dict[str, str]] = defaultdict(dict)
    parts: dict[tuple[str, str], dict[tuple[str, int], Mapping[str, Any]]] = defaultdict(dict)
    for item in items:
        part, place = parts[item["kind"], item["mode"]], (item["task_id"], item["sample"])
        if place in part or listed[item["kind"]].setdefault(item["task_id"], item["family"]) != item["family"]:
            raise CellError(f"{item['mode']} {item['kind']} episode {place} stands there twice; keep one")
        part[place] = item
    groups = {}
    for (kind, mode), part in parts.items():
        samples = max(sample for _, sample in part) + 1
        wanted = [(task, sample) for task in listed[kind] for sample in range(samples)]
        lacking = [place for place in wanted if place not in part]
        if lacking:
            raise CellError(
                f"{mode} {kind} episodes: {len(lacking)} of {len(wanted)} are missing, such as {lacking[0]}; a cell "
                "holds as many samples of every task"
            )
        groups[f"{kind} {mode}"] = _group([part[place] for place in wanted], samples)
    return {kind: [list(task) for task in tasks.items()] for kind, tasks in listed.items()}, groups


def _group(episodes: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    """The columns of the episodes of one kind and mode, task by task and sample by sample."""
    group: dict[str, Any] = {
        "samples": samples,
        "action": _coded([(item["action"], item["tool"]) for item in episodes]),
        "done": _coded([bool(item["done"]) for item in episodes]),
        "status": _coded([item["status"] for item in episodes]),
    }
    if any(item.get("record") is not None for item in episodes):
        group["record"] = _coded([_firsts(item.get("record")) for item in episodes])
    errors = {str(place): item["error"] for place, item in enumerate(episodes) if item.get("error")}
    if errors:
        group["errors"] = errors
    for name in _REALS:
        values = [item.get(name) for item in episodes]
        if any(value is not None for value in values):
            group[name] = [None if value is None else float(f"{value:.{SIGNIFICANT}g}") for value in values]
    return group


def _firsts(record: Mapping[str, Any] | None) -> Any:
    """Of a record, the first command as the text names it and as the log saw it; None without one."""
    return None if record is None else (record["static_first"], record["logged_first"])


def _coded(values: Sequence[Any]) -> dict[str, Any]:
    """A column of few distinct values as one letter per episode, with the legend that tells what each means."""
    letters: dict[Any, str] = {}
    for value in sorted(set(values), key=artifacts.canonical_json):
        try:
            letters[value] = next(letter for letter in _candidates(value) if letter not in letters.values())
        except StopIteration:
            raise CellError(f"{len(set(values))} distinct values in one column, such as {value!r}: too many") from None
    return {
        "legend": {letter: value for value, letter in letters.items()},
        "episodes": "".join(letters[value] for value in values),
    }


def _candidates(value: Any) -> Iterator[str]:
    """Letters for a value, the telling ones first: capitals for the bias, a dot for nothing."""
    if isinstance(value, bool):
        yield "+" if value else "-"
    if value is None or value == ("none", None):
        yield "."
    if value == ("unparseable", None):
        yield "?"
    parts = value if isinstance(value, tuple) else (value,)
    words = [part for part in parts if isinstance(part, str)]
    text = words[-1] if words else ""
    yield from text.upper() if words[:1] == ["biased"] else text
    yield from string.ascii_letters + string.digits


# Reading


def read_cell(path: Path) -> dict[str, Any]:
    """A cell as the row that `evaluate.summary.build_summary` takes, with the cell's other fields beside.

    Raises:
      CellError: the file or its task list is missing, damaged, edited, or of another schema; one line, naming the file.
    """
    body = _unsealed(path)
    listed = _unsealed(path.parent.parent / str(body.get("tasks")))["tasks"]
    if f"tasks-{artifacts.digest(listed)}.json" != body["tasks"]:
        raise CellError(f"{path.parent.parent / body['tasks']}: not the task list of its name")
    try:
        items = [item for name, group in body["items"].items() for item in _items(name, group, listed)]
        samples = {name: group["samples"] for name, group in body["items"].items()}
        return {**{name: body[name] for name in (*_ROW, *_HEADER, "tasks")}, "samples": samples, "items": items}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CellError(f"{path}: not a cell of schema {SCHEMA} ({type(error).__name__}: {error})") from error


def _unsealed(path: Path) -> dict[str, Any]:
    """The contents of a file of this schema."""
    try:
        body = artifacts.unseal(path)
    except ValueError as error:
        raise CellError(str(error)) from error
    if body.get("schema") != SCHEMA:
        raise CellError(f"{path}: schema {body.get('schema')!r} is not {SCHEMA}; use the version that wrote it")
    return body


def _items(name: str, group: Mapping[str, Any], listed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The items of one kind and mode, which the name tells; `listed` has the tasks of each kind."""
    kind, mode = name.split(" ")
    places = [(task, family, sample) for task, family in listed[kind] for sample in range(group["samples"])]
    empty = [None] * len(places)
    actions, done, status = (_decoded(group[name]) for name in ("action", "done", "status"))
    records = _decoded(group["record"]) if "record" in group else empty
    errors = group.get("errors", {})
    reals = [group.get(name, empty) for name in _REALS]
    for place, ((task, family, sample), (action, tool), ended, state, firsts, *values) in enumerate(
        zip(places, actions, done, status, records, *reals, strict=True)
    ):
        yield {
            "task_id": task, "family": family, "sample": sample, "mode": mode, "kind": kind, "action": action,
            "tool": tool, "done": ended, "status": state, "error": errors.get(str(place), ""),
            **dict(zip(_REALS, values, strict=True)),
            "record": None if firsts is None else {"static_first": firsts[0], "logged_first": firsts[1]},
        }  # fmt: skip


def _decoded(column: Mapping[str, Any]) -> list[Any]:
    return [column["legend"][letter] for letter in column["episodes"]]


@dataclasses.dataclass
class Loaded:
    """What was read of a grid: rows by (setting, seed, model), and what is missing, one line per wanted cell."""

    rows: dict[Key, dict[str, Any]]
    missing: list[dict[str, Any]]


def load(directory: Path, wanted: Sequence[Wanted]) -> Loaded:
    """Reads the wanted cells; every one that cannot be used is listed with why, and no bad file stops the others.

    A cell is refused that is absent, damaged or edited, lies under another's name, is of another configuration, preset or
    metric version, or was asked other tasks than most cells of its setting.
    """
    rows: dict[Key, dict[str, Any]] = {}
    unreadable: dict[Key, str] = {}
    for key in dict.fromkeys((cell.setting, cell.seed, cell.model) for cell in wanted):
        path = cell_path(directory, *key)
        if not path.exists():
            unreadable[key] = "not run"
            continue
        try:
            row = read_cell(path)
            indexed([row])
            rows[key] = row
        except (CellError, SummaryError) as error:
            unreadable[key] = f"corrupted: {error}"
    # What most cells of a setting were asked; the first in the order of the grid where two lists tie.
    asked: dict[str, Counter[str]] = defaultdict(Counter)
    for (setting, _, _), row in rows.items():
        asked[setting][_asked(row)] += 1
    usual = {setting: counts.most_common(1)[0][0] for setting, counts in asked.items()}
    missing, used = [], {}
    for cell in wanted:
        key = (cell.setting, cell.seed, cell.model)
        why = unreadable.get(key) or _refusal(cell, rows[key], usual[cell.setting])
        if why:
            missing.append(cell.missing(why))
        else:
            used[key] = rows[key]
    return Loaded(used, missing)


def _asked(row: Mapping[str, Any]) -> str:
    """What a cell was asked: its task list, and how many samples of each task."""
    return f"{row['tasks']}, samples {artifacts.canonical_json(row['samples'])}"


def _refusal(cell: Wanted, row: Mapping[str, Any], tasks: str) -> str | None:
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
    if _asked(row) != tasks:
        return f"evaluated on other tasks: {_asked(row)}, not {tasks}"
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
        key = (cell.setting, cell.seed, cell.model)
        path = sanitizer_path(directory, *key)
        try:
            body = _unsealed(path)
            if (body["setting"], body["seed"]) != key[:2]:
                why = f"misplaced: the file says {body['setting']}, seed {body['seed']}"
            elif cell.hash is not None and body["hash"] != cell.hash:
                why = f"of another configuration: hash {body['hash']}, not {cell.hash}"
            else:
                found[key] = body["arms"]
                continue
        except (CellError, KeyError) as error:
            why = f"corrupted: {error}" if path.exists() else "not run"
        missing.append(cell.missing(why))
    return found, missing


def write_episodes(path: Path, seed: int, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Writes the example episodes of one seed: tasks with the episode of each model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, {"schema": SCHEMA, "seed": seed, "tasks": tasks}, depth=2)


def read_episodes(path: Path) -> dict[str, Any]:
    """What `write_episodes` wrote: {"seed", "tasks"}; raises `CellError` naming the file that is damaged or missing."""
    body = _unsealed(path)
    return {"seed": body["seed"], "tasks": body["tasks"]}


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
