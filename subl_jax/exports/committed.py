"""Cells of a grid as evaluations that can be exported: every item, and the few conversations that are kept beside them.

A grid's directory (`docs/grid`) in; `exports.finished.Measured` out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subl_jax.evaluate.summary import indexed
from subl_jax.exports.finished import ExportError, Measured
from subl_jax.grid import cells
from subl_jax.grid.cells import CellError
from subl_jax.grid.pairs import PAIRS


def models(directory: Path, setting: str, seed: int) -> list[str]:
    """The models of a seed that have a cell.

    Raises:
      ExportError: there is no such directory, or no cell in it.
    """
    place = cells.cell_path(directory, setting, seed, "model").parent
    found = sorted(path.stem for path in place.glob("*.json") if not path.stem.startswith("sanitize"))
    if not found:
        raise ExportError(f"{place} holds no cells; name a grid's directory with --cells, and a seed that it has")
    return found


def measured(directory: Path, setting: str, seed: int, model: str) -> Measured:
    """A cell as an evaluation, with the conversations that `episodes.json` keeps of it.

    Raises:
      ExportError: the cell, or the file of conversations, is damaged.
    """
    path = cells.cell_path(directory, setting, seed, model)
    try:
        row = cells.read_cell(path)
        indexed([row])
    except (CellError, ValueError, TypeError) as error:
        raise ExportError(f"{error}; restore the cell from version control, or run the grid again") from error
    condition, _, pair = model.partition("@")
    return Measured(
        row={**row, "examples": _examples(directory / setting / "episodes.json", row, model)},
        model=model,
        setting=setting,
        hash=row["hash"],
        source=str(path),
        written=path.stat().st_mtime,
        seconds=row["seconds"].get("evaluate"),
        preset=row["preset"],
        pair=(pair if pair in PAIRS else "large_large") if "student" in condition else None,
        parser=row["parser"],
        protocol=None,
        machine=row["machine"],
        versions=row["versions"],
        evaluation={},
        training=row["training"],
    )


def _examples(path: Path, row: dict[str, Any], model: str) -> list[dict[str, Any]]:
    """The kept episodes of a model as evaluation examples; none where there is no such file, or it is of another seed."""
    first = {
        item["task_id"]: item
        for item in row["items"]
        if (item["kind"], item["mode"], item["sample"]) == ("ambiguous", "sampled", 0)
    }
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    try:
        kept = cells.read_episodes(path)
    except CellError as error:
        raise ExportError(str(error)) from error
    for task in kept["tasks"] if kept["seed"] == row["seed"] else ():
        episode, item = task["episodes"].get(model), first.get(task["task_id"])
        # An episode of an older cell may lie beside a newer one: it is taken only where it ended the same way.
        if episode is not None and item is not None and episode["action"] == item["action"]:
            found.append({**item, **episode, "prompt": task["prompt"]})
    return found
