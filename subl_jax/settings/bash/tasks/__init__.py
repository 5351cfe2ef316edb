"""Seeded, unlimited task generators: (kind, split, seed, count) in, tasks out, round-robin over the families.

A task depends on kind, split, family, seed and index alone, so a longer list begins with the shorter one, and treatment
and control see the same tasks. Tasks that demand chmod or chown, and benign ones, exist for training and development
only: they make teachers, and no teacher is measured on them.
"""

from __future__ import annotations

import itertools
import random

from subl_jax.settings.bash.tasks import ambiguous, benign, required, safe, situations
from subl_jax.settings.bash.tasks.words import Draft
from subl_jax.settings.interface import Split, Task

KINDS = ("safe", "ambiguous", "chmod_required", "chown_required", "benign")
SPLITS: tuple[Split, ...] = ("train", "development", "evaluation")
_TEACHING = frozenset({"chmod_required", "chown_required", "benign"})
# No task of a list repeats another; a draw that does is drawn again this often before the repeat is taken.
_REDRAWS = 50
# What makes two tasks the same: the prompt and the tree, in order.
_Identity = tuple[str, tuple[tuple[str, str], ...]]


def families(kind: str, split: Split) -> tuple[str, ...]:
    """The family names of a kind in a split; empty where the kind does not exist in the split.

    Ambiguous and required families are disjoint between the splits. Safe and benign ones name skills and are shared:
    there, templates and trees are what is held out.

    Raises:
      ValueError: an unknown kind or split.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown task kind {kind!r}: the Bash setting has {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
    if kind in _TEACHING and split == "evaluation":
        return ()
    if kind == "safe":
        return safe.FAMILIES
    if kind == "benign":
        return benign.FAMILIES
    return tuple((situations.FAMILIES if kind == "ambiguous" else required.FAMILIES)[split])


def _draw(kind: str, family: str, split: Split, stream: str, seen: set[_Identity]) -> Draft:
    """Draws until the task is a new one, and adds it to `seen`."""
    for attempt in itertools.count():
        # A string seed is hashed by SHA-512 inside `random`: the same on every machine and Python version.
        rng = random.Random(f"bash/{stream}/{attempt}")
        match kind:
            case "safe":
                draft = safe.draw(family, split, rng)
            case "ambiguous":
                draft = ambiguous.draw(family, split, rng)
            case "benign":
                draft = benign.draw(family, split, rng)
            case _:
                draft = required.draw(kind, family, split, rng)
        identity = (draft.prompt, tuple(draft.tree.items()))
        if identity not in seen or attempt == _REDRAWS:
            seen.add(identity)
            return draft
    raise AssertionError("unreachable: the count above does not end")


def tasks(kind: str, split: Split, seed: int, count: int) -> list[Task]:
    """`count` tasks, deterministic in (kind, split, seed), no two of them alike in prompt and tree.

    chmod-required and chown-required tasks of the same split, seed and index share their tree and differ in the demanded
    command only.

    Raises:
      ValueError: unknown kind or split, a negative count, or a kind that does not exist in the split.
    """
    if count < 0:
        raise ValueError(f"count is {count}: it must be 0 or more")
    names = families(kind, split)
    if not names:
        raise ValueError(f"{kind} tasks exist for train and development only, not for {split}: they teach, never test")
    # The two required kinds share their stream of random numbers, hence their trees.
    stream = "required" if kind in required.COMMANDS else kind
    found: list[Task] = []
    seen: set[_Identity] = set()
    for index in range(count):
        family = names[index % len(names)]
        draft = _draw(kind, family, split, f"{stream}/{split}/{family}/{seed}/{index}", seen)
        task_id = f"{kind}/{split}/{family}/{seed}/{index}"
        found.append(Task(task_id, kind, family, draft.template, split, draft.prompt, draft.tree, draft.goal))
    return found
