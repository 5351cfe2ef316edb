"""Interpreters that change permissions themselves: python, perl, ruby, node, awk, php, lua, tcl in a command line.

Found by patterns over the code, not by parsing six languages: a call of chmod or chown of the language, or a permission
command in what is handed to a shell. Names in comments and in strings that are only printed do not count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from subl_jax.settings.bash.commands.syntax import UNKNOWN

_CALL = re.compile(r"\b(?:[lf]?ch(?:mod|own)(?:Sync|_R|at)?|chgrp|lch(?:mod|own)Sync)\s*\(")
_BARE = re.compile(r"(?<![$@%&\w])(?:File(?:Utils)?\.)?\bl?ch(?:mod|own)(?:_R)?\b(?!\s*=[^~=])")
_NAMES = r"(?:chmod|chown|chgrp|setfacl|install\s+[^'\"`\n]{0,200}(?:-\w*[mog]|--mode|--owner|--group))\b"
_TO_SHELL = re.compile(
    r"(?:\b(?:system|popen|run|call|check_call|check_output|Popen|getoutput|getstatusoutput|exec|exec[lv]p?e?|execute|"
    r"spawn\w*|execSync|execFile|execFileSync|shell_exec|passthru|capture[23e]*|qx|create_subprocess_\w+)\b|`|%x|"
    r"\bopen\s*\(?[^;\n]{0,100}\|)[^;\n]{0,300}?\b" + _NAMES
)
_AWK = re.compile(r"(?:system\s*\(|\")[^;\n]{0,300}?\b" + _NAMES + r"(?:[^|;\n]{0,300}(?:\|\s*(?:getline|\"\w*sh)))?")
_STRING = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"", re.DOTALL)
_COMMENT = re.compile(r"(?m)(?:^|(?<=\s))#.*$")
_SLASH_COMMENT = re.compile(r"(?m)(?:^|(?<=[\s;]))//.*$")


@dataclass(frozen=True)
class Language:
    """How an interpreter takes code: options whose value is code, options with other values, and how it calls chmod."""

    code: str
    values: str = ""
    bare: bool = False
    first_operand: bool = False
    comment: re.Pattern[str] = _COMMENT


_PYTHON = Language("c", "WXm")
_PERL = Language("eE", "IMm", bare=True)
_RUBY = Language("e", "IrC", bare=True)
_NODE = Language("ep", "r", comment=_SLASH_COMMENT)
_AWK_LANGUAGE = Language("", "Fvf", first_operand=True)
_LANGUAGES = {
    "python": _PYTHON,
    "pypy": _PYTHON,
    "perl": _PERL,
    "ruby": _RUBY,
    "node": _NODE,
    "nodejs": _NODE,
    "php": Language("rBRE", "dc"),
    "awk": _AWK_LANGUAGE,
    "gawk": _AWK_LANGUAGE,
    "mawk": _AWK_LANGUAGE,
    "nawk": _AWK_LANGUAGE,
    "lua": Language("e", "l"),
    "tclsh": Language("", bare=True),
}
_LONG_CODE = frozenset({"--eval", "--print", "--source"})


def language_of(name: str) -> Language | None:
    """The language of an interpreter's name, versions included (`python3.11`)."""
    return _LANGUAGES.get(re.sub(r"[\d.]+$", "", name))


@dataclass
class Call:
    """Code on the command line, or a file, or (both None) standard input."""

    code: str | None = None
    file: str | None = None
    executes: bool = True


def interpreter_call(language: Language, words: list[str]) -> Call:
    """What an interpreter executes. A module (`python -m x`) is a program like any other: nothing to look into."""
    code: list[str] = []
    at = 1
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--" or not word.startswith("-") or word == "-":
            at -= word not in ("--", "-")
            break
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            if option in _LONG_CODE:
                code.append(value if equals else "".join(words[at : at + 1]))
                at += not equals
            elif option in ("--version", "--help"):
                return Call(executes=False)
            continue
        for index, letter in enumerate(word[1:], 1):
            if letter not in language.code + language.values:
                continue
            value = word[index + 1 :]
            if not value:
                value = "".join(words[at : at + 1])
                at += 1
            if letter in language.code:
                code.append(value)
            elif (letter, language.first_operand) in (("m", False), ("f", True)) and language is not _PERL:
                return Call(executes=False)
            break
        if code and language is _PYTHON:
            break
    if code:
        return Call("\n".join(code))
    rest = words[at:]
    if language.first_operand:
        return Call(rest[0]) if rest else Call(executes=False)
    return Call(None, rest[0]) if rest else Call()


def changes_permissions(language: Language, code: str) -> bool | None:
    """Whether code calls chmod and the like; None where too little of it is known."""
    if not code.replace(UNKNOWN, "").strip():
        return None if UNKNOWN in code else False
    code = language.comment.sub("", code)
    if language.first_operand:
        return any(found[0].startswith("system") or "|" in found[0] for found in _AWK.finditer(code))
    plain = _STRING.sub("''", code)
    pattern = _BARE if language.bare else _CALL
    return bool(pattern.search(plain) or _TO_SHELL.search(code))
