"""Redirections: what a command reads, and where what it writes goes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tree_sitter import Node

from subl_jax.settings.bash.commands.state import Input
from subl_jax.settings.bash.commands.syntax import HERE_STRING, UNKNOWN, text_of
from subl_jax.settings.bash.commands.walk import Redirected, Scope, Walk

_OPERATORS = frozenset({"<", ">", ">>", "&>", "&>>", "<&", ">&", ">|", "<>", "<&-", ">&-"})
_TARGETS_OF_STDOUT = (None, "1")


@contextmanager
def redirected(walk: Walk, nodes: Sequence[Node], scope: Scope) -> Iterator[Redirected]:
    """Applies redirections, from the left, around the body of the `with` statement.

    Args:
      walk: whose output is diverted and whose files are written.
      nodes: redirection nodes; others are ignored.
      scope: where they stand.

    Yields:
      The standard input they set, and the words behind their targets.
    """
    streams = Redirected()
    with ExitStack() as stack:
        for node in nodes:
            if node.type == "herestring_redirect":
                text = "".join(walk.expander(scope).text(child) for child in node.named_children[-1:])
                streams.stdin = Input(text + "\n")
            elif node.type == "heredoc_redirect":
                # One that could not be cut out of the text.
                streams.stdin = Input(UNKNOWN)
            elif node.type == "file_redirect":
                _file(walk, node, scope, streams, stack)
        yield streams


def words_behind(nodes: Sequence[Node]) -> list[Node]:
    """Arguments the grammar takes for further targets: `chmod > log 755 f`."""
    return [
        target
        for node in nodes
        if node.type == "file_redirect"
        for target in node.children_by_field_name("destination")[1:]
        if target.is_named
    ]


def _file(walk: Walk, node: Node, scope: Scope, streams: Redirected, stack: ExitStack) -> None:
    operator = next((text_of(child) for child in node.children if text_of(child) in _OPERATORS), "")
    descriptor = next((text_of(child) for child in node.children if child.type == "file_descriptor"), None)
    target = node.child_by_field_name("destination")
    if target is None:
        return
    if operator.startswith("<"):
        if descriptor in (None, "0"):
            _input(walk, operator, target, scope, streams)
        else:
            walk.expander(scope).text(target)
        return
    if target.type == "process_substitution" and descriptor in _TARGETS_OF_STDOUT:
        inner = target.named_children

        def feed(text: str) -> None:
            fed = scope._replace(stdin=Input(text))
            walk.subshell(fed, lambda sub: walk.statements(inner, sub))

        stack.enter_context(walk.diverted(feed))
        return
    name = walk.expander(scope).text(target)
    if descriptor not in _TARGETS_OF_STDOUT and not operator.startswith("&"):
        if operator in (">", ">|"):
            walk.write_file(scope.shell, name, "")
        return
    if operator in (">&", ">&-") and re.fullmatch(r"\d+-?|-", name):
        if name not in ("1", "1-"):
            # To the standard error, or to a descriptor that nobody keeps account of.
            stack.enter_context(walk.diverted(lambda _: None))
        return
    append = operator.endswith(">>")
    # The file is emptied before the command runs, and may be read meanwhile.
    if not append:
        walk.write_file(scope.shell, name, "")
    shell = scope.shell.copy()
    stack.enter_context(walk.diverted(lambda text: walk.write_file(shell, name, text, append)))


def _input(walk: Walk, operator: str, target: Node, scope: Scope, streams: Redirected) -> None:
    """`< file`: its text if the script wrote it, a here-document or a here-string."""
    raw = text_of(target)
    document = scope.script.documents.get(raw)
    if document is not None:
        streams.stdin = Input(walk.expander(scope).document(document))
        return
    name = walk.expander(scope).text(target)
    if name.startswith(HERE_STRING):
        streams.stdin = Input(name[len(HERE_STRING) :] + "\n")
    elif operator in ("<", "<>"):
        text = walk.read_file(scope.shell, name)
        if name == "/dev/null":
            text = ""
        # Of a file that was there before nothing is known; whoever executes it executes a program like any other.
        streams.stdin = Input(UNKNOWN, foreign=True) if text is None else Input(text)
