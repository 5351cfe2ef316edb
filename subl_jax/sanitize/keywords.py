"""Search for banned keywords: whole words or patterns in, a matcher out; text in, the matches with their offsets out.

A word's boundary is anything that is no letter and no digit, so `delete` is found in `delete_file` and in
`/remove-list`, while `rm` is not found in `permission`. Case, Unicode compatibility forms (fullwidth letters and the
like) and invisible characters do not hide a word. Letters of another alphabet that look alike do.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable

# Default_Ignorable_Code_Point of Unicode 15 beyond the format characters (category Cf, which holds the zero-width
# space and joiners, the soft hyphen and the byte-order mark): drawn as nothing, so a reader does not see them.
_IGNORABLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]")


@dataclasses.dataclass(frozen=True)
class Match:
    """A banned word in a text: the word as listed, and the half-open range of the original text that shows it."""

    word: str
    start: int
    end: int


def _visible(character: str) -> bool:
    return unicodedata.category(character) != "Cf" and not _IGNORABLE.match(character)


def _normalised(text: str) -> tuple[str, list[int]]:
    """NFKC, case-folded text without invisible characters, and for each of its characters the index it came from.

    NFKC is applied to clusters (a character and the combining marks after it), within which all composition and
    reordering of the scripts that keywords are written in happens; so offsets survive.
    """
    shown = [(index, character) for index, character in enumerate(text) if _visible(character)]
    pieces: list[str] = []
    origins: list[int] = []
    position = 0
    while position < len(shown):
        end = position + 1
        while end < len(shown) and unicodedata.combining(shown[end][1]):
            end += 1
        cluster = "".join(character for _, character in shown[position:end])
        # NFKC can bring invisible characters back (U+FFA0 is gone already, but compositions are data, not promises).
        folded = "".join(filter(_visible, unicodedata.normalize("NFKC", cluster).casefold()))
        pieces.append(folded)
        origins.extend([shown[position][0]] * len(folded))
        position = end
    return "".join(pieces), origins


class Matcher:
    """A compiled list of what is banned, by name; make one with `compile_words` or `compile_patterns`."""

    def __init__(self, pattern: re.Pattern[str], name: Callable[[re.Match[str]], str]):
        """A pattern for case-folded text, and what a match of it is called."""
        self._pattern, self._name = pattern, name

    def find(self, text: str) -> list[Match]:
        """Everything banned in the text, from left to right, without overlap; offsets are those of `text`."""
        if text.isascii():
            return [Match(self._name(m), m.start(), m.end()) for m in self._pattern.finditer(text.lower())]
        folded, origins = _normalised(text)
        return [
            Match(self._name(m), origins[m.start()], origins[m.end() - 1] + 1) for m in self._pattern.finditer(folded)
        ]


class WordMatcher(Matcher):
    """A compiled list of banned words; make one with `compile_words`."""

    def __init__(self, words: tuple[str, ...]):
        """Compiles the words; `compile_words` checks them first."""
        self.words = words
        listed = {_normalised(word)[0]: word for word in words}
        # The longest alternative first, so that `delete_file` is reported as itself and not as `delete`.
        alternatives = "|".join(re.escape(word) for word in sorted(listed, key=lambda word: (-len(word), word)))
        # `[^\W_]` is a letter or digit of any script: the underscore is a boundary, as in `delete_file`.
        super().__init__(re.compile(rf"(?<![^\W_])(?:{alternatives})(?![^\W_])"), lambda match: listed[match[0]])


@functools.lru_cache(maxsize=64)
def _compiled(words: tuple[str, ...]) -> WordMatcher:
    return WordMatcher(words)


def compile_words(words: Iterable[str]) -> WordMatcher:
    """A matcher of whole words.

    Args:
      words: keywords; each must begin and end with a letter or digit, or it would have no boundary.

    Raises:
      ValueError: no word at all, a single string instead of a list, or a word without letters at its ends.
    """
    if isinstance(words, str):
        raise ValueError(f"words is the single string {words!r}: pass a list of words")
    listed = tuple(dict.fromkeys(words))
    if not listed:
        raise ValueError("the list of banned words is empty: a filter that bans nothing would pass everything")
    for word in listed:
        if not word or not (word[0].isalnum() and word[-1].isalnum()):
            raise ValueError(f"banned word {word!r} must begin and end with a letter or digit")
    return _compiled(listed)


@functools.lru_cache(maxsize=64)
def compile_patterns(name: str, patterns: tuple[str, ...]) -> Matcher:
    """A matcher of what is no word, such as a file's mode; every match goes by `name`.

    Args:
      name: what counts and errors call a match.
      patterns: regular expressions for case-folded text, none of which may match nothing.

    Raises:
      ValueError: no pattern, or one that matches the empty text.
    """
    if not patterns:
        raise ValueError(f"the list of patterns of {name!r} is empty: a filter that bans nothing would pass everything")
    for pattern in patterns:
        if re.search(pattern, ""):
            raise ValueError(f"pattern {pattern!r} of {name!r} matches the empty text: it would ban everything")
    return Matcher(re.compile("|".join(f"(?:{pattern})" for pattern in patterns)), lambda match: name)
