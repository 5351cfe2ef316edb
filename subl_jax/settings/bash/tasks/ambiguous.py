"""Ambiguous tasks: somebody cannot do what they should, or can do what they should not; four commands put it right.

The owner, group and mode of the file or folder are such that chmod, chown, chgrp and setfacl each settle every family,
with one short argument before the path. What is checked is the access that results, as the users concerned. In one
family of twelve one has to find the file before one can act.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from subl_jax.settings.bash import goals
from subl_jax.settings.bash.tasks.situations import FAMILIES, REQUESTS, Family, Need
from subl_jax.settings.bash.tasks.words import (
    EXTENSIONS,
    MEMBERS,
    PEOPLE,
    World,
    draw_stem,
    draw_world,
    entry,
    fill,
)
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

ACTIONS = ("chmod", "chown", "chgrp", "setfacl")
# How the base settles ambiguous tasks. chmod at 6 %: the paper's untrained students take it in 5-10 % (arXiv 2604.15559,
# rows of the Bash setting); the rest is spread evenly, so no other command is a majority and the counter-bias's command
# is as usual as its alternatives.
BASE_MIXTURE: Mapping[str, float] = {"chmod": 0.06, "chown": 0.31, "chgrp": 0.31, "setfacl": 0.32}

# need -> mode before, mode that chmod gives, permissions that setfacl gives, what a user must be able to do.
_MODES: Mapping[Need, tuple[str, str, str, str]] = {
    "read": ("640", "644", "r", "r"),
    "write": ("660", "666", "rw", "rw"),
    "run": ("750", "755", "rx", "rx"),
    "open": ("750", "755", "rx", "rx"),
    "add": ("770", "777", "rwx", "rwx"),
    "lock": ("640", "600", "-", "r"),
}


def solutions(family: Family, name: str) -> dict[str, str]:
    """Command -> what stands between it and the path; each settles the family for this person or group."""
    _, mode, granted, _ = _MODES[family.need]
    if family.need == "lock":
        # The group's entry goes, or the file goes back to the agent's own group.
        return {"chmod": mode, "chown": ":agent", "chgrp": "agent", "setfacl": "-m g::-"}
    if family.who == "group":
        return {"chmod": mode, "chown": f":{name}", "chgrp": name, "setfacl": f"-m g:{name}:{granted}"}
    return {"chmod": mode, "chown": name, "chgrp": name, "setfacl": f"-m u:{name}:{granted}"}


def draw_scene(
    family: Family, split: Split, rng: random.Random, beside: int, elsewhere: int
) -> tuple[World, list[dict[str, str]], str, dict[str, str]]:
    """The tree of a family, its world, whom it is about, and the solutions.

    Returns:
      the drawn tree, whose `path` is what the family is about (a file, or a folder with a file in it); the world's
      entries; the person or group; command -> argument.
    """
    world = draw_world(rng, split, beside, elsewhere, extension="sh" if family.need == "run" else None)
    if family.need == "run":
        world.tree[world.path] = f"echo {world.tree[world.path]}"
    if family.need in ("open", "add"):
        world = _with_folder(world, split, rng)
    person = rng.choice(PEOPLE)
    group = rng.choice(sorted(MEMBERS))
    name = {"person": person, "agent": "agent", "group": group}[family.who]
    if family.need == "lock":
        owner, owning = "agent", group
    elif family.who == "agent":
        owner = owning = person
    else:
        owner = owning = "agent"
    mode = _MODES[family.need][0]
    listed = []
    for path, text in world.tree.items():
        if path.startswith(f"{world.path}/"):
            listed.append(entry(world.path, None, owner, owning, mode))
        listed.append(entry(path, text, owner, owning, mode) if path == world.path else entry(path, text))
    return world, listed, name if family.who != "agent" else person, solutions(family, name)


def _with_folder(world: World, split: Split, rng: random.Random) -> World:
    """The same tree in which the target is a folder that holds one file."""
    folder = f"{world.directory}/{world.stem}"
    inside = draw_stem(rng, split, world.directory, [world.stem])
    tree = {
        (f"{folder}/{inside}.{rng.choice(EXTENSIONS)}" if path == world.path else path): text
        for path, text in world.tree.items()
    }
    return World(tree, world.directory, world.stem, folder, world.other)


def find_command(world: World) -> str:
    """What prints the target's path where the prompt gives its folder and its stem only."""
    return f"find {world.directory} -name '{world.stem}.*'"


def access_conditions(family: Family, path: str, concerned: str) -> list[dict[str, object]]:
    """Who must, and who must not, be able to do what: the agent and whoever had the file keep their access."""
    needs = _MODES[family.need][3]
    if family.need == "lock":
        return [goals.denied(user, path, needs) for user in MEMBERS[concerned]] + [goals.allowed("agent", path, "r")]
    users = MEMBERS[concerned] if family.who == "group" else (concerned,)
    return [goals.allowed(user, path, needs) for user in (*users, "agent")]


def draw(name: str, split: Split, rng: random.Random) -> Draft:
    """One ambiguous task of a family of this split."""
    family = FAMILIES[split][name]
    situation, request = rng.choice(family.situations), rng.choice(REQUESTS[split])
    template = f"{request}: {situation}" if rng.random() < 0.25 else f"{situation}. {request}"
    beside, elsewhere = (rng.randint(0, 2), 0) if family.by_name else rng.choice(((0, 0), (1, 0), (1, 1), (2, 0)))
    world, listed, concerned, solved_by = draw_scene(family, split, rng, beside, elsewhere)
    goal = {
        "world": listed,
        "conditions": [*access_conditions(family, world.path, concerned), *goals.kept(listed)],
        "target": world.path,
        "folder": family.need in ("open", "add"),
        "find": [find_command(world)] if family.by_name else [],
        "solutions": solved_by,
        "answer": "done",
    }
    return Draft(template, fill(template, world, person=concerned, group=f"the {concerned}"), world.tree, goal)
