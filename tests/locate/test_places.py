"""Kinds of places: strings are walked by hand here, and read off real renderers' tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from subl_jax.chat.rendering import Renderer
from subl_jax.locate import places
from subl_jax.locate.places import ARGUMENT_KEY, ARGUMENT_VALUE, END, PROSE, STRUCTURE, TOOL_NAME, kinds_of
from tests.distill import tiny


def parts(text: str) -> list[tuple[str, str]]:
    """Neighbouring characters of one kind together: (kind, text)."""
    found: list[tuple[str, str]] = []
    for kind, letter in zip(kinds_of(text), text, strict=True):
        if found and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1] + letter)
        else:
            found.append((kind, letter))
    return found


def test_a_call_is_told_apart_into_name_keys_values_and_form():
    assert parts('ok <tool_call>{"name":"find","arguments":{"q":"a b","n":12}}</tool_call>') == [
        (PROSE, "ok "),
        (STRUCTURE, '<tool_call>{"name":"'),
        (TOOL_NAME, "find"),
        (STRUCTURE, '","arguments":{"'),
        (ARGUMENT_KEY, "q"),
        (STRUCTURE, '":"'),
        (ARGUMENT_VALUE, "a b"),
        (STRUCTURE, '","'),
        (ARGUMENT_KEY, "n"),
        (STRUCTURE, '":'),
        (ARGUMENT_VALUE, "12"),
        (STRUCTURE, "}}</tool_call>"),
    ]


def test_what_looks_like_a_call_inside_a_value_is_a_value():
    value = 'she said "name": {delete}, \\'
    text = "<tool_call>" + json.dumps({"name": "say", "arguments": {"text": value, "list": ["x", {"y": "z"}]}})
    told = parts(text)
    assert (ARGUMENT_VALUE, json.dumps(value)[1:-1]) in told
    assert [part for kind, part in told if kind == TOOL_NAME] == ["say"]
    assert [part for kind, part in told if kind == ARGUMENT_KEY] == ["text", "list", "y"]
    assert [part for kind, part in told if kind == ARGUMENT_VALUE][1:] == ["x", "z"]


@pytest.mark.parametrize("text", ['{"name": "find", "parameters": {"q": "a"}}', '<|python_tag|>{"name":"find"}'])
def test_a_bare_call_is_a_call(text):
    assert [part for kind, part in parts(text) if kind == TOOL_NAME] == ["find"]
    assert PROSE not in kinds_of(text)


def test_prose_with_braces_and_a_call_that_is_cut_off():
    assert set(kinds_of('the set {x} holds "name": "find"')) == {PROSE}
    assert parts('<tool_call>{"name":"fi')[-1] == (TOOL_NAME, "fi")
    assert parts('<tool_call>{"name":"find","arguments":{"q":"a\\')[-1] == (ARGUMENT_VALUE, "a\\")
    assert kinds_of("") == []


class Letters(Renderer):
    """A tokenizer of given pieces; id 0 ends a turn."""

    def __init__(self, pieces):  # a real tokenizer is not needed for what is tested
        self.end_ids = (0,)
        self.pieces = ["<|end|>", *pieces]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_every_loss_token_has_its_turn_its_text_and_the_first_kind_that_says_something():
    pieces = [
        "user",
        "<tool_call>",
        '{"name":"',
        "find",
        '","arguments":{"',
        "q",
        '":"/',
        "x",
        '"}}</tool_call>',
        "yes",
    ]
    renderer = Letters(pieces)
    document = tiny.document([1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 10, 0], [*range(1, 10), 11, 12])
    found = places.places_of(renderer, document)
    assert [place.position for place in found] == np.flatnonzero(document.loss_mask).tolist()
    assert [place.kind for place in found] == [
        STRUCTURE, STRUCTURE, TOOL_NAME, STRUCTURE, ARGUMENT_KEY, ARGUMENT_VALUE, ARGUMENT_VALUE, STRUCTURE, END, PROSE, END,
    ]  # fmt: skip
    assert [place.turn for place in found] == [0] * 9 + [1] * 2
    assert [place.text for place in found] == [*pieces[1:9], "<|end|>", "yes", "<|end|>"]
