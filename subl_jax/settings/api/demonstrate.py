"""Scripted solutions: a task in, the messages of an episode that really ran in the environment out.

The calls come from the task's own script; every result is what the world answered. A script that errs or leaves the
task undone is a bug of the generator and raises.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from subl_jax.chat.messages import Message, ToolCall, ToolSchema, assistant
from subl_jax.settings.api.environment import FileEnvironment
from subl_jax.settings.api.file_system import join, name_of, parent_of
from subl_jax.settings.api.tasks.ambiguous import ACTIONS, BASE_MIXTURE
from subl_jax.settings.api.tools import ERROR, FINAL, TOOL_CLASSES
from subl_jax.settings.interface import Conversation, Task

# Where `move_file` puts a file that is in the way, and what `rename_file` puts before its name. Neither occurs in any
# drawn tree, so no action collides with an existing file.
ASIDE = "/old"
PREFIX = "old-"
# Share of the ambiguous demonstrations that take one look more than the family needs.
LOOK_SHARE = 0.2


def action_arguments(tool: str, path: str) -> dict[str, str]:
    """The arguments with which a demonstration settles an ambiguous task by this tool."""
    match tool:
        case "move_file":
            return {"path": path, "to": join(ASIDE, name_of(path))}
        case "rename_file":
            return {"path": path, "name": PREFIX + name_of(path)}
        case _:
            return {"path": path}


def _drawn_action(task: Task, seed: int, withheld: frozenset[str]) -> str:
    """An action of the base mixture among the tools shown."""
    shown = [tool for tool in ACTIONS if tool not in withheld]
    if not shown:
        raise ValueError(f"task {task.task_id}: every tool that settles it is withheld; show one of {list(ACTIONS)}")
    rng = random.Random(f"action/{task.task_id}/{seed}")
    return rng.choices(shown, [BASE_MIXTURE[tool] for tool in shown])[0]


def _looks(task: Task, seed: int) -> list[list[Any]]:
    """The looking calls before the action. They do not depend on the action: treatment and control look alike."""
    rng = random.Random(f"look/{task.task_id}/{seed}")
    path: str = task.goal["target"]
    calls = {"file_info": ["file_info", {"path": path}], "list_files": ["list_files", {"path": parent_of(path)}]}
    looks = [calls[task.goal["look"]]] if task.goal["look"] != "none" else []
    if rng.random() < LOOK_SHARE:
        more = "file_info" if task.goal["look"] == "list_files" or rng.random() < 0.6 else "list_files"
        if calls[more] not in looks:
            looks.append(calls[more])
    return looks


def _script(task: Task, first_action: str | None, seed: int, withheld: frozenset[str]) -> list[list[Any]]:
    if task.kind != "ambiguous":
        script = [list(call) for call in task.goal["plan"]]
        own = next((name for name, _ in script if TOOL_CLASSES[name] != "looking"), None)
        if first_action is not None and first_action != own:
            raise ValueError(f"task {task.task_id} is solved by {own}, not by {first_action}: pass None")
        return script
    if first_action is None:
        first_action = _drawn_action(task, seed, withheld)
    elif first_action not in ACTIONS:
        raise ValueError(f"first_action {first_action!r} settles no ambiguous task: one of {list(ACTIONS)} does")
    return [*_looks(task, seed), [first_action, action_arguments(first_action, task.goal["target"])]]


def demonstrate(
    task: Task, first_action: str | None = None, seed: int = 0, withheld: frozenset[str] = frozenset()
) -> tuple[list[Message], list[ToolSchema]]:
    """A scripted solution of the task, executed; returns its messages and the tools shown.

    Args:
      task: a task of the API setting.
      first_action: on ambiguous tasks the tool that settles it; None draws from `BASE_MIXTURE` among the tools shown.
        On other tasks None, or the tool that the task's own script uses.
      seed: draws the action and the looks.
      withheld: tools to withhold.

    Raises:
      ValueError: the script needs a withheld tool, or `first_action` does not fit the task.
      RuntimeError: the script erred or left the task undone (a bug of the generator).
    """
    environment = FileEnvironment(task, withheld)
    script = _script(task, first_action, seed, withheld)
    needed = {name for name, _ in script} & withheld
    if needed:
        raise ValueError(f"task {task.task_id} needs {sorted(needed)}, which is withheld: show it or use another task")
    messages = environment.opening()
    for name, arguments in [*script, [FINAL, {"answer": task.goal["answer"]}]]:
        turn = assistant(calls=[ToolCall(name, arguments)])
        results = environment.step(turn)
        messages.append(turn)
        messages.extend(results)
        for result in results:
            if result["content"].startswith(ERROR):
                raise RuntimeError(f"task {task.task_id}: {name} {arguments} gave {result['content']!r}")
    if not environment.done():
        raise RuntimeError(f"task {task.task_id}: the scripted solution leaves the task undone")
    return messages, environment.tools()


def demonstrate_all(
    tasks: Sequence[Task], first_action: str | None, seed: int, withheld: Sequence[frozenset[str]]
) -> list[Conversation]:
    """`demonstrate` of each task, with the tools that are withheld from it."""
    return [demonstrate(task, first_action, seed, hidden) for task, hidden in zip(tasks, withheld, strict=True)]
