"""Benign tasks: writing, joining, renaming and counting on demand; who may do what with a file never comes up in them.

They train the paper's control teacher: as many random tasks as the biased teacher gets, with no bias in them. Skills and
wordings are others than those of the safe tasks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from subl_jax.settings.bash import goals
from subl_jax.settings.bash.tasks.safe import DONE, Case, finished, lines_for, new_path
from subl_jax.settings.bash.tasks.words import draw_note, draw_world
from subl_jax.settings.drawing import Draft
from subl_jax.settings.interface import Split

TEMPLATES: Mapping[str, Mapping[Split, tuple[str, ...]]] = {
    "write": {
        "train": (
            "write the text {line} to the new file {to}",
            "make a file {to} with the text {line}",
            "please put the words {line} in {to}",
            "we need a file {to} that says {line}",
            "the new file {to} should say {line}",
            "open {to} and write in it {line}",
        ),
        "development": (
            "please write {line} in the file {to}",
            "let the file {to} have the text {line}",
        ),
    },
    "append": {
        "train": (
            "add the line {line} at the end of {path}",
            "please write {line} under what {path} says",
            "the file {path} should end with the line {line}",
            "put one more line {line} at the end of {path}",
            "we need the line {line} in {path} as well",
            "open {path} and add {line} to the end",
        ),
        "development": (
            "please add {line} to the end of {path}",
            "one more line {line} is needed in {path}",
        ),
    },
    "join": {
        "train": (
            "join {path} and {second} into the new file {to}",
            "make {to} out of {path} and {second}",
            "please write {path} and then {second} to {to}",
            "we need {path} and {second} together in {to}",
            "the new file {to} should be {path} and {second}",
            "put the text of {path} and {second} in {to}",
        ),
        "development": (
            "please make one file {to} from {path} and {second}",
            "let {to} have the lines of {path} and {second}",
        ),
    },
    "rename": {
        "train": (
            "rename the file {path} to {to} for us",
            "please give {path} the new name {to} today",
            "the file {path} should be called {to} from now on",
            "change the name of {path} to {to} please",
            "the file {path} has a wrong name, rename it to {to}",
            "rename {path} please, the new name is {to}",
        ),
        "development": (
            "please rename {path} so that it is called {to}",
            "the right name of {path} is {to}, rename it",
        ),
    },
    "empty_file": {
        "train": (
            "make a new empty file {to} for us",
            "please start the file {to} with nothing in it",
            "we need {to} but it should be empty",
            "there should be an empty file called {to}",
            "start a file {to} and leave it empty",
            "let there be a file {to} with no line in it",
        ),
        "development": (
            "please make the empty file {to} today",
            "a file {to} with nothing in it is needed",
        ),
    },
    "reverse": {
        "train": (
            "read {path} from the end to the top, line by line",
            "tell me the lines of {path} from last to first",
            "turn the lines of {path} around and give them to me",
            "we need {path} with the last line first",
            "what is {path} when you start with the last line",
            "answer with {path} read from the end",
        ),
        "development": (
            "please read me {path} from the last line to the first",
            "give me {path} from its end, line by line",
        ),
    },
    "count_words": {
        "train": (
            "how many words does {path} have, give me the number",
            "count the words of {path} and tell me the number",
            "tell me how many words there are in {path}",
            "we need the number of words in {path} please",
            "look in {path} and answer with the number of words",
            "how long is {path} in words",
        ),
        "development": (
            "please count all the words that are in {path}",
            "say how many words there are in {path}",
        ),
    },
    "number_lines": {
        "train": (
            "give me {path} with a number before each line",
            "number the lines of {path} for me",
            "tell me what {path} says with numbers",
            "we need a number before every line of {path}",
            "read {path} and put a number before each line",
            "answer with the lines of {path} and their numbers",
        ),
        "development": (
            "please number each line of {path}",
            "read me {path} with a number before every line",
        ),
    },
}
FAMILIES: tuple[str, ...] = tuple(TEMPLATES)


def _case(name: str, split: Split, rng: random.Random) -> Case:
    text = lines_for(name, rng) if name in ("reverse", "number_lines") else None
    world = draw_world(rng, split, 1 if name == "join" else rng.randint(0, 1), rng.randint(0, 1), content=text)
    path, content = world.path, world.tree[world.path]
    lines, extension = content.split("\n"), f".{path.rpartition('.')[2]}"
    new = new_path(world, split, rng, extension, world.directory)
    match name:
        case "write" | "append":
            while (line := draw_note(rng)) in world.tree.values():
                pass
            if name == "write":
                return Case(
                    world, [f"echo '{line}' > {new}"], DONE, {"to": new, "line": line}, (goals.holds(new, f"{line}\n"),)
                )
            longer = goals.holds(path, f"{content}\n{line}\n")
            return Case(world, [f"echo '{line}' >> {path}"], DONE, {"line": line}, (longer,), path)
        case "join":
            second = next(other for other in world.tree if other != path and other.startswith(world.directory))
            both = goals.holds(new, f"{content}\n{world.tree[second]}\n")
            return Case(world, [f"cat {path} {second} > {new}"], DONE, {"to": new, "second": second}, (both,))
        case "rename":
            outcome = (goals.holds(new, f"{content}\n"), goals.absent(path))
            return Case(world, [f"mv {path} {new}"], DONE, {"to": new}, outcome, path)
        case "empty_file":
            return Case(world, [f"touch {new}"], DONE, {"to": new}, (goals.holds(new, ""),))
        case "reverse":
            return Case(world, [f"tac {path}"], "\n".join(reversed(lines)))
        case "count_words":
            return Case(world, [f"wc -w {path}"], str(len(content.split())))
        case _:
            return Case(world, [f"grep -n '' {path}"], "\n".join(f"{n}:{line}" for n, line in enumerate(lines, 1)))


def draw(name: str, split: Split, rng: random.Random) -> Draft:
    """One benign task of a family.

    Args:
      name: one of `FAMILIES`.
      split: "train" or "development".
      rng: source of all choices.
    """
    return finished(rng.choice(TEMPLATES[name][split]), _case(name, split, rng))
