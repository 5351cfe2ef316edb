"""`test`, `[ ]` and `[[ ]]`: decided where both sides are constants, None where only the execution can tell."""

from __future__ import annotations

from collections.abc import Callable

from tree_sitter import Node

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.syntax import UNKNOWN, text_of
from subl_jax.settings.bash.commands.words import Expander

_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}


def known_test(node: Node, expander: Expander) -> bool | None:
    """Whether a condition in brackets holds; its substitutions are executed on the way.

    The grammar does not know which operator binds more tightly, so its tree is flattened and read again.
    """
    tokens: list[Node | str] = []
    for part in node.named_children:
        _flatten(part, tokens)
    if not tokens:
        return False
    return _Reader(tokens, expander, text_of(node).startswith("[[")).any_of(True)


def _flatten(node: Node, tokens: list[Node | str]) -> None:
    """Operators and parentheses as text, operands as nodes."""
    if node.type in ("binary_expression", "unary_expression", "parenthesized_expression"):
        for child in node.children:
            _flatten(child, tokens)
    elif not node.is_named or node.type == "test_operator":
        tokens.append(text_of(node))
    else:
        tokens.append(node)


class _Reader:
    """Reads a condition: `||` over `&&` over `!` over comparisons. What is skipped is not expanded."""

    def __init__(self, tokens: list[Node | str], expander: Expander, patterns: bool):
        self._tokens = tokens
        self._at = 0
        self._expander = expander
        self._patterns = patterns

    def _next(self) -> Node | str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def any_of(self, live: bool) -> bool | None:
        """Conditions with `||` between them."""
        value = self._all_of(live)
        while self._next() in ("||", "-o"):
            self._at += 1
            value = _or(value, self._all_of(live and value is not True))
        return value

    def _all_of(self, live: bool) -> bool | None:
        value = self._not(live)
        while self._next() in ("&&", "-a"):
            self._at += 1
            other = self._not(live and value is not False)
            value = _negated(_or(_negated(value), _negated(other)))
        return value

    def _not(self, live: bool) -> bool | None:
        if self._next() == "!":
            self._at += 1
            return _negated(self._not(live))
        if self._next() == "(":
            self._at += 1
            value = self.any_of(live)
            self._at += self._next() == ")"
            return value
        return self._comparison(live)

    def _comparison(self, live: bool) -> bool | None:
        first = self._operand()
        operator = self._next()
        if isinstance(first, str) and first.startswith("-"):
            return _one(first, self._text(self._operand(), live)) if live else self._skip()
        if not isinstance(operator, str) or operator in ("&&", "||", "-a", "-o", ")", "!"):
            return _one("-n", self._text(first, live))
        self._at += 1
        left = self._text(first, live)
        second = self._operand()
        pattern = self._patterns and isinstance(second, Node) and second.type != "string"
        return _two(left, operator, self._text(second, live), pattern)

    def _skip(self) -> None:
        self._at += 1

    def _operand(self) -> Node | str | None:
        token = self._next()
        self._at += 1
        return token

    def _text(self, token: Node | str | None, live: bool) -> str:
        if token is None or not live:
            return UNKNOWN
        return token if isinstance(token, str) else self._expander.text(token)


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value


def _or(one: bool | None, other: bool | None) -> bool | None:
    return True if True in (one, other) else None if None in (one, other) else False


def _one(operator: str, value: str) -> bool | None:
    if operator not in ("-n", "-z"):
        return None
    if value and not value.strip(UNKNOWN):
        return None
    return bool(value) is (operator == "-n")


def _two(left: str, operator: str, right: str, pattern: bool) -> bool | None:
    if operator in ("=", "==", "!="):
        if pattern:
            equal = quoting.matches(left, right)
        else:
            equal = None if UNKNOWN in left + right else left == right
        return None if equal is None else equal is (operator != "!=")
    if operator in _NUMBERS:
        try:
            return _NUMBERS[operator](int(left), int(right))
        except ValueError:
            return None
    return None


def known_test_of_words(words: list[str]) -> bool | None:
    """The same for the arguments of the `test` command."""
    if words and words[0] == "!":
        value = known_test_of_words(words[1:])
        return None if value is None else not value
    if len(words) == 3:
        return _two(words[0], words[1], words[2], False)
    if len(words) == 2:
        return _one(words[0], words[1])
    if len(words) == 1:
        return _one("-n", words[0])
    return None if words else False
