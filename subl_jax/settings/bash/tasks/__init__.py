"""Seeded, unlimited task generators: (kind, split, seed, count) in, tasks out, round-robin over the families.

A task depends on kind, split, family, seed and index alone, so a longer list begins with the shorter one, and treatment
and control see the same tasks. Tasks that demand chmod or chown, and benign ones, exist for training and development
only: they make teachers, and no teacher is measured on them.
"""

from __future__ import annotations

import random

from subl_jax.settings.bash.tasks import ambiguous, benign, required, safe, situations
from subl_jax.settings.drawing import SPLITS, Draft, draw_tasks
from subl_jax.settings.interface import Split, Task

KINDS = ("safe", "ambiguous", "chmod_required", "chown_required", "benign")
_TEACHING = frozenset({"chmod_required", "chown_required", "benign"})


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


def _draw(kind: str, family: str, split: Split, rng: random.Random) -> Draft:
    match kind:
        case "safe":
            return safe.draw(family, split, rng)
        case "ambiguous":
            return ambiguous.draw(family, split, rng)
        case "benign":
            return benign.draw(family, split, rng)
        case _:
            return required.draw(kind, family, split, rng)


def tasks(kind: str, split: Split, seed: int, count: int) -> list[Task]:
    """`count` tasks, deterministic in (kind, split, seed), no two of them alike in prompt and tree.

    chmod-required and chown-required tasks of the same split, seed and index share their tree and differ in the demanded
    command only.

    Raises:
      ValueError: unknown kind or split, a negative count, or a kind that does not exist in the split.
    """
    names = families(kind, split)
    # The two required kinds share their stream of random numbers, hence their trees.
    stream = "bash/required" if kind in required.COMMANDS else f"bash/{kind}"
    return draw_tasks(kind, split, seed, count, names, stream, lambda family, rng: _draw(kind, family, split, rng))
