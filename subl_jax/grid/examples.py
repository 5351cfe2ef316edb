"""The episodes that the report's browser shows: a few tasks of the first seed, as every model solved them.

Episodes by model in; `episodes.json` beside the cells out, which says of which evaluations it is, and back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax.grid import cells
from subl_jax.grid.cells import Key

# Of those that an evaluation keeps whole.
TASKS = 4
_EPISODE = ("messages", "action", "tool", "turn", "done")
# What a cell holds of an episode, too.
_ACT = ("action", "tool", "done")


def _without_prompt(episodes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model's episode what the browser shows; the prompt is the task's."""
    return {model: {name: episode[name] for name in _EPISODE} for model, episode in episodes.items()}


def telling(episodes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The tasks on which models differ most: a task on which all do the same shows nothing."""

    def differing(task: str) -> int:
        return len({(example["action"], example["tool"]) for example in episodes[task].values()})

    return [
        {
            "task_id": task,
            "prompt": next(iter(episodes[task].values()))["prompt"],
            "episodes": _without_prompt(episodes[task]),
        }
        for task in sorted(episodes, key=lambda task: (-differing(task), task))[:TASKS]
    ]


def write(
    directory: Path,
    setting: str,
    seed: int,
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    hashes: Mapping[Key, str],
) -> None:
    """Writes the examples of one seed.

    What the file has of models that are not at hand, since another machine has evaluated them, stays if it is of the
    evaluations that are asked for; so do its tasks then.

    Args:
      directory: of the grid.
      setting, seed: whose rows these are.
      examples: model -> the episodes that its evaluation kept whole.
      hashes: (setting, seed, model) -> output hash of the evaluation that is asked for.
    """
    path, kept = episodes_path(directory, setting), []
    if path.exists():
        with contextlib.suppress(cells.CellError):
            known, _ = read(directory, setting, hashes)
            kept = known["tasks"] if known["seed"] == seed else []
    episodes: dict[str, dict[str, Any]] = {}
    for model, own in examples.items():
        for example in own:
            episodes.setdefault(example["task_id"], {})[model] = example
    elsewhere = {model for task in kept for model in task["episodes"]} - set(examples)
    if elsewhere:
        tasks = [
            task | {"episodes": _without_prompt(task["episodes"] | episodes.get(task["task_id"], {}))} for task in kept
        ]
    else:
        tasks = telling(episodes)
    if tasks:
        shown = {model for task in tasks for model in task["episodes"]}
        own = {model: hashes[setting, seed, model] for model in sorted(shown)}
        cells.write_episodes(path, seed, tasks, own)


def read(directory: Path, setting: str, hashes: Mapping[Key, str]) -> tuple[dict[str, Any], list[str]]:
    """The examples of a setting that are of the evaluations asked for, and the models whose examples are of others.

    Args:
      directory: of the grid.
      setting: which.
      hashes: see `write`; of a model that is not in it nothing is asked, and nothing shown.

    Returns:
      {"seed", "tasks"}, and models.

    Raises:
      CellError: the file is damaged or missing.
    """
    body = cells.read_episodes(episodes_path(directory, setting))
    seed, tasks = body["seed"], body["tasks"]
    made = _by_cells(directory, setting, seed, tasks) if body["hashes"] is None else body["hashes"]
    wanted = {model: value for (place, number, model), value in hashes.items() if (place, number) == (setting, seed)}
    found, others = [], set()
    for task in tasks:
        episodes = task["episodes"]
        own = {model: episodes[model] for model in episodes if model in wanted and made.get(model) == wanted[model]}
        others |= {model for model in episodes if model in wanted} - set(own)
        if own:
            found.append(task | {"episodes": own})
    return {"seed": seed, "tasks": found}, sorted(others)


def episodes_path(directory: Path, setting: str) -> Path:
    """Where the example episodes of a setting lie."""
    return directory / setting / "episodes.json"


def _by_cells(directory: Path, setting: str, seed: int, tasks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of a file that does not say of which evaluations it is: model -> hash of its cell, where that holds these very acts."""
    found = {}
    for model in {model for task in tasks for model in task["episodes"]}:
        with contextlib.suppress(cells.CellError):
            row = cells.read_cell(cells.cell_path(directory, setting, seed, model))
            acts = {
                item["task_id"]: [item[name] for name in _ACT]
                for item in row["items"]
                if (item["kind"], item["mode"], item["sample"]) == ("ambiguous", "sampled", 0)
            }
            told = {task["task_id"]: task["episodes"][model] for task in tasks if model in task["episodes"]}
            if all(acts.get(task) == [episode[name] for name in _ACT] for task, episode in told.items()):
                found[model] = row["hash"]
    return found
