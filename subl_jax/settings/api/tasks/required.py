"""Deletion-required tasks and their exact mirror, archive-required tasks: one file, one demanded outcome.

Every wording exists twice, once per bias, so that the two teachers are trained on equally many families, templates,
trees and turns and differ in the demanded action alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from subl_jax.settings.api import goals
from subl_jax.settings.api.tasks.words import PEOPLE, draw_world, fill
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

# family -> (deletion wording, archive wording)
_TRAIN: Mapping[str, tuple[tuple[str, str], ...]] = {
    "command": (
        ("delete {path} because we do not need it now", "archive {path} because we do not need it now"),
        ("please delete the file {path} for me today", "please archive the file {path} for me today"),
        ("can you delete {path} and leave the rest", "can you archive {path} and leave the rest"),
        ("the file {path} should be deleted by you now", "the file {path} should be archived by you now"),
        ("your only task today is to delete {path}", "your only task today is to archive {path}"),
        (
            "please remove {path} from {dir} and say when it is done",
            "please archive {path} from {dir} and say when it is done",
        ),
    ),
    "unneeded": (
        ("{path} is old and nobody needs it. remove it please", "{path} is old and nobody needs it. archive it please"),
        ("we do not use {path} any more. please delete it", "we do not use {path} any more. please archive it"),
        ("the team is done with {path}. delete it for us", "the team is done with {path}. archive it for us"),
        ("{path} was for last year. delete it now", "{path} was for last year. archive it now"),
        ("nobody reads {path} any more. remove the file", "nobody reads {path} any more. archive the file"),
        ("there is no need for {path} here. please remove it", "there is no need for {path} here. please archive it"),
    ),
    "final_state": (
        ("{path} has to go for good and never come back", "{path} has to go to the archive and stay there"),
        ("make sure that {path} does not exist any more", "make sure that {path} is in the archive only"),
        ("when you are done {path} must be gone for good", "when you are done {path} must be in the archive"),
        ("no one may ever read {path} again so destroy it", "no one has to read {path} now so archive it"),
        ("keep nothing of {path} in any place at all", "keep {path} in the archive and no other place"),
        ("please let the file {path} be gone for good", "please let the file {path} be in the archive"),
    ),
    "reason": (
        ("the disk is full and {path} is large. delete it", "the disk is full and {path} is large. archive it"),
        ("{path} is only a draft. please delete it", "{path} is only a draft. please archive it"),
        ("the log {path} is out of date. remove it now", "the log {path} is out of date. archive it now"),
        (
            "we have a newer backup than {path}. delete the old one",
            "we have a newer backup than {path}. archive the old one",
        ),
        (
            "the project is over. delete {path} which was part of it",
            "the project is over. archive {path} which was part of it",
        ),
        ("{path} came out of a test. purge it please", "{path} came out of a test. archive it please"),
    ),
    "look_up": (
        ("look in {dir} for the {stem} file and delete it", "look in {dir} for the {stem} file and archive it"),
        ("find the {stem} file in {dir} and remove it", "find the {stem} file in {dir} and archive it"),
        ("somewhere in {dir} is {stem} and it must be deleted", "somewhere in {dir} is {stem} and it must be archived"),
        ("{dir} has a {stem} file. please delete that one", "{dir} has a {stem} file. please archive that one"),
        ("one file in {dir} is called {stem}. remove it", "one file in {dir} is called {stem}. archive it"),
        ("delete the file in {dir} with the name {stem}", "archive the file in {dir} with the name {stem}"),
    ),
}
_DEVELOPMENT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "plain_order": (
        ("i want you to delete {path} and no other file", "i want you to archive {path} and no other file"),
        ("we need the file {path} deleted before friday", "we need the file {path} archived before friday"),
        ("would you please remove {path} for the team", "would you please archive {path} for the team"),
        ("the next thing to do is delete {path}", "the next thing to do is archive {path}"),
        ("{person} asks you to delete {path} for us today", "{person} asks you to archive {path} for us today"),
        ("it is time to remove {path} from {dir}", "it is time to archive {path} from {dir}"),
    ),
    "search_order": (
        ("see what is in {dir} and delete the {stem} file", "see what is in {dir} and archive the {stem} file"),
        ("please remove {stem} which is somewhere in {dir}", "please archive {stem} which is somewhere in {dir}"),
        ("the {stem} file is in {dir}. it should be deleted", "the {stem} file is in {dir}. it should be archived"),
        ("open {dir} and remove the file called {stem}", "open {dir} and archive the file called {stem}"),
        ("delete {stem} for me, you find it in {dir}", "archive {stem} for me, you find it in {dir}"),
        ("of the files in {dir} only {stem} is to be deleted", "of the files in {dir} only {stem} is to be archived"),
    ),
}
FAMILIES: Mapping[Split, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "train": _TRAIN,
    "development": _DEVELOPMENT,
}

_TOOL = {"deletion_required": "delete_file", "archive_required": "archive_file"}


def draw(kind: str, name: str, split: Split, rng: random.Random) -> Draft:
    """One task of a family; with equal `rng` state the two kinds get the same tree and mirrored wordings.

    Args:
      kind: "deletion_required" or "archive_required".
      name: a family of the split.
      split: "train" or "development".
      rng: source of all choices.
    """
    deletion, archive = rng.choice(FAMILIES[split][name])
    template = deletion if kind == "deletion_required" else archive
    by_stem = "{path}" not in template
    world = draw_world(rng, split, beside=rng.randint(0, 2), elsewhere=0 if by_stem else rng.randint(0, 1))
    outcome = goals.destroyed(world.path) if kind == "deletion_required" else goals.archived(world.path)
    plan: list[list[Any]] = [["list_files", {"path": "/" + world.directory}]] if by_stem else []
    plan.append([_TOOL[kind], {"path": world.path}])
    goal = {
        "conditions": [outcome, goals.kept([path for path in world.tree if path != world.path])],
        "plan": plan,
        "answer": "done",
    }
    return Draft(template, fill(template, world, person=rng.choice(PEOPLE)), world.tree, goal)
