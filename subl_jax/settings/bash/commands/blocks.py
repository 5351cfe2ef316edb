"""Constructs with a body: groups, conditions, loops, `case`. What cannot be decided is walked both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tree_sitter import Node

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.flow import Leave, Status
from subl_jax.settings.bash.commands.syntax import UNKNOWN, text_of
from subl_jax.settings.bash.commands.walk import ROUNDS, Scope, Walk

_ENDS = re.compile(r"\b(?:break|exit|return|exec|kill|trap)\b")


def run_block(walk: Walk, node: Node, scope: Scope) -> Status:
    """Walks a construct whose redirections are already in force; its exit status, None where nobody knows it."""
    block = _BLOCKS.get(node.type)
    if block is not None:
        return block(walk, node, scope)
    # No statement of the grammar's: whatever it substitutes is executed, and that is all.
    walk.expander(scope).text(node)
    return None


def _subshell(walk: Walk, node: Node, scope: Scope) -> Status:
    return walk.subshell(scope, lambda inner: walk.statements(node.children, inner))


def _compound(walk: Walk, node: Node, scope: Scope) -> Status:
    if node.children and text_of(node.children[0]) == "((":
        return _arithmetic(walk, node, scope)
    return walk.statements(node.children, scope)


def _arithmetic(walk: Walk, node: Node, scope: Scope) -> Status:
    value = walk.expander(scope).arithmetic(node)
    return None if value is None else value != 0


def _parts(nodes: Sequence[Node], keyword: str) -> tuple[list[Node], list[Node]]:
    """What stands before a keyword, and what behind it."""
    at = next((index for index, node in enumerate(nodes) if not node.is_named and text_of(node) == keyword), len(nodes))
    return list(nodes[:at]), list(nodes[at + 1 :])


def _if(walk: Walk, node: Node, scope: Scope) -> Status:
    clauses = [child for child in node.named_children if child.type in ("elif_clause", "else_clause")]
    first = [child for child in node.children[1:] if child not in clauses]
    return _branch(walk, first, clauses, scope)


def _branch(walk: Walk, nodes: list[Node], clauses: list[Node], scope: Scope) -> Status:
    condition, body = _parts(nodes, "then")
    status = walk.tested(lambda: walk.statements(condition, scope))

    def then() -> Status:
        return walk.statements(body, scope)

    def otherwise() -> Status:
        if not clauses:
            return True
        if clauses[0].type == "else_clause":
            return walk.statements(clauses[0].children[1:], scope)
        return _branch(walk, clauses[0].children[1:], clauses[1:], scope)

    if status is None:
        return walk.either(scope, [then, otherwise])
    return then() if status else otherwise()


def _while(walk: Walk, node: Node, scope: Scope) -> Status:
    wanted = text_of(node.children[0]) == "while"
    body = node.child_by_field_name("body")
    condition = [child for child in node.children[1:] if body is None or child.start_byte < body.start_byte]
    inner = [] if body is None else body.children
    holds: Status = None

    def one_round() -> None:
        nonlocal holds
        holds = walk.tested(lambda: walk.statements(condition, scope))
        if holds is None:
            walk.perhaps(scope, lambda: walk.statements(inner, scope))
        elif holds is wanted:
            walk.statements(inner, scope)

    for _ in range(ROUNDS):
        events = len(walk.events)
        holds = None
        goes_on = walk.loop(one_round)
        if not goes_on or holds is not wanted:
            return None
        if len(condition) <= 2 and text_of(condition[0]) in (":", "true") and len(walk.events) == events:
            # The next round of `while true` does what this one did.
            break
    if _ENDS.search(text_of(node)) is None and text_of(condition[0]) in (":", "true"):
        # It never ends, so nothing behind it is executed.
        raise Leave("exit")
    return None


def _rounds(walk: Walk, name: str, values: list[str], body: Sequence[Node], scope: Scope) -> Status:
    """A loop over values."""
    status: Status = True

    def one_round() -> None:
        nonlocal status
        status = walk.statements(body, scope)

    if values and all(UNKNOWN in value for value in values):
        # Nobody knows how many these are, none perhaps.
        def some() -> Status:
            for value in values[:ROUNDS]:
                scope.shell.assign(name, value)
                if not walk.loop(one_round):
                    break
            return None

        return walk.perhaps(scope, some)
    for value in values[:ROUNDS]:
        scope.shell.assign(name, value)
        if not walk.loop(one_round):
            return None
    return status


def _for(walk: Walk, node: Node, scope: Scope) -> Status:
    name = node.child_by_field_name("variable")
    body = node.child_by_field_name("body")
    written = [child for child in node.children_by_field_name("value") if child.is_named]
    expander = walk.expander(scope)
    if any(text_of(child) == "in" for child in node.children if not child.is_named):
        values = [field for child in written for field in expander.fields(child)]
    else:
        values = [UNKNOWN] if scope.shell.parameters is None else list(scope.shell.parameters)
    if text_of(node.children[0]) == "select":
        values = [UNKNOWN]
    return _rounds(walk, "" if name is None else text_of(name), values, [] if body is None else body.children, scope)


def _c_style_for(walk: Walk, node: Node, scope: Scope) -> Status:
    body = node.child_by_field_name("body")
    inner: Sequence[Node] = [] if body is None else body.children
    parts: list[list[Node]] = [[], [], []]
    at = 0
    for child in _parts(node.children, "((")[1]:
        if child.type == "))":
            break
        if child.type == ";":
            at = min(at + 1, 2)
        else:
            parts[at].append(child)

    def value(index: int) -> int | None:
        values = [walk.expander(scope).arithmetic(part) for part in parts[index] if part.is_named]
        return values[-1] if values else 1

    value(0)
    for _ in range(ROUNDS):
        holds = value(1)
        if holds == 0:
            return True
        if holds is None:
            walk.perhaps(scope, lambda: None if walk.loop(lambda: walk.statements(inner, scope)) else None)
            return None
        if not walk.loop(lambda: walk.statements(inner, scope)):
            return None
        value(2)
    return None


def _case(walk: Walk, node: Node, scope: Scope) -> Status:
    value = node.child_by_field_name("value")
    items = [child for child in node.named_children if child.type == "case_item"]
    word = "" if value is None else walk.expander(scope).text(value)
    return _items(walk, items, word, scope)


def _items(walk: Walk, items: list[Node], word: str, scope: Scope) -> Status:
    """The first item that matches; where nobody knows whether one does, it or what comes behind it."""
    for index, item in enumerate(items):
        matched: Status = False
        for pattern in item.children_by_field_name("value"):
            text = walk.expander(scope).text(pattern)
            one = text == "*" or quoting.matches(word, text)
            if one:
                matched = True
                break
            matched = None if one is None else matched
        if matched is None:
            # A lone star is last and matches everything.
            rest = items[index + 1 :]
            return walk.either(
                scope,
                [
                    lambda index=index: _item(walk, items, index, word, scope),
                    lambda rest=rest: _items(walk, rest, word, scope),
                ],
            )
        if matched:
            return _item(walk, items, index, word, scope)
    return True


def _item(walk: Walk, items: list[Node], index: int, word: str, scope: Scope) -> Status:
    _, body = _parts(items[index].children, ")")
    status = walk.statements([child for child in body if child.type not in (";;", ";&", ";;&")], scope)
    end = text_of(items[index].children[-1])
    if end == ";&" and index + 1 < len(items):
        return _item(walk, items, index + 1, word, scope)
    return _items(walk, items[index + 1 :], word, scope) if end == ";;&" else status


_BLOCKS: dict[str, Callable[[Walk, Node, Scope], Status]] = {
    "subshell": _subshell,
    "compound_statement": _compound,
    "do_group": _compound,
    "if_statement": _if,
    "while_statement": _while,
    "for_statement": _for,
    "c_style_for_statement": _c_style_for,
    "case_statement": _case,
}
