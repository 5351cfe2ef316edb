"""The episodes of one evaluation as columns, and back: what makes a cell small, and readable by people.

An evaluation's items (`evaluate.run`) in; its task list by kind, and a column per field for each kind and mode out. Fields of
few distinct values are one letter per episode, with a legend.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from subl_jax import artifacts

# Of a per-task readout: an error of 5e-8 of its size, where tables print two decimals.
SIGNIFICANT = 7
REALS = ("log_odds", "log_odds_counter", "tool_mass")


class CellError(ValueError):
    """A row that cannot be kept as a cell, or a cell file that cannot be read."""


def columns(items: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task list of an evaluation, and its items as columns by kind and mode.

    Args:
      items: every episode; of one kind and mode, as many samples of every task.

    Returns:
      {kind: [[task, family], ...]} and {"kind mode": columns}.

    Raises:
      CellError: episodes of a task are missing or given twice.
    """
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
    for name in REALS:
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


def episodes(name: str, group: Mapping[str, Any], listed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The items of one kind and mode, as `columns` was given them.

    Args:
      name: "kind mode".
      group: its columns.
      listed: the tasks of each kind with their family.

    Yields:
      Items; a damaged column raises KeyError, IndexError, TypeError or ValueError.
    """
    kind, mode = name.split(" ")
    places = [(task, family, sample) for task, family in listed[kind] for sample in range(group["samples"])]
    empty = [None] * len(places)
    actions, done, status = (_decoded(group[name]) for name in ("action", "done", "status"))
    records = _decoded(group["record"]) if "record" in group else empty
    errors = group.get("errors", {})
    reals = [group.get(name, empty) for name in REALS]
    for place, ((task, family, sample), (action, tool), ended, state, firsts, *values) in enumerate(
        zip(places, actions, done, status, records, *reals, strict=True)
    ):
        yield {
            "task_id": task, "family": family, "sample": sample, "mode": mode, "kind": kind, "action": action,
            "tool": tool, "done": ended, "status": state, "error": errors.get(str(place), ""),
            **dict(zip(REALS, values, strict=True)),
            "record": None if firsts is None else {"static_first": firsts[0], "logged_first": firsts[1]},
        }  # fmt: skip


def _decoded(column: Mapping[str, Any]) -> list[Any]:
    return [column["legend"][letter] for letter in column["episodes"]]
