"""Brace expansion (`{chmod,755,f}`, `{1..3}`) over a field whose characters know whether they were quoted."""

from __future__ import annotations

import re
from itertools import islice

# Characters of a field: (text, literal); only literal text, neither quoted nor from an expansion, is expanded.
Pieces = list[tuple[str, bool]]
_RANGE = re.compile(r"(-?\d{1,6})\.\.(-?\d{1,6})(?:\.\.(-?\d{1,6}))?$|([A-Za-z])\.\.([A-Za-z])$")
# A field of more alternatives than this is cut: only the first words decide what is executed.
_MOST = 256
# A longer field is left as it is, and of what a shorter one stands for only this many characters in all are made.
_LONGEST = 1024
_MOST_CHARACTERS = 65_536


def expand_braces(pieces: Pieces) -> list[Pieces]:
    """The fields a field stands for, at least itself."""
    size = sum(len(text) for text, _ in pieces)
    if size > _LONGEST or not any(literal and "{" in text for text, literal in pieces):
        return [pieces]
    return [
        [(character, literal) for character, literal in field]
        for field in _expand([(character, literal) for text, literal in pieces for character in text], 0)
    ][:_MOST]


def _expand(characters: Pieces, depth: int) -> list[Pieces]:
    """The first group that is one, expanded; then the rest."""
    if depth > 12:
        return [characters]
    for start, (character, literal) in enumerate(characters):
        if not literal or character != "{" or (start and characters[start - 1] == ("$", True)):
            continue
        group = _group(characters, start)
        if group is None:
            continue
        end, parts = group
        before = characters[:start]
        rests = _expand(characters[end + 1 :], depth + 1)
        inner = [field for part in parts for field in _expand(part, depth + 1)]
        most = min(_MOST, _MOST_CHARACTERS // len(characters) + 1)
        pairs = islice(((middle, rest) for middle in inner for rest in rests), most)
        return [before + middle + rest for middle, rest in pairs]
    return [characters]


def _group(characters: Pieces, start: int) -> tuple[int, list[Pieces]] | None:
    """Where the group that opens at `start` closes, and its alternatives; None where it is no group."""
    depth = 0
    cuts = [start]
    for at in range(start, min(len(characters), start + 4096)):
        character, literal = characters[at]
        if not literal:
            continue
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 1:
            cuts.append(at)
        if depth == 0:
            if len(cuts) > 1:
                ends = [*cuts[1:], at]
                return at, [characters[cut + 1 : end] for cut, end in zip(cuts, ends, strict=True)]
            values = _range("".join(text for text, _ in characters[start + 1 : at]))
            return None if values is None else (at, [[(c, False) for c in value] for value in values])
    return None


def _range(text: str) -> list[str] | None:
    """The values of `1..3`, `1..9..2` or `a..c`."""
    found = _RANGE.match(text)
    if found is None:
        return None
    if found[4]:
        low, high = ord(found[4]), ord(found[5])
        step = 1 if high >= low else -1
        return [chr(code) for code in range(low, high + step, step)]
    low, high = int(found[1]), int(found[2])
    step = abs(int(found[3] or 1)) or 1
    values = range(low, high + 1, step) if high >= low else range(low, high - 1, -step)
    return [str(value) for value in values[:_MOST]]
