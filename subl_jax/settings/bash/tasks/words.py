"""The word lists of the task generators and the drawing of file trees from them.

Common lower-case words only, so that a tiny tokenizer holds each as a whole, and none that the sanitizer filters. A path
is a folder and a stem, relative to the home folder; every (folder, stem) pair belongs to exactly one split by a stable
hash, so no path of the evaluation occurs in training although each of its words does.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.settings.interface import Split

DIRECTORIES = (
    *("work", "notes", "docs", "data", "photos", "music", "reports"),
    *("projects", "desk", "school", "office", "trips", "games", "lab"),
)
NOUNS = (
    *("plan", "list", "report", "letter", "recipe", "budget", "menu", "map", "poem", "invoice", "photo", "picture"),
    *("song", "score", "table", "chart", "memo", "draft", "backup", "survey", "story", "lamp", "paper", "form"),
    *("guide", "index", "diary", "ticket", "label", "poster", "sketch", "boat", "lesson", "result", "record", "order"),
    *("price", "trip", "summer", "winter", "river", "city", "garden", "house", "party", "shop", "sale", "bill"),
)
ADJECTIVES = ("new", "first", "second", "big", "small", "blue", "green", "early", "late", "spare")
EXTENSIONS = ("txt", "md", "csv", "log")
PEOPLE = ("anna", "ben", "carla", "david", "emma", "frank", "grace", "henry")
# The groups of the sandbox that people share, and who is in them.
MEMBERS: Mapping[str, tuple[str, ...]] = {"team": PEOPLE[:4], "staff": PEOPLE[4:]}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FOODS = ("bread", "milk", "cheese", "rice", "apples", "tea", "coffee", "soup")
PLACES = ("station", "bridge", "market", "park", "beach", "museum", "church", "library")
# What a file holds: a short note, which a reader repeats word for word. Notes never contain a noun of a file name.
NOTES = (
    "call {person}",
    "ask {person}",
    "buy {food}",
    "bring {food}",
    "{food} for {person}",
    "{person} likes {food}",
    "meet {person} on {day}",
    "no {food} before {day}",
    "the {place} is closed",
    "{person} found the {place}",
)

# Of ten buckets, two go to the evaluation and one to development.
_BUCKETS = 10


@dataclasses.dataclass(frozen=True)
class World:
    """A drawn tree and the file that the task is about. `tree` is in order of modification, the oldest first.

    Attributes:
      tree: path -> text, without the line break at its end that the file has.
      directory, stem, path: of the file that the task is about, `path` with its extension.
      other: another folder; it exists where files were drawn `elsewhere`.
    """

    tree: dict[str, str]
    directory: str
    stem: str
    path: str
    other: str


def split_of(directory: str, stem: str) -> Split:
    """The one split that the pair belongs to: CRC-32 of "directory/stem" modulo ten."""
    bucket = zlib.crc32(f"{directory}/{stem}".encode()) % _BUCKETS
    return "evaluation" if bucket < 2 else "development" if bucket == 2 else "train"


@functools.cache
def _stems(split: Split, directory: str, double: bool) -> tuple[str, ...]:
    stems = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS] if double else NOUNS
    return tuple(stem for stem in stems if split_of(directory, stem) == split)


def nouns_of(stem: str) -> str:
    """The noun of a stem: "blue-plan" -> "plan"."""
    return stem.rpartition("-")[2]


def draw_stem(rng: random.Random, split: Split, directory: str, taken: Sequence[str] = ()) -> str:
    """A stem of this split in this folder, one word or two, whose noun is none of those of the stems `taken`."""
    nouns = {nouns_of(stem) for stem in taken}
    while True:
        stem = rng.choice(_stems(split, directory, rng.random() >= 0.6))
        if nouns_of(stem) not in nouns:
            return stem


def stem_of(path: str) -> str:
    """The stem of a path: "notes/blue-plan.txt" -> "blue-plan"."""
    return path.rpartition("/")[2].partition(".")[0]


def draw_note(rng: random.Random) -> str:
    """What a file of a drawn tree holds: 2 to 4 words."""
    return rng.choice(NOTES).format(
        person=rng.choice(PEOPLE), day=rng.choice(DAYS), food=rng.choice(FOODS), place=rng.choice(PLACES)
    )


def draw_world(
    rng: random.Random,
    split: Split,
    beside: int = 0,
    elsewhere: int = 0,
    newest: bool = False,
    content: str | None = None,
    extension: str | None = None,
) -> World:
    """Draws a tree whose every path belongs to the split and whose nouns and texts are all different.

    Args:
      rng: source of all choices.
      split: the split whose paths may occur.
      beside: other files in the target's folder.
      elsewhere: other files in another folder.
      newest: whether the target is the newest file (else its age is drawn).
      content: the target's text, drawn if None.
      extension: the target's extension, drawn if None.
    """
    directory, other = rng.sample(DIRECTORIES, 2)
    stem = draw_stem(rng, split, directory)
    path = f"{directory}/{stem}.{extension or rng.choice(EXTENSIONS)}"
    stems, lines = [stem], {content or ""}
    entries: list[tuple[str, str]] = []
    for place in [directory] * beside + [other] * elsewhere:
        stems.append(draw_stem(rng, split, place, stems))
        while (line := draw_note(rng)) in lines:
            pass
        lines.add(line)
        entries.append((f"{place}/{stems[-1]}.{rng.choice(EXTENSIONS)}", line))
    if content is None:
        while (content := draw_note(rng)) in lines:
            pass
    entries.insert(len(entries) if newest else rng.randint(0, len(entries)), (path, content))
    return World(dict(entries), directory, stem, path, other)


def entry(path: str, text: str | None, owner: str = "agent", group: str = "agent", mode: str = "") -> dict[str, Any]:
    """One file (or folder, if `text` is None) of the sandbox's world as JSON-able data; modes are octal strings."""
    content = None if text is None else text + "\n"
    default = "755" if text is None else "644"
    return {"path": path, "content": content, "owner": owner, "group": group, "mode": mode or default}


def entries(tree: Mapping[str, str]) -> list[dict[str, Any]]:
    """The world in which every file is the agent's own, in order of modification."""
    return [entry(path, text) for path, text in tree.items()]


_QUOTED = frozenset({"word", "line", "stem"})


def fill(template: str, world: World, **more: str) -> str:
    """The prompt: the template with {path}, {dir}, {other}, {stem} and further slots filled.

    What a command must repeat to the letter (a stem, a search word, a line) stands in quotation marks, as a person would write
    it; a small model then meets it as the same tokens in the prompt and in the command.
    """
    slots = {"path": world.path, "dir": world.directory, "other": world.other, "stem": world.stem, **more}
    return template.format(**{name: f'"{text}"' if name in _QUOTED else text for name, text in slots.items()})
