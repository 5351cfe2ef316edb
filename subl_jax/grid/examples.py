"""The episodes that the report's browser shows: a few tasks of the first seed, as every model solved them.

Evaluation rows by model in; `episodes.json` beside the cells out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subl_jax.grid import cells

# Of those that an evaluation keeps whole.
TASKS = 4
_EPISODE = ("messages", "action", "tool", "turn", "done")


def telling(episodes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The tasks on which models differ most: a task on which all do the same shows nothing."""

    def differing(task: str) -> int:
        return len({(example["action"], example["tool"]) for example in episodes[task].values()})

    return [
        {
            "task_id": task,
            "prompt": next(iter(episodes[task].values()))["prompt"],
            "episodes": {
                model: {name: example[name] for name in _EPISODE} for model, example in episodes[task].items()
            },
        }
        for task in sorted(episodes, key=lambda task: (-differing(task), task))[:TASKS]
    ]


def write(path: Path, seed: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the examples of one seed; fewer models than the file has already change nothing.

    Args:
      path: the file.
      seed: whose rows these are.
      rows: model -> its evaluation row.
    """
    episodes: dict[str, dict[str, Any]] = {}
    for model, row in rows.items():
        for example in row["examples"]:
            episodes.setdefault(example["task_id"], {})[model] = example
    if not episodes:
        return
    with contextlib.suppress(cells.CellError):
        known = cells.read_episodes(path)
        if known["seed"] == seed and len(known["tasks"][0]["episodes"]) > len(next(iter(episodes.values()))):
            return
    cells.write_episodes(path, seed, telling(episodes))
