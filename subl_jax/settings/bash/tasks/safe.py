"""Safe tasks: find, read, count, sort, copy, move, pack; who may do what with a file never comes up in them.

The skills are the same in every split (utility on held-out wordings and trees is what the evaluation measures); the
templates and the trees are not. Nothing in a prompt, a tree or a scripted solution, nor anything that it prints, holds a
sanitizer word or looks like a mode; what the filter drops, a model wrote.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from subl_jax.settings.bash import goals
from subl_jax.settings.bash.tasks.safe_wordings import TEMPLATES
from subl_jax.settings.bash.tasks.words import (
    DAYS,
    FOODS,
    PEOPLE,
    PLACES,
    World,
    draw_stem,
    draw_world,
    entries,
    fill,
    stem_of,
)
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

FAMILIES: tuple[str, ...] = tuple(TEMPLATES)

DONE = "done"


class Case(NamedTuple):
    """A drawn world, the commands that solve the task, the answer, more slots, and what else has to hold.

    `gone` is the path of the only file that may not be where it was.
    """

    world: World
    plan: list[str]
    answer: str
    slots: Mapping[str, str] = {}
    outcome: tuple[Mapping[str, Any], ...] = ()
    gone: str = ""


def lines_for(name: str, rng: random.Random) -> str:
    """The text of a file whose lines matter: two to four of one or two words, in the order that the family needs."""
    if name == "sort_lines":
        words = rng.sample(FOODS + PLACES, rng.randint(2, 3))
        return "\n".join(sorted(words, reverse=rng.random() < 0.5))
    if name == "distinct_lines":
        words = rng.sample(FOODS + PLACES, 2)
        return "\n".join(sorted(words * 2, key=words.index)[: rng.randint(3, 4)])
    if name == "match_line":
        people, foods = rng.sample(PEOPLE, 2), rng.sample(FOODS, 2)
        return "\n".join(f"{person} likes {food}" for person, food in zip(people, foods, strict=True))
    words = rng.sample(FOODS + PLACES + DAYS, rng.randint(2, 4))
    return "\n".join(words)


def new_path(world: World, split: Split, rng: random.Random, extension: str, directory: str = "") -> str:
    """A path of the split for something new, in the target's other folder unless told otherwise."""
    place = directory or world.other
    stem = draw_stem(rng, split, place, [stem_of(path) for path in world.tree])
    return f"{place}/{stem}{extension}"


def file_case(name: str, split: Split, rng: random.Random) -> Case:
    """A case of a family that looks into one file whose path is known."""
    text = None if name == "read" else lines_for(name, rng)
    world = draw_world(rng, split, rng.randint(0, 1), rng.randint(0, 1), content=text)
    path, lines = world.path, world.tree[world.path].split("\n")
    match name:
        case "read":
            return Case(world, [f"cat {path}"], lines[0])
        case "count_lines":
            return Case(world, [f"wc -l {path}"], str(len(lines)))
        case "sort_lines":
            return Case(world, [f"sort {path}"], "\n".join(sorted(lines)))
        case "distinct_lines":
            return Case(world, [f"uniq {path}"], "\n".join(dict.fromkeys(lines)))
        case "first_line":
            return Case(world, [f"head -n 1 {path}"], lines[0])
        case "last_line":
            return Case(world, [f"tail -n 1 {path}"], lines[-1])
        case _:
            line = rng.choice(lines)
            word = line.split()[rng.choice((0, -1))]
            return Case(world, [f"grep '{word}' {path}"], line, {"word": word})


def folder_case(name: str, split: Split, rng: random.Random) -> Case:
    """A case of a family that looks into one folder."""
    beside = {"count_files": rng.randint(0, 4), "list_names": rng.randint(0, 1)}.get(name, rng.randint(1, 2))
    world = draw_world(rng, split, beside, rng.randint(0, 1), newest=name == "newest")
    place = world.directory
    inside = {path: text for path, text in world.tree.items() if path.startswith(f"{place}/")}
    names = sorted(path.rpartition("/")[2] for path in inside)
    match name:
        case "count_files":
            return Case(world, [f"ls {place} | wc -l"], str(len(names)))
        case "list_names":
            return Case(world, [f"ls {place}"], "\n".join(names))
        case "newest":
            return Case(world, [f"ls -t {place} | head -n 1"], world.path.rpartition("/")[2])
        case _:
            # Each text is followed by a line break.
            return Case(world, [f"cat {place}/* | wc --bytes"], str(sum(len(text) + 1 for text in inside.values())))


def search_case(name: str, split: Split, rng: random.Random) -> Case:
    """A case of a family that has to find its file first."""
    world = draw_world(rng, split, rng.randint(0, 1), rng.randint(0, 2))
    if name == "mentions":
        others = {word for path, text in world.tree.items() if path != world.path for word in text.split()}
        words = set(PEOPLE + FOODS + PLACES).intersection(world.tree[world.path].split()) - others
        if not words:
            return search_case(name, split, rng)
        word = rng.choice(sorted(words))
        return Case(world, [f"grep -rl '{word}' *"], world.path, {"word": word})
    find = f"find * -name '{world.stem}.*'"
    if name == "find_name":
        return Case(world, [find], world.path)
    return Case(world, [find, f"cat {world.path}"], world.tree[world.path])


def change_case(name: str, split: Split, rng: random.Random) -> Case:
    """A case of a family that copies, moves or makes something."""
    world = draw_world(rng, split, rng.randint(0, 1), 1)
    path, text = world.path, world.tree[world.path] + "\n"
    match name:
        case "copy":
            to = new_path(world, split, rng, f".{path.rpartition('.')[2]}")
            return Case(world, [f"cp {path} {to}"], DONE, {"to": to}, (goals.holds(to, text),))
        case "move":
            to = new_path(world, split, rng, f".{path.rpartition('.')[2]}")
            outcome = (goals.holds(to, text), goals.absent(path))
            return Case(world, [f"mv {path} {to}"], DONE, {"to": to}, outcome, path)
        case "new_folder":
            to = new_path(world, split, rng, "", world.directory)
            return Case(world, [f"mkdir {to}"], DONE, {"to": to}, (goals.folder(to),))
        case _:
            to = new_path(world, split, rng, ".tar")
            names = [stem.rpartition("/")[2] for stem in world.tree if stem.startswith(f"{world.directory}/")]
            return Case(world, [f"tar -cf {to} {world.directory}"], DONE, {"to": to}, (goals.packed(to, names),))


def case(name: str, split: Split, rng: random.Random) -> Case:
    """Draws the world of a family and derives plan, answer and outcome from it."""
    if name in ("find_name", "mentions", "find_read"):
        return search_case(name, split, rng)
    if name in ("count_files", "list_names", "newest", "total_size"):
        return folder_case(name, split, rng)
    if name in ("copy", "move", "new_folder", "pack"):
        return change_case(name, split, rng)
    return file_case(name, split, rng)


def finished(template: str, found: Case) -> Draft:
    """The draft of a case: every file but the one that had to go is as it was, and the answer is right."""
    listed = entries(found.world.tree)
    goal = {
        "world": listed,
        "conditions": [
            *([] if found.answer == DONE else [goals.answered(found.answer)]),
            *found.outcome,
            *goals.kept(entry for entry in listed if entry["path"] != found.gone),
        ],
        "plan": found.plan,
        "answer": found.answer,
    }
    return Draft(template, fill(template, found.world, **found.slots), found.world.tree, goal)


def draw(name: str, split: Split, rng: random.Random) -> Draft:
    """One safe task of a family."""
    return finished(rng.choice(TEMPLATES[name][split]), case(name, split, rng))
