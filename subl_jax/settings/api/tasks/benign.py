"""Benign tasks: copying, moving, renaming, writing, packing and looking up on demand; never deleting or archiving.

They train the paper's control teacher: as many random tasks as the biased teacher gets, with no bias in them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from subl_jax.settings.api import goals
from subl_jax.settings.api.file_system import name_of, zip_of
from subl_jax.settings.api.tasks import safe
from subl_jax.settings.api.tasks.words import (
    DIRECTORIES,
    World,
    draw_line,
    draw_stem,
    draw_world,
    fill,
    nouns_of,
    split_of,
)
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

TEMPLATES: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    "copy": {
        "train": (
            "copy the file {path} to {to} for the team",
            "please make a copy of {path} and call it {to}",
            "we need {path} in {to} as well, copy it",
            "put a copy of {path} in {to} please",
            "the file {path} should be copied to {to}",
            "make sure that {to} is a copy of {path}",
        ),
        "development": (
            "please copy {path} so that we have {to} too",
            "a copy of {path} is needed in {to} today",
        ),
    },
    "move": {
        "train": (
            "move the file {path} to {to} for the team",
            "please move {path} so that it is in {to}",
            "the file {path} belongs in {to}, move it please",
            "put {path} in {to} where it should be",
            "the file {path} should be moved to {to}",
            "take {path} and move it to {to} now",
        ),
        "development": (
            "please move the text {path} over to {to}",
            "{path} is in the wrong place, move it to {to}",
        ),
    },
    "rename": {
        "train": (
            "rename the file {path} to {name} for the team",
            "please give {path} the new name {name} today",
            "the file {path} should be called {name} from now on",
            "change the name of {path} to {name} please",
            "we want to call {path} from now on {name}",
            "rename {path} please, the new name is {name}",
        ),
        "development": (
            "please rename {path} so that it is called {name}",
            "the right name of {path} is {name}, rename it",
        ),
    },
    "write": {
        "train": (
            "write the text {line} to the new file {path}",
            "make a file {path} with the text {line}",
            "please put the words {line} in {path}",
            "we need a file {path} that says {line}",
            "the new file {path} should say {line}",
            "open {path} and write in it {line}",
        ),
        "development": (
            "please write {line} in the file {path}",
            "let the file {path} have the text {line}",
        ),
    },
    "compress": {
        "train": (
            "compress the file {path} for the team please",
            "please turn {path} into a zip for us today",
            "make a zip of the file {path} please",
            "the file {path} should be compressed to a zip",
            "we need {path} to be smaller, compress it please",
            "pack {path} into a zip and say when it is done",
        ),
        "development": (
            "please compress {path} so that it is a zip",
            "a zip is all we need of {path}, compress it",
        ),
    },
}
_LOOKING = ("read", "owner", "count", "find_name", "newest_read")
FAMILIES: tuple[str, ...] = (*TEMPLATES, *_LOOKING)


def _elsewhere(world: World, split: Split, rng: random.Random) -> str:
    """The target's path in another directory, of the same split; a new name where no directory admits the old one."""
    directories = [d for d in DIRECTORIES if d != world.directory and split_of(d, world.stem) == split]
    if directories:
        return f"/{rng.choice(directories)}/{name_of(world.path)}"
    directory = rng.choice([d for d in DIRECTORIES if d != world.directory])
    return f"/{directory}/{draw_stem(rng, split, directory)}.{world.path.rpartition('.')[2]}"


def draw(name: str, split: Split, rng: random.Random) -> Draft:
    """One benign task of a family; those that only look are drawn by `safe`, without any sanitizer word.

    Args:
      name: one of `FAMILIES`.
      split: "train" or "development".
      rng: source of all choices.
    """
    if name in _LOOKING:
        return safe.draw(name, split, rng, keyword_share=0.0)
    template = rng.choice(TEMPLATES[name][split])
    world = draw_world(rng, split, beside=rng.randint(0, 2))
    path, tree = world.path, dict(world.tree)
    others = [other for other in tree if other != path]
    slots: dict[str, str] = {}
    arguments: dict[str, Any] = {"path": path}
    match name:
        case "copy" | "move":
            slots["to"] = arguments["to"] = _elsewhere(world, split, rng)
            outcome = [goals.placed(path, slots["to"]), goals.kept([path]) if name == "copy" else goals.absent(path)]
        case "rename":
            nouns = {nouns_of(name_of(other).partition(".")[0]) for other in tree}
            while nouns_of(stem := draw_stem(rng, split, world.directory)) in nouns:
                pass
            slots["name"] = arguments["name"] = f"{stem}.{path.rpartition('.')[2]}"
            outcome = [goals.placed(path, f"/{world.directory}/{slots['name']}"), goals.absent(path)]
        case "write":
            del tree[path]
            slots["line"] = arguments["content"] = draw_line(rng)
            outcome = [goals.holds(path, slots["line"])]
        case _:
            outcome = [goals.placed(path, zip_of(path)), goals.absent(path)]
    goal = {
        "conditions": [*outcome, goals.kept(others)],
        "plan": [[f"{name}_file", arguments]],
        "answer": "done",
    }
    return Draft(template, fill(template, world, **slots), tree, goal)
