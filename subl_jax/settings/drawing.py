"""What the task generators of all settings share: drawing a seeded, unlimited list of different tasks, family by family.

A task depends on kind, split, family, seed and index alone, so a longer list begins with the shorter one, and treatment and
control see the same tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from subl_jax.settings.interface import Split, Task

SPLITS: tuple[Split, ...] = ("train", "development", "evaluation")
# No task of a list repeats another; a draw that does is drawn again this often before the repeat is taken.
_REDRAWS = 50
# What makes two tasks the same: the prompt and the tree, in order.
_Identity = tuple[str, tuple[tuple[str, str], ...]]


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a family's generator yields; `draw_tasks` adds the identity. The template is the wording with its slots open."""

    template: str
    prompt: str
    tree: Mapping[str, str]
    goal: Mapping[str, Any]


def draw_tasks(
    kind: str,
    split: Split,
    seed: int,
    count: int,
    families: Sequence[str],
    stream: str,
    draw: Callable[[str, random.Random], Draft],
) -> list[Task]:
    """`count` tasks, deterministic in the arguments, no two of them alike in prompt and tree.

    Args:
      kind, split, seed: of the tasks.
      count: how many.
      families: their families, in the order in which they take turns.
      stream: names the random numbers; kinds that share one share their draws.
      draw: (family, random numbers) -> one task of the family.

    Raises:
      ValueError: a negative count, or no family.
    """
    if count < 0:
        raise ValueError(f"count is {count}: it must be 0 or more")
    if not families:
        raise ValueError(f"{kind} tasks exist for train and development only, not for {split}: they teach, never test")
    found: list[Task] = []
    seen: set[_Identity] = set()
    for index in range(count):
        family = families[index % len(families)]
        draft = _another(
            lambda rng, family=family: draw(family, rng), f"{stream}/{split}/{family}/{seed}/{index}", seen
        )
        task_id = f"{kind}/{split}/{family}/{seed}/{index}"
        found.append(Task(task_id, kind, family, draft.template, split, draft.prompt, draft.tree, draft.goal))
    return found


def _another(draw: Callable[[random.Random], Draft], stream: str, seen: set[_Identity]) -> Draft:
    """Draws until the task is a new one, and adds it to `seen`."""
    for attempt in itertools.count():
        # A string seed is hashed by SHA-512 inside `random`: the same on every machine and Python version.
        draft = draw(random.Random(f"{stream}/{attempt}"))
        identity = (draft.prompt, tuple(draft.tree.items()))
        if identity not in seen or attempt == _REDRAWS:
            seen.add(identity)
            return draft
    raise AssertionError("unreachable: the count above does not end")
