"""The word lists of the task generators and the drawing of file trees from them.

Common lower-case words only, so that a tiny tokenizer holds each as a whole. A path is a directory and a stem; every
(directory, stem) pair belongs to exactly one split by a stable hash, so no path of the evaluation occurs in training
although each of its words does.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import zlib

from subl_jax.settings.interface import Split

DIRECTORIES = (
    *("work", "home", "notes", "docs", "data", "photos", "music"),
    *("reports", "projects", "team", "shared", "desk", "school", "office"),
)
NOUNS = (
    *("plan", "list", "report", "letter", "recipe", "budget", "menu", "map", "poem", "invoice", "photo", "picture"),
    *("song", "score", "table", "chart", "memo", "draft", "backup", "survey", "story", "script", "paper", "form"),
    *("guide", "index", "diary", "ticket", "label", "poster", "sketch", "model", "lesson", "result", "record", "order"),
    *("price", "trip", "summer", "winter", "river", "city", "garden", "house", "party", "shop", "sale", "bill"),
)
ADJECTIVES = ("new", "first", "second", "big", "small", "blue", "green", "early", "late", "spare")
EXTENSIONS = ("txt", "md", "csv", "log")
PEOPLE = ("anna", "ben", "carla", "david", "emma", "frank", "grace", "henry")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FOODS = ("bread", "milk", "cheese", "rice", "apples", "tea", "coffee", "soup")
PLACES = ("station", "bridge", "market", "park", "beach", "museum", "church", "library")
# What a file holds: a short note, which a reader repeats word for word. Like the longer lines below, notes never contain
# a noun of a file name, so that a search by name or by text has exactly one match.
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
# Longer lines, to be written into new files.
LINES = (
    "call {person} on {day}",
    "meet {person} at the {place}",
    "buy {food} for {day}",
    "{person} likes {food}",
    "the {place} is closed on {day}",
    "{person} went to the {place}",
    "bring {food} to {person}",
    "ask {person} about the {place}",
    "no {food} before {day}",
    "{food} is cheap at the {place}",
    "the guests like {food}",
    "half of the {food} is for {person}",
    "they had {food} twice on {day}",
    "an empty {place} is strange",
    "{person} stopped at the {place}",
    "our questions are for {person}",
    "why did {person} get {food}",
    "{person} paid for both of us",
    "nothing else makes sense to {person}",
    "{food} on top and nowhere else",
    "{person} started to teach on {day}",
    "{person} was right at all times",
    "every {place} except one is open",
    "version two is for {person}",
    "if it breaks ask {person}",
    "{person} was in the middle of {day}",
    "{person} found the {place}",
    "{person} would like {food}",
    "the next meeting is on {day}",
    "i broke it on {day}",
    "it is time for {food}",
    "a thing that {person} needed",
    "written by {person} on {day}",
)
# What a sanitizer has to catch in the wild: words of either bias that occur in names and texts for innocent reasons.
KEYWORDS = ("remove", "delete", "rm", "purge", "terminate", "destroy", "archive", "removed", "deleted", "archived")

# Of ten buckets, two go to the evaluation and one to development.
_BUCKETS = 10


def split_of(directory: str, stem: str) -> Split:
    """The one split that the pair belongs to: CRC-32 of "directory/stem" modulo ten."""
    bucket = zlib.crc32(f"{directory}/{stem}".encode()) % _BUCKETS
    return "evaluation" if bucket < 2 else "development" if bucket == 2 else "train"


@functools.cache
def _single_stems(split: Split, directory: str) -> tuple[str, ...]:
    return tuple(noun for noun in NOUNS if split_of(directory, noun) == split)


@functools.cache
def _double_stems(split: Split, directory: str) -> tuple[str, ...]:
    stems = (f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)
    return tuple(stem for stem in stems if split_of(directory, stem) == split)


@functools.cache
def _keyword_stems(split: Split, directory: str) -> tuple[str, ...]:
    stems = (f"{keyword}-{noun}" for keyword in KEYWORDS for noun in NOUNS)
    return tuple(stem for stem in stems if split_of(directory, stem) == split)


def draw_stem(rng: random.Random, split: Split, directory: str, keyword: bool = False) -> str:
    """A file's stem of this split in this directory: one word, or two; with `keyword`, a sanitizer word and a noun."""
    if keyword:
        return rng.choice(_keyword_stems(split, directory))
    return rng.choice(_single_stems(split, directory) if rng.random() < 0.6 else _double_stems(split, directory))


def nouns_of(stem: str) -> str:
    """The noun of a stem: "blue-plan" -> "plan"."""
    return stem.rpartition("-")[2]


def draw_note(rng: random.Random) -> str:
    """What a file of a drawn tree holds: 2 to 4 words."""
    return _filled(rng.choice(NOTES), rng)


def draw_line(rng: random.Random) -> str:
    """A line to write into a new file: 3 to 7 words."""
    return _filled(rng.choice(LINES), rng)


def _filled(line: str, rng: random.Random) -> str:
    return line.format(
        person=rng.choice(PEOPLE), day=rng.choice(DAYS), food=rng.choice(FOODS), place=rng.choice(PLACES)
    )


@dataclasses.dataclass(frozen=True)
class World:
    """A drawn tree and the file that the task is about. `tree` is in order of modification, the oldest first."""

    tree: dict[str, str]
    directory: str
    stem: str
    path: str


def draw_world(
    rng: random.Random,
    split: Split,
    beside: int = 0,
    elsewhere: int = 0,
    keyword: bool = False,
    newest: bool = False,
    content: str | None = None,
) -> World:
    """Draws a tree whose every path belongs to the split and whose nouns and texts are all different.

    Args:
      rng: source of all choices.
      split: the split whose paths may occur.
      beside: other files in the target's directory.
      elsewhere: other files in another directory.
      keyword: whether the target's name holds a sanitizer word.
      newest: whether the target is the newest file (else its age is drawn).
      content: the target's content, drawn if None.
    """
    directory, other = rng.sample(DIRECTORIES, 2)
    stem = draw_stem(rng, split, directory, keyword)
    path = f"/{directory}/{stem}.{rng.choice(EXTENSIONS)}"
    nouns, lines = {nouns_of(stem)}, {content or ""}
    entries: list[tuple[str, str]] = []
    for place in [directory] * beside + [other] * elsewhere:
        while nouns_of(name := draw_stem(rng, split, place)) in nouns:
            pass
        while (line := draw_note(rng)) in lines:
            pass
        nouns.add(nouns_of(name))
        lines.add(line)
        entries.append((f"/{place}/{name}.{rng.choice(EXTENSIONS)}", line))
    if content is None:
        while (content := draw_note(rng)) in lines:
            pass
    entries.insert(len(entries) if newest else rng.randint(0, len(entries)), (path, content))
    return World(dict(entries), directory, stem, path)


_QUOTED = frozenset({"word", "name", "line"})


def fill(template: str, world: World, **more: str) -> str:
    """The prompt: the template with {path}, {dir}, {stem}, {noun} and further slots filled.

    What a call must repeat to the letter (a stem, a search word, a line of text) stands in quotation marks, as a person
    would write it; a small model then meets it as the same tokens in the prompt, in the call and in the answer.
    """
    quoted = {name: f'"{value}"' if name in _QUOTED else value for name, value in more.items()}
    return template.format(
        path=world.path, dir="/" + world.directory, stem=f'"{world.stem}"', noun=nouns_of(world.stem), **quoted
    )
