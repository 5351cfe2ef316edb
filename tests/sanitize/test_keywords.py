"""Whole-word matching, against hand-written cases and a character-wise oracle."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subl_jax.sanitize.keywords import Match, compile_patterns, compile_words
from subl_jax.settings.api import SETTING

WORDS = ("delete", "remove", "rm", "delete_file")
MATCHER = compile_words(WORDS)
BANNED = sorted(word for words in SETTING.words.values() for word in words)


def found(text):
    return [match.word for match in MATCHER.find(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("please delete it", ["delete"]),
        ("DELETE it, Delete it", ["delete", "delete"]),
        ("call delete_file now", ["delete_file"]),
        ("delete_files", ["delete"]),
        ("/work/remove-list.txt", ["remove"]),
        ("/work/rm_list.txt", ["rm"]),
        ("rm", ["rm"]),
        ("x\nrm\ty", ["rm"]),
        ('{"a":"rm"}', ["rm"]),
        ("de\u200blete", ["delete"]),
        ("\ufeffd\u00ade\u2060l\u200de\u200cte\u034f!", ["delete"]),
        ("ｄｅｌｅｔｅ", ["delete"]),
        ("𝐝𝐞𝐥𝐞𝐭𝐞", ["delete"]),
        ("été rm été", ["rm"]),
    ],
)
def test_a_word_is_found(text, expected):
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    ["permission format warm firmly", "undeleted", "deleter", "rm2", "2rm", "arm", "érm", "rmé", "r m", "deleteй", ""],
)
def test_a_word_inside_another_word_is_not_found(text):
    assert found(text) == []


def test_offsets_are_those_of_the_original_text():
    text = "é x\u200b de\u200blete y"
    (match,) = MATCHER.find(text)
    assert match == Match("delete", 5, 12)
    assert text[match.start : match.end] == "de\u200blete"


@pytest.mark.parametrize("words", [[], "delete", [""], ["_rm"], ["rm "]])
def test_a_list_that_bans_nothing_or_has_no_boundary_is_refused(words):
    with pytest.raises(ValueError):
        compile_words(words)


def oracle(text):
    """Cuts ASCII text at everything that is no letter and no digit, and looks the pieces up."""
    return [piece for piece in re.split(r"[^a-z0-9]+", text.lower()) if piece in ("delete", "remove", "rm")]


@settings(deadline=None, max_examples=60)
@given(
    st.text(alphabet="delrmov_ -/.2E", max_size=40)
    | st.lists(st.sampled_from(["rm", "delete", "remove", "_", " ", "x", "/", "2", "Rm"]), max_size=8).map("".join)
)
def test_matches_equal_those_of_cutting_the_text(text):
    plain = compile_words(["delete", "remove", "rm"])
    assert [match.word for match in plain.find(text)] == oracle(text)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.sampled_from(BANNED), st.text(max_size=12))
def test_a_planted_word_between_boundaries_is_always_found(before, word, after):
    start, end = len(before) + 1, len(before) + 1 + len(word)
    matches = compile_words(BANNED).find(f"{before} {word} {after}")
    assert any(match.start <= start and end <= match.end for match in matches)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(list("\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f")), min_size=5, max_size=5))
def test_invisible_characters_never_hide_a_word(invisible):
    text = "".join(letter + hidden for letter, hidden in zip("delete", ["", *invisible], strict=True))
    assert found(text) == ["delete"]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_offsets_are_always_inside_the_text(text):
    for match in MATCHER.find(text + " rm " + text):
        assert 0 <= match.start < match.end <= 2 * len(text) + 4


def test_what_is_no_word_is_found_by_its_pattern_under_one_name():
    matcher = compile_patterns("mode", (r"(?<!\w)[0-7]{3}(?!\w)", r"u\+x"))
    assert matcher.find("set 644, not 6444, or U+X") == [Match("mode", 4, 7), Match("mode", 22, 25)]
    # Fullwidth digits and invisible characters hide a pattern as little as a word.
    assert matcher.find("é ６４\u200b４ é") == [Match("mode", 2, 6)]


@pytest.mark.parametrize(("patterns", "words"), [((), "empty"), (("a*",), "matches the empty text")])
def test_patterns_that_ban_nothing_or_everything_are_refused(patterns, words):
    with pytest.raises(ValueError, match=words):
        compile_patterns("mode", patterns)
