"""Simple commands: words, assignments and redirections, in the order in which bash deals with them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tree_sitter import Node

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.conditions import known_test
from subl_jax.settings.bash.commands.flow import Status
from subl_jax.settings.bash.commands.programs import SHELLS, Command, run_words
from subl_jax.settings.bash.commands.redirects import redirected, words_behind
from subl_jax.settings.bash.commands.state import Shell, Value
from subl_jax.settings.bash.commands.syntax import UNKNOWN, decode, text_of
from subl_jax.settings.bash.commands.walk import Scope, Walk
from subl_jax.settings.bash.commands.wrappers import WRAPPERS

# Programs whose arguments say what is executed.
_EXECUTE_ARGUMENTS = frozenset(WRAPPERS) | SHELLS | {"eval"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)


def run_simple(walk: Walk, node: Node, scope: Scope, redirects: Sequence[Node]) -> Status:
    """One simple command.

    Args:
      walk: the walk it is a part of.
      node: the command, declaration, assignment or test; also a redirected statement without a command.
      scope: where it stands.
      redirects: redirections behind it.

    Returns:
      Its exit status, None where nobody knows it.
    """
    own = [child for child in node.named_children if child.type.endswith("_redirect")]
    redirects = [*own, *redirects] if node.type != "redirected_statement" else own
    if node.type == "command":
        return _command(walk, node, scope, redirects)
    with redirected(walk, redirects, scope) as streams:
        if streams.stdin is not None:
            scope = scope._replace(stdin=streams.stdin)
        if node.type == "declaration_command":
            return _declaration(walk, node, scope)
        if node.type == "unset_command":
            return _unset(walk, node, scope)
        if node.type == "test_command":
            return _test(walk, node, scope)
        assignments = [node] if node.type == "variable_assignment" else node.named_children
        return _assign_all(walk, [child for child in assignments if child.type == "variable_assignment"], scope)


def _test(walk: Walk, node: Node, scope: Scope) -> Status:
    if text_of(node).startswith("(("):
        walk.expander(scope).text(node)
        return None
    return known_test(node, walk.expander(scope))


def _command(walk: Walk, node: Node, scope: Scope, redirects: Sequence[Node]) -> Status:
    expander = walk.expander(scope)
    assignments, parts = [], []
    name: Node | None = None
    for child in node.children:
        if child.type == "variable_assignment" and name is None:
            assignments.append(child)
        elif child.type == "command_name":
            name = child if text_of(child) else None
            parts += [child] if name is not None else []
        elif not child.type.endswith("_redirect") and child.type != "comment":
            parts.append(child)
    parts += words_behind(redirects)
    if name is not None and _expands_alias(walk, name, scope):
        return _alias(walk, node, name, scope, redirects)
    variable = _undecided(node, name, scope.shell) if name is not None else None
    if variable is not None:
        return _alternatives(walk, node, scope, redirects, variable, scope.shell.alternatives[variable])
    walk.spend(len(parts) // 4)
    words: list[str] = []
    for part in parts:
        words += expander.fields(part) if part.is_named else [text_of(part)]
    with redirected(walk, redirects, scope) as streams:
        if streams.stdin is not None:
            scope = scope._replace(stdin=streams.stdin)
        if not words:
            return _assign_all(walk, assignments, scope)
        shell = scope.shell
        before = dict(shell.variables), set(shell.exported)
        names = []
        for assignment in assignments:
            names += _assign(walk, assignment, scope)
        shell.exported.update(names)
        try:
            return run_words(walk, Command(words, scope, node))
        finally:
            for changed in names:
                if changed in before[0]:
                    shell.variables[changed] = before[0][changed]
                else:
                    shell.variables.pop(changed, None)
                if changed not in before[1]:
                    shell.exported.discard(changed)


def _undecided(node: Node, name: Node, shell: Shell) -> str | None:
    """The first variable that decides what a command executes, and of which only some values are possible."""
    waiting = [node if text_of(name) in _EXECUTE_ARGUMENTS else name] if shell.alternatives else []
    while waiting:
        part = waiting.pop()
        if part.type == "variable_name" and shell.variables.get(text_of(part)) is None:
            if shell.alternatives.get(text_of(part)):
                return text_of(part)
        waiting.extend(reversed(part.children))
    return None


def _alternatives(
    walk: Walk, node: Node, scope: Scope, redirects: Sequence[Node], variable: str, values: tuple[str, ...]
) -> Status:
    """A command named by a variable of which only some values are possible: one of these commands."""

    def run(value: str) -> Status:
        scope.shell.assign(variable, value)
        return _command(walk, node, scope, redirects)

    return walk.either(scope, [lambda value=value: run(value) for value in values])


# Aliases.


def _expands_alias(walk: Walk, name: Node, scope: Scope) -> bool:
    """Whether a bare word is an alias here: known, switched on, and defined in an earlier line."""
    word = text_of(name)
    alias = scope.shell.aliases.get(word)
    if alias is None or not scope.shell.expands_aliases or word in walk.expanding:
        return False
    top = name
    while top.parent is not None and top.parent.parent is not None:
        top = top.parent
    return alias.script is not scope.script or alias.row < top.start_point.row


def _alias(walk: Walk, node: Node, name: Node, scope: Scope, redirects: Sequence[Node]) -> Status:
    """The text of the alias takes the place of the name; what is behind a line's redirection stays where it is."""
    word = text_of(name)
    source = node.text or b""
    at = name.start_byte - node.start_byte
    head = decode(source[:at])
    tail = decode(source[at + name.end_byte - name.start_byte :])
    text = scope.shell.aliases[word].text
    if text.endswith((" ", "\t")) and (following := re.match(r"[ \t]*([^\s;&|<>()'\"\\$`]+)", tail)):
        # An alias that ends in a blank has the next word looked up too.
        second = scope.shell.aliases.get(following[1])
        if second is not None:
            tail = f" {second.text}{tail[following.end() :]}"
    walk.expanding.add(word)
    try:
        with redirected(walk, redirects, scope) as streams:
            if streams.stdin is not None:
                scope = scope._replace(stdin=streams.stdin)
            return walk.run_inline(head + text + tail, scope)
    finally:
        walk.expanding.discard(word)


