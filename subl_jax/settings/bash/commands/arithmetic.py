"""Arithmetic of the shell over what is known: `$((...))`, `((...))`, `let`, the head of a C-style `for`."""

from __future__ import annotations

import re
from collections.abc import Callable

from subl_jax.settings.bash.commands.state import Shell

_TOKEN = re.compile(
    r"\s*(?:(0[xX][0-9A-Fa-f]+|\d+)(?!\w|#)|([A-Za-z_]\w*)|"
    r"(<<=|>>=|\*\*|\+\+|--|&&|\|\||<<|>>|[-+*/%&|^<>=!]=|[-+*/%&|^<>=!~?:(),]))"
)
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)\s*(?:\+\+|--|(?:[-+*/%&|^]|<<|>>)?=(?!=))|(?:\+\+|--)\s*([A-Za-z_]\w*)")
# What may or may not be evaluated; an assignment in it is a matter of execution.
_LAZY = re.compile(r"&&|\|\||\?")
_LONGEST = 512
_LARGEST = 2**62

_LEVELS: tuple[dict[str, Callable[[int, int], int]], ...] = (
    {"||": lambda a, b: int(bool(a or b))},
    {"&&": lambda a, b: int(bool(a and b))},
    {"|": lambda a, b: a | b},
    {"^": lambda a, b: a ^ b},
    {"&": lambda a, b: a & b},
    {"==": lambda a, b: int(a == b), "!=": lambda a, b: int(a != b)},
    {
        "<": lambda a, b: int(a < b),
        ">": lambda a, b: int(a > b),
        "<=": lambda a, b: int(a <= b),
        ">=": lambda a, b: int(a >= b),
    },
    {"<<": lambda a, b: a << (b & 63), ">>": lambda a, b: a >> (b & 63)},
    {"+": lambda a, b: a + b, "-": lambda a, b: a - b},
    {"*": lambda a, b: a * b, "/": lambda a, b: _divided(a, b), "%": lambda a, b: a - b * _divided(a, b)},
)


class _Unknown(Exception):
    """The value is not known, or this is no arithmetic."""


def _divided(a: int, b: int) -> int:
    if b == 0:
        raise _Unknown
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def evaluate(text: str, shell: Shell) -> int | None:
    """The value of an expression; None where it is not known, and then what it assigns is not known either.

    Args:
      text: the expression, its expansions done.
      shell: whose variables it reads and sets.
    """
    assigned = [one or other for one, other in _ASSIGNED.findall(text)]
    try:
        if len(text) > _LONGEST or assigned and _LAZY.search(text):
            raise _Unknown
        return _Reader(text, shell).value()
    except _Unknown:
        for name in assigned:
            shell.assign(name, None)
        return None


class _Reader:
    """Reads and evaluates one expression."""

    def __init__(self, text: str, shell: Shell):
        self._shell = shell
        self._tokens: list[str] = []
        self._at = 0
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None:
                raise _Unknown
            self._tokens.append(found[0].strip())
            at = found.end()

    def value(self) -> int:
        """The value of the whole."""
        value = self._comma() if self._tokens else 0
        if self._at < len(self._tokens):
            raise _Unknown
        return value

    def _peek(self, ahead: int = 0) -> str:
        return self._tokens[self._at + ahead] if self._at + ahead < len(self._tokens) else ""

    def _take(self, wanted: str) -> bool:
        if self._peek() != wanted:
            return False
        self._at += 1
        return True

    def _comma(self) -> int:
        value = self._assignment()
        while self._take(","):
            value = self._assignment()
        return value

    def _assignment(self) -> int:
        name, operator = self._peek(), self._peek(1)
        if re.fullmatch(r"[A-Za-z_]\w*", name) and re.fullmatch(r"(?:[-+*/%&|^]|<<|>>)?=", operator):
            self._at += 2
            value = self._assignment()
            if operator != "=":
                function = next(level[operator[:-1]] for level in _LEVELS if operator[:-1] in level)
                value = function(self._read(name), value)
            return self._write(name, value)
        value = self._level(0)
        if self._take("?"):
            first = self._assignment()
            if not self._take(":"):
                raise _Unknown
            second = self._assignment()
            return first if value else second
        return value

    def _level(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._power()
        value = self._level(level + 1)
        while (function := _LEVELS[level].get(self._peek())) is not None:
            self._at += 1
            value = self._checked(function(value, self._level(level + 1)))
        return value

    def _power(self) -> int:
        value = self._unary()
        if self._take("**"):
            exponent = self._power()
            if not 0 <= exponent < 64 or abs(value) > 64:
                raise _Unknown
            return self._checked(value**exponent)
        return value

    def _unary(self) -> int:
        for sign in ("++", "--"):
            if self._take(sign):
                name = self._peek()
                self._at += 1
                return self._write(name, self._read(name) + (1 if sign == "++" else -1))
        if self._take("!"):
            return int(not self._unary())
        if self._take("-"):
            return -self._unary()
        if self._take("+"):
            return self._unary()
        if self._take("~"):
            return ~self._unary()
        return self._operand()

    def _operand(self) -> int:
        token = self._peek()
        self._at += 1
        if token == "(":
            value = self._comma()
            if not self._take(")"):
                raise _Unknown
            return value
        if token[:1].isdigit():
            return self._number(token)
        value = self._read(token)
        for sign in ("++", "--"):
            if self._take(sign):
                self._write(token, value + (1 if sign == "++" else -1))
        return value

    def _number(self, text: str) -> int:
        octal = len(text) > 1 and text[0] == "0" and text.isdigit()
        try:
            return self._checked(int(text, 8) if octal else int(text, 0))
        except ValueError as error:
            raise _Unknown from error

    def _read(self, name: str) -> int:
        value = self._shell.variables.get(name) if re.fullmatch(r"[A-Za-z_]\w*", name) else None
        if value == "":
            return 0
        if not isinstance(value, str) or re.fullmatch(r"-?\d{1,18}", value) is None:
            raise _Unknown
        return -self._number(value[1:]) if value[0] == "-" else self._number(value)

    def _write(self, name: str, value: int) -> int:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise _Unknown
        self._shell.assign(name, str(self._checked(value)))
        return value

    def _checked(self, value: int) -> int:
        if abs(value) > _LARGEST:
            raise _Unknown
        return value
