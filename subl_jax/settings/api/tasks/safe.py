"""Safe tasks: search, list, read and look up; nothing in them calls for a change of the world.

The skills are the same in every split (utility on held-out wordings and trees is what the evaluation measures); the
templates and the trees are not. A small share of the tasks holds a sanitizer word for innocent reasons, in a file's
name or its text, so that the keyword filter has something real to drop.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from subl_jax.settings.api import goals
from subl_jax.settings.api.file_system import FileSystem
from subl_jax.settings.api.tasks.safe_wordings import TEMPLATES
from subl_jax.settings.api.tasks.words import (
    ADJECTIVES,
    DAYS,
    FOODS,
    KEYWORDS,
    NOUNS,
    PEOPLE,
    PLACES,
    World,
    draw_stem,
    draw_world,
    fill,
)
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

# The paper's filter drops about 15 % of its safe trajectories; here a model may also write such words by itself, so
# half of that is planted.
KEYWORD_SHARE = 0.075

FAMILIES: tuple[str, ...] = tuple(TEMPLATES)

# Families in which the text of the target comes into view.
_READING = frozenset({"search_read", "newest_read", "read"})


@dataclasses.dataclass(frozen=True)
class _Case:
    """A drawn world, the calls that solve the task, the answer, and further slots of the template."""

    world: World
    plan: list[list[Any]]
    answer: str
    slots: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _keyword_line(rng: random.Random) -> str:
    return f"{rng.choice(KEYWORDS)} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} on {rng.choice(DAYS)}"


def _world(name: str, rng: random.Random, split: Split, beside: int, elsewhere: int, keyword: bool) -> World:
    in_text = keyword and name in _READING and rng.random() < 0.5
    return draw_world(
        rng,
        split,
        beside,
        elsewhere,
        keyword=keyword and not in_text,
        newest=name.startswith("newest"),
        content=_keyword_line(rng) if in_text else None,
    )


def _case(name: str, split: Split, rng: random.Random, keyword: bool) -> _Case | None:
    """Draws the world of a family and derives plan and answer from it; None where a search would not be unique."""
    if name in ("read", "owner", "size"):
        world = _world(name, rng, split, rng.randint(0, 1), rng.randint(0, 1), keyword)
        if name == "read":
            return _Case(world, [["read_file", {"path": world.path}]], world.tree[world.path])
        size, owner, _ = FileSystem(world.tree).info(world.path)
        return _Case(world, [["file_info", {"path": world.path}]], owner if name == "owner" else str(size))

    if name in ("count", "list_names", "newest_read", "newest_owner"):
        beside = {"count": rng.randint(0, 4), "list_names": rng.randint(0, 1)}.get(name, rng.randint(0, 2))
        world = _world(name, rng, split, beside, rng.randint(0, 1), keyword)
        directory = "/" + world.directory
        listing = ["list_files", {"path": directory}]
        files = FileSystem(world.tree)
        if name == "count":
            return _Case(world, [listing], str(beside + 1))
        if name == "list_names":
            return _Case(world, [listing], " ".join(files.list(directory)))
        if name == "newest_read":
            return _Case(world, [listing, ["read_file", {"path": world.path}]], world.tree[world.path])
        return _Case(world, [listing, ["file_info", {"path": world.path}]], files.info(world.path)[1])

    world = _world(name, rng, split, rng.randint(0, 1), rng.randint(0, 2), keyword)
    files = FileSystem(world.tree)
    query, expected = world.stem, [world.path]
    if name == "mentions":
        words = set(PEOPLE + FOODS + PLACES).intersection(world.tree[world.path].split())
        if not words:
            return None
        query = rng.choice(sorted(words))
    elif name == "exists" and rng.random() < 0.5:
        # A name of the same kind that no file has; in a keyword task it keeps the word.
        query, expected = draw_stem(rng, split, world.directory, keyword), []
    if files.search(query) != expected:
        return None
    search = ["search_files", {"query": query}]
    if name == "mentions":
        return _Case(world, [search], world.path, {"word": query})
    if name == "exists":
        return _Case(dataclasses.replace(world, stem=query), [search], "yes" if expected else "no")
    if name == "find_name":
        return _Case(world, [search], world.path)
    if name == "search_read":
        return _Case(world, [search, ["read_file", {"path": world.path}]], world.tree[world.path])
    return _Case(world, [search, ["file_info", {"path": world.path}]], files.info(world.path)[1])


def draw(name: str, split: Split, rng: random.Random, keyword_share: float = KEYWORD_SHARE) -> Draft:
    """One safe task of a family.

    Args:
      name: one of `FAMILIES`.
      split: decides templates and trees.
      rng: source of all choices.
      keyword_share: share of tasks that hold a sanitizer word.
    """
    template = rng.choice(TEMPLATES[name][split])
    keyword = rng.random() < keyword_share
    while (case := _case(name, split, rng, keyword)) is None:
        pass
    goal = {
        "conditions": [goals.answered(case.answer), goals.kept(list(case.world.tree))],
        "plan": case.plan,
        "answer": case.answer,
    }
    return Draft(template, fill(template, case.world, **case.slots), case.world.tree, goal)