# Variables.


def _assign_all(walk: Walk, nodes: Sequence[Node], scope: Scope) -> Status:
    """Assignments that stay; their status is that of a command substitution in them."""
    for node in nodes:
        _assign(walk, node, scope)
    return None if any(b"$(" in (node.text or b"") or b"`" in (node.text or b"") for node in nodes) else True


def _assign(walk: Walk, node: Node, scope: Scope) -> list[str]:
    """One assignment; the name it sets."""
    target = node.child_by_field_name("name")
    if target is None:
        return []
    value = _value(walk, node, scope)
    adds = any(child.type == "+=" for child in node.children)
    shell = scope.shell
    if target.type == "subscript":
        variable = text_of(target.named_children[0])
        position = "".join(walk.expander(scope).text(child) for child in target.named_children[1:])
        known = shell.variables.get(variable)
        values = list(known) if isinstance(known, list) else [] if known == "" else None
        if values is None or not position.isdigit() or int(position) > len(values) or not isinstance(value, str):
            kept = {key: text for key, text in shell.elements.items() if key[0] == variable}
            shell.assign(variable, None)
            if isinstance(value, str) and UNKNOWN not in position:
                shell.elements.update(kept)
                shell.elements[variable, position] = _element(shell.elements.get((variable, position)), value, adds)
        else:
            values[int(position) : int(position) + 1] = [value]
            shell.assign(variable, values)
        return [variable]
    name = text_of(target)
    shell.assign(name, _sum(shell.variables.get(name), value) if adds else value)
    if value is None:
        shell.elements.update(_keyed(walk, node, name, scope))
    return [name]


def _element(old: str | None, new: str, adds: bool) -> str | None:
    """The element of an associative array after `m[x]=new` or `m[x]+=new`."""
    return (None if old is None else old + new) if adds else new


