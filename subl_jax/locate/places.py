"""What kind of place each token of an assistant turn stands at: a tool's name, an argument, the form of the call, prose.

A document in; one `Place` per loss token out. The kinds are read off the text of a turn, character by character, in both
ways in which families write a call: `<tool_call>{…}</tool_call>` (Hermes, Qwen) and a bare object (Llama).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from subl_jax.chat.rendering import Renderer
from subl_jax.trajectory import Trajectory

TOOL_NAME, ARGUMENT_KEY, ARGUMENT_VALUE = "tool name", "argument key", "argument value"
STRUCTURE, PROSE, END = "structure", "prose", "end of turn"
KINDS = (TOOL_NAME, ARGUMENT_KEY, ARGUMENT_VALUE, STRUCTURE, PROSE, END)

# A call that is cut off ends where the turn does.
_TAGGED = re.compile(r"<tool_call>(?P<call>.*?)(?:</tool_call>|\Z)", re.DOTALL)
_BARE = re.compile(r"\s*(?:<\|python_tag\|>)?(?P<call>\{.*)\Z", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a loss token stands.

    Attributes:
      position: index into the document's tokens.
      turn: which of the document's assistant turns, from 0.
      kind: one of `KINDS`.
      text: the token's own text.
    """

    position: int
    turn: int
    kind: str
    text: str


def places_of(renderer: Renderer, document: Trajectory) -> list[Place]:
    """One place per loss token, in the order of the tokens.

    A token that holds characters of several kinds (`":"/`) has the kind of the first that is no structure.
    """
    found: list[Place] = []
    for turn, run in enumerate(_runs(document)):
        ids = document.tokens[run].tolist()
        # What ends a turn is a marker, whatever its text looks like.
        written = [i for i in ids if i not in renderer.end_ids]
        text, spans = _spans(renderer, written)
        kinds, spans = kinds_of(text), iter(spans)
        for position, token in zip(run, ids, strict=True):
            if token in renderer.end_ids:
                found.append(Place(position, turn, END, renderer.decode([token])))
                continue
            start, stop = next(spans)
            telling = [kind for kind in kinds[start:stop] if kind != STRUCTURE]
            found.append(Place(position, turn, telling[0] if telling else STRUCTURE, text[start:stop]))
    return found


def _runs(document: Trajectory) -> list[list[int]]:
    """The positions of each assistant turn: loss tokens that follow each other without a gap."""
    positions = np.flatnonzero(document.loss_mask)
    breaks = np.flatnonzero(np.diff(positions) > 1) + 1
    return [run.tolist() for run in np.split(positions, breaks) if len(run)]


def _spans(renderer: Renderer, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of ids, and the characters of it that each id adds."""
    text = renderer.decode(ids)
    pieces = [renderer.decode([i]) for i in ids]
    if "".join(pieces) == text:
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    else:  # tokens that share a character, or that read otherwise at the beginning of a text
        ends = [min(len(renderer.decode(ids[: n + 1])), len(text)) for n in range(len(ids))]
    return text, list(zip([0, *ends[:-1]], ends, strict=True))


def kinds_of(text: str) -> list[str]:
    """The kind of every character of an assistant turn, given without its end-of-turn marker."""
    kinds = [PROSE] * len(text)
    tagged = list(_TAGGED.finditer(text))
    bare = None if tagged else _BARE.match(text)
    for found in tagged or ([bare] if bare else []):
        kinds[found.start() : found.end()] = [STRUCTURE] * (found.end() - found.start())
        _scan(text, *found.span("call"), kinds)
    return kinds


def _scan(text: str, start: int, stop: int, kinds: list[str]) -> None:
    """Marks the characters of one call, which may be broken JSON: nothing is refused, what is open ends with the call."""
    containers: list[str] = []
    key, after_colon, place = "", False, start
    while place < stop:
        letter = text[place]
        depth = len(containers)
        if letter == '"':
            end = _closing(text, place + 1, stop)
            inside = slice(place + 1, end)
            if containers and containers[-1] == "{" and not after_colon:
                kind = ARGUMENT_KEY if depth > 1 else STRUCTURE
                if depth == 1:
                    key = text[inside]
            elif depth > 1:
                kind = ARGUMENT_VALUE
            else:
                kind = TOOL_NAME if key == "name" else STRUCTURE
            kinds[inside] = [kind] * (end - place - 1)
            place = end + 1
            continue
        if letter in "{[":
            containers.append(letter)
            after_colon = False
        elif letter in "}]":
            if containers:
                containers.pop()
            after_colon = False
        elif letter == ":":
            after_colon = True
        elif letter == ",":
            after_colon = False
        elif depth > 1 and not letter.isspace():  # a number, a truth value
            kinds[place] = ARGUMENT_VALUE
        place += 1


def _closing(text: str, start: int, stop: int) -> int:
    """Index of the quote that ends a string, or where the call stops."""
    place = start
    while place < stop and text[place] != '"':
        place += 2 if text[place] == "\\" else 1
    return min(place, stop)
