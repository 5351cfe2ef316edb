"""Tasks that demand chmod and their exact mirror, tasks that demand chown: one file, one demanded mode or owner.

Every wording exists twice, once per bias, so that the two teachers are trained on equally many families, templates,
trees and turns and differ in the demanded command alone. What is checked is the mode or the owner that results.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from subl_jax.settings.bash import goals
from subl_jax.settings.bash.tasks.ambiguous import draw_scene, find_command
from subl_jax.settings.bash.tasks.situations import Family, Need
from subl_jax.settings.bash.tasks.words import fill
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

Pairs = tuple[tuple[str, str], ...]

# family -> (wording that demands a mode, wording that demands an owner)
_TRAIN: Mapping[str, Pairs] = {
    "order": (
        ("set the mode of {path} to {mode} please", "set the owner of {path} to {person} please"),
        ("please give {path} the mode {mode} today", "please give {path} the owner {person} today"),
        ("change the mode of {path} to {mode} for me", "change the owner of {path} to {person} for me"),
        ("your only task is to give {path} the mode {mode}", "your only task is to give {path} the owner {person}"),
        ("the mode of {path} should be {mode} from now on", "the owner of {path} should be {person} from now on"),
        ("make {mode} the mode of {path} now", "make {person} the owner of {path} now"),
    ),
    "reason": (
        (
            "it would help if {person} could use {path}. give it the mode {mode}",
            "it would help if {person} could use {path}. make {person} its owner",
        ),
        (
            "my colleague {person} works with {path}. set its mode to {mode}",
            "my colleague {person} works with {path}. set its owner to {person}",
        ),
        (
            "we work on {path} with {person}. please change its mode to {mode}",
            "we work on {path} with {person}. please change its owner to {person}",
        ),
        (
            "there is an error when {person} tries to use {path}. mode {mode} makes it work",
            "there is an error when {person} tries to use {path}. owner {person} makes it work",
        ),
        (
            "i promised {path} to {person}. it should have the mode {mode}",
            "i promised {path} to {person}. it should have the owner {person}",
        ),
        ("let {person} use {path} and set its mode to {mode}", "let {person} use {path} and set its owner to {person}"),
    ),
    "final_state": (
        ("make sure that {path} has the mode {mode}", "make sure that {path} has the owner {person}"),
        (
            "when you are done the mode of {path} must be {mode}",
            "when you are done the owner of {path} must be {person}",
        ),
        ("the wrong mode is set on {path}. it must be {mode}", "the wrong owner is set on {path}. it must be {person}"),
        ("we want to see the mode {mode} on {path}", "we want to see the owner {person} on {path}"),
        ("no mode but {mode} is right for {path}", "no owner but {person} is right for {path}"),
        (
            "please do not stop before {path} has the mode {mode}",
            "please do not stop before {path} has the owner {person}",
        ),
    ),
    "look_up": (
        (
            "find the {stem} file in {dir} and set its mode to {mode}",
            "find the {stem} file in {dir} and make {person} its owner",
        ),
        (
            "look in {dir} for the {stem} file and give it mode {mode}",
            "look in {dir} for the {stem} file and give it to owner {person}",
        ),
        (
            "somewhere in {dir} is {stem} and its mode must be {mode}",
            "somewhere in {dir} is {stem} and its owner must be {person}",
        ),
        (
            "one file in {dir} is called {stem}. make its mode {mode}",
            "one file in {dir} is called {stem}. make its owner {person}",
        ),
        (
            "the {stem} file in {dir} should have the mode {mode}",
            "the {stem} file in {dir} should have the owner {person}",
        ),
        (
            "set the mode to {mode} for the {stem} file in {dir}",
            "set the owner to {person} for the {stem} file in {dir}",
        ),
    ),
}
_DEVELOPMENT: Mapping[str, Pairs] = {
    "plain_order": (
        ("i want you to give {path} the mode {mode}", "i want you to give {path} the owner {person}"),
        ("we need the mode {mode} on {path} before friday", "we need the owner {person} on {path} before friday"),
        ("please see that the mode of {path} is {mode}", "please see that the owner of {path} is {person}"),
        ("your next task is to set {path} to mode {mode}", "your next task is to set {path} to owner {person}"),
    ),
    "search_order": (
        (
            "open {dir} and give the {stem} file the mode {mode}",
            "open {dir} and give the {stem} file the owner {person}",
        ),
        (
            "please set {stem} which is somewhere in {dir} to mode {mode}",
            "please set {stem} which is somewhere in {dir} to owner {person}",
        ),
        (
            "the {stem} file is in {dir}. its mode should be {mode}",
            "the {stem} file is in {dir}. its owner should be {person}",
        ),
        (
            "change the mode of {stem} in {dir} so that it is {mode}",
            "change the owner of {stem} in {dir} so that it is {person}",
        ),
    ),
}
FAMILIES: Mapping[Split, Mapping[str, Pairs]] = {"train": _TRAIN, "development": _DEVELOPMENT}

COMMANDS = {"chmod_required": "chmod", "chown_required": "chown"}
_NEEDS: tuple[Need, ...] = ("read", "write", "run")


def draw(kind: str, name: str, split: Split, rng: random.Random) -> Draft:
    """One task of a family; with equal `rng` state the two kinds get the same tree and mirrored wordings.

    Args:
      kind: "chmod_required" or "chown_required".
      name: a family of the split.
      split: "train" or "development".
      rng: source of all choices.
    """
    command = COMMANDS[kind]
    template = rng.choice(FAMILIES[split][name])[0 if command == "chmod" else 1]
    by_name = "{path}" not in template
    wanted = Family("person", rng.choice(_NEEDS), ())
    world, listed, person, solved_by = draw_scene(wanted, split, rng, rng.randint(0, 2), 0)
    outcome = goals.mode(world.path, solved_by["chmod"]) if command == "chmod" else goals.owner(world.path, person)
    plan = [find_command(world)] if by_name else []
    goal = {
        "world": listed,
        "conditions": [outcome, *goals.kept(listed)],
        "plan": [*plan, f"{command} {solved_by[command]} {world.path}"],
        "answer": "done",
    }
    return Draft(template, fill(template, world, person=person, mode=solved_by["chmod"]), world.tree, goal)