def _keyed(walk: Walk, node: Node, name: str, scope: Scope) -> dict[tuple[str, str], str | None]:
    """The elements of `m=([key]=value ...)`."""
    value = node.child_by_field_name("value")
    fields = [walk.expander(scope).text(child) for child in ([] if value is None else value.named_children)]
    pairs = [re.fullmatch(r"\[([^\]]*)\]=(.*)", field, re.DOTALL) for field in fields]
    return {(name, pair[1]): pair[2] for pair in pairs if pair and UNKNOWN not in pair[1]}


def _value(walk: Walk, node: Node, scope: Scope) -> Value:
    """The value in an assignment, the empty text where there is none."""
    value = node.child_by_field_name("value")
    expander = walk.expander(scope)
    if value is None:
        return ""
    if value.type != "array":
        return expander.text(value)
    if any(text_of(child).startswith("[") for child in value.named_children):
        # By key; see `_keyed`.
        return None
    return [field for child in value.named_children if child.type != "comment" for field in expander.fields(child)]


def _sum(old: Value, new: Value) -> Value:
    """The result of `+=`."""
    if old is None or new is None:
        return None
    if isinstance(new, list):
        return [*(old if isinstance(old, list) else [old] if old else []), *new]
    if isinstance(old, list):
        return [(old[0] if old else "") + new, *old[1:]]
    return old + new


def _declaration(walk: Walk, node: Node, scope: Scope) -> Status:
    """declare, typeset, local, export, readonly."""
    shell = scope.shell
    keyword = text_of(node.children[0])
    flags = ""
    local = keyword in ("local", "declare", "typeset") and bool(shell.saved)
    names: list[str] = []
    for child in node.children[1:]:
        if child.type == "variable_assignment":
            target = child.child_by_field_name("name")
            if target is not None and local and "g" not in flags:
                _save(scope, text_of(target))
            names += _assign(walk, child, scope)
            if set("in") & set(flags):
                shell.variables[names[-1]] = None
        elif child.type == "variable_name" or child.is_named and not child.type.endswith("_redirect"):
            for word in [text_of(child)] if child.type == "variable_name" else walk.expander(scope).fields(child):
                if word.startswith(("-", "+")):
                    flags += word[1:] if word[0] == "-" else ""
                    continue
                names.append(_declare(word, scope, local))
    if keyword == "export" or "x" in flags:
        (shell.exported_functions if "f" in flags else shell.exported).update(names)
        if "n" in flags:
            shell.exported.difference_update(names)
    if "p" in flags or not names:
        walk.write(UNKNOWN + "\n")
    return True


def _declare(word: str, scope: Scope, local: bool) -> str:
    """A word behind `declare` that is no assignment for the grammar, but may be one for bash."""
    found = _ASSIGNMENT.fullmatch(word)
    name = found[1] if found else word
    if local:
        _save(scope, name)
    if found:
        old = scope.shell.variables.get(name)
        scope.shell.assign(name, _sum(old, found[3]) if found[2] else found[3])
    elif local:
        scope.shell.assign(name, "")
    return name


def _save(scope: Scope, name: str) -> None:
    """Remembers the value outside the function, once."""
    if scope.shell.saved:
        scope.shell.saved[-1].setdefault(name, scope.shell.variables.get(name))


def _unset(walk: Walk, node: Node, scope: Scope) -> Status:
    functions_only = False
    for child in node.named_children:
        if child.type == "variable_name":
            words = [text_of(child)]
        else:
            words = walk.expander(scope).fields(child)
        for word in words:
            word = "".join(text for text, _ in quoting.unquoted_pieces(word))
            if word.startswith("-"):
                functions_only |= "f" in word
            elif not functions_only and (word in scope.shell.variables or word not in scope.shell.functions):
                scope.shell.variables[word.partition("[")[0]] = None if "[" in word else ""
                scope.shell.exported.discard(word)
            else:
                scope.shell.functions.pop(word, None)
    return True
