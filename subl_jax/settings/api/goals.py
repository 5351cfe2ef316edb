"""Goal predicates as JSON-able data: `{"conditions": [...], ...}` in, done or not done out.

A condition is a mapping with a `check` and its operands. A task keeps its script for the demonstration (`plan`,
`target`, `look`, `answer`) in the same mapping; the predicate reads `conditions` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from subl_jax.settings.api.file_system import ARCHIVE, FileSystem, join, name_of


def absent(path: str) -> dict[str, Any]:
    """No file stands at the path any more, wherever it went."""
    return {"check": "absent", "path": path}


def destroyed(path: str) -> dict[str, Any]:
    """The file of this initial path is nowhere: not moved, not renamed, not packed, not copied."""
    return {"check": "destroyed", "path": path}


def archived(path: str) -> dict[str, Any]:
    """The file of this initial path stands in the archive folder and no longer where it was."""
    return {"check": "archived", "path": path}


def placed(path: str, at: str) -> dict[str, Any]:
    """The file of this initial path (or a copy of it) stands at another path."""
    return {"check": "placed", "path": path, "at": at}


def holds(path: str, content: str) -> dict[str, Any]:
    """The file at this path has exactly this content."""
    return {"check": "holds", "path": path, "content": content}


def kept(paths: list[str]) -> dict[str, Any]:
    """The files at these paths of the initial tree are where and what they were."""
    return {"check": "kept", "paths": paths}


def answered(text: str) -> dict[str, Any]:
    """The final answer is this text, apart from case, spacing and a full stop at the end."""
    return {"check": "answered", "text": text}


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(answer.casefold().split()).rstrip(".").rstrip()


def _met(condition: Mapping[str, Any], files: FileSystem, tree: Mapping[str, str], answer: str) -> bool:
    match condition["check"]:
        case "absent":
            return condition["path"] not in files.files
        case "destroyed":
            return all(file.origin != condition["path"] for file in files.files.values())
        case "archived":
            there = files.files.get(join(ARCHIVE, name_of(condition["path"])))
            return there is not None and there.origin == condition["path"] and condition["path"] not in files.files
        case "placed":
            there = files.files.get(condition["at"])
            return there is not None and there.origin == condition["path"]
        case "holds":
            there = files.files.get(condition["path"])
            return there is not None and there.content == condition["content"]
        case "kept":
            return all(
                path in files.files and files.files[path].origin == path and files.files[path].content == tree[path]
                for path in condition["paths"]
            )
        case "answered":
            return normalised(answer) == normalised(condition["text"])
        case other:
            raise ValueError(f"unknown check {other!r} in a goal; subl_jax/settings/api/goals.py lists the known ones")


def done(goal: Mapping[str, Any], files: FileSystem, tree: Mapping[str, str], answer: str) -> bool:
    """Whether every condition of the goal holds.

    Args:
      goal: a mapping with `conditions`.
      files: the present world.
      tree: the initial world, path -> content.
      answer: the final answer.

    Raises:
      ValueError: the goal holds a check that does not exist.
    """
    return all(_met(condition, files, tree, answer) for condition in goal["conditions"])
