"""Quoting as bash removes it, and the small text functions of parameter expansion; nothing here needs a tree."""

from __future__ import annotations

import fnmatch
import re

from subl_jax.settings.bash.commands.syntax import UNKNOWN

_ANSI = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "v": "\v"}
_ANSI_ESCAPE = re.compile(
    r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|u([0-9A-Fa-f]{1,4})|U([0-9A-Fa-f]{1,8})|c(.)|(.))", re.DOTALL
)
_GLOB = re.compile(r"[*?]|\[")
# Patterns and values longer than this are not matched: prefix removal tries every length.
_LONGEST_PATTERN = 512


def decode_ansi(text: str) -> str:
    r"""The inside of $'...' (or of a printf format) with its escapes replaced; \0 as bash: nothing follows it."""

    def value(found: re.Match[str]) -> str:
        octal, two, four, eight, control, other = found.groups()
        if control:
            return chr(ord(control[0]) & 31)
        if other:
            return _ANSI.get(other, other if other in "\\'\"?" else "\\" + other)
        code = int(octal, 8) & 255 if octal else int(two or four or eight, 16)
        return chr(code) if 0 < code < 0x110000 and not 0xD800 <= code < 0xE000 else ""

    return _ANSI_ESCAPE.sub(value, text)


def unquoted_pieces(text: str) -> list[tuple[str, bool]]:
    """A bare word as (text, literal) pieces: what a backslash protects is quoted, a continued line is joined."""
    pieces: list[tuple[str, bool]] = []
    for found in re.finditer(r"\\(?:\n|(.))|([^\\]+)|\\", text, re.DOTALL):
        if found[2] is not None:
            pieces.append((found[2], True))
        elif found[1] is not None:
            pieces.append((found[1], False))
        elif found[0] == "\\":
            pieces.append(("\\", False))
    return pieces


def unescape_double(text: str, here_document: bool = False) -> str:
    r"""Text between double quotes (or in a here-document, where \" keeps its backslash) without its backslashes."""
    special = r"\$`" if here_document else r"\$`\""
    return re.sub(rf"\\(?:\n|([{re.escape(special)}]))", lambda found: found[1] or "", text)


def hide_globs(text: str) -> str:
    """An unquoted text that may match file names: its glob characters become unknown."""
    return _GLOB.sub(UNKNOWN, text)


def matches(text: str, pattern: str) -> bool | None:
    """Whether a value matches a pattern of `case` or `[[ ]]`; None where either is not known."""
    if UNKNOWN in text or UNKNOWN in pattern or re.search(r"[@?*+!]\(", pattern) or len(pattern) > _LONGEST_PATTERN:
        return None
    return fnmatch.fnmatchcase(text, pattern)


def remove_affix(text: str, pattern: str, operator: str) -> str:
    """`${x#p}`, `${x##p}`, `${x%p}`, `${x%%p}`."""
    if UNKNOWN in text or UNKNOWN in pattern or max(len(text), len(pattern)) > _LONGEST_PATTERN:
        return UNKNOWN
    sizes = range(len(text) + 1)
    for size in reversed(sizes) if len(operator) == 2 else sizes:
        head = operator[0] == "#"
        part = text[:size] if head else text[len(text) - size :]
        if fnmatch.fnmatchcase(part, pattern):
            return text[size:] if head else text[: len(text) - size]
    return text


def substitute(text: str, pattern: str, new: str, every: bool) -> str:
    """`${x/p/new}` and `${x//p/new}` for a pattern without glob characters."""
    if UNKNOWN in text + pattern + new or _GLOB.search(pattern) or not pattern:
        return UNKNOWN
    return text.replace(pattern, new, -1 if every else 1)


def split_fields(text: str, separators: str = " \t\n") -> list[str]:
    """Field splitting; the first and last are empty where the text begins or ends with a separator."""
    if not separators:
        return [text]
    many = "+" if not separators.strip() else ""
    return re.split(f"[{re.escape(separators)}]{many}", text)


def echoed(words: list[str]) -> str:
    """What `echo` writes."""
    newline, escapes = True, False
    while words and re.fullmatch(r"-[neE]+", words[0]):
        newline &= "n" not in words[0]
        escapes = ("e" in words[0]) or (escapes and "E" not in words[0])
        words = words[1:]
    text = " ".join(words)
    return (decode_ansi(text) if escapes else text) + ("\n" if newline else "")


def printed(words: list[str]) -> str:
    """What `printf FORMAT ...` writes, for %s, %b, %q-free formats; numbers and the rest are unknown."""
    if words and words[0] == "--":
        words = words[1:]
    if not words:
        return ""
    form, arguments = words[0], list(words[1:])
    written = []
    for _ in range(256):
        before = len(arguments)

        def one(found: re.Match[str]) -> str:
            if found[0] == "%%":
                return "%"
            argument = arguments.pop(0) if arguments else ""
            if found[1] == "s":
                return argument
            return decode_ansi(argument) if found[1] == "b" else UNKNOWN

        # Escapes first, so that a backslash in an argument stays what it is; %% survives both.
        written.append(re.sub(r"%%|%[-+ #0-9.]*([a-zA-Z])", one, decode_ansi(form)))
        if not arguments or len(arguments) == before:
            break
    return "".join(written)
