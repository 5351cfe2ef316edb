"""The walk through a script in the order bash would execute it, emitting permission commands on the way.

Text in, events out: the names of permission commands, `other`, `dynamic`, `unparseable`. What cannot be decided before
execution (does `[ -f x ]` hold?) counts as possibly executed: both ways are walked, from left to right, and afterwards
only what holds in both is known. `true`, `false`, `:` and comparisons of constants are decided.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from tree_sitter import Node

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.flow import EnoughFound, Leave, Status
from subl_jax.settings.bash.commands.state import LONGEST, Function, Input, Shell
from subl_jax.settings.bash.commands.syntax import UNKNOWN, Script, parse, text_of
from subl_jax.settings.bash.commands.words import Expander

# Deeper nesting is not written by people, and Python's own stack ends soon after.
_DEEPEST = 40
# Statements walked in all, repeated ones included; more than this comes from loops within loops.
_BUDGET = 20_000
# Rounds of a loop over constant values that are walked.
ROUNDS = 64
# Written behind output that may or may not have been written. It makes the whole unknown to whoever compares it, and is
# a comment to a shell that executes it.
PERHAPS = f"#{UNKNOWN}\n"

_SIMPLE = frozenset(
    {"command", "declaration_command", "unset_command", "variable_assignment", "variable_assignments", "test_command"}
)


class Scope(NamedTuple):
    """Where a statement stands: its script, the shell it runs in, and its standard input if a text is piped to it."""

    script: Script
    shell: Shell
    stdin: Input | None


@dataclass
class Redirected:
    """What redirections do to a command besides diverting its output: its standard input if they set it."""

    stdin: Input | None = None


@dataclass(frozen=True)
class Handlers:
    """The modules that need a walk and that a walk needs; handed over, so that none imports in a circle."""

    simple: Callable[[Walk, Node, Scope, Sequence[Node]], Status]
    chain: Callable[[Walk, Node, Scope, Sequence[Node]], Status]
    block: Callable[[Walk, Node, Scope], Status]
    redirected: Callable[[Walk, Sequence[Node], Scope], AbstractContextManager[Redirected]]


class Walk:
    """One walk: the events so far, the files the script has written, and where output goes."""

    def __init__(self, limit: int, handlers: Handlers):
        self.events: list[str] = []
        self.files: dict[str, str] = {}
        self.loops = 0
        self.expanding: set[str] = set()
        self._handlers = handlers
        self._names = 0
        self._limit = limit
        self._budget = _BUDGET
        self._depth = 0
        self._tested = 0
        self._sinks: list[list[str]] = [[]]

    def found(self, event: str) -> None:
        """Something that the answer is made of.

        Raises:
          EnoughFound: this was the last one wanted.
        """
        self.events.append(event)
        if len(self.events) >= self._limit:
            raise EnoughFound

    def write(self, text: str) -> None:
        """Output of a command."""
        sink = self._sinks[-1]
        if sum(map(len, sink[-1:])) + len(text) > LONGEST:
            sink[:] = [UNKNOWN]
        elif text:
            sink[:] = ["".join(sink) + text]

    @property
    def written(self) -> int:
        """How much the present command has written so far."""
        return sum(map(len, self._sinks[-1]))

    @contextmanager
    def diverted(self, to: Callable[[str], object]) -> Iterator[None]:
        """Output goes to `to` instead, all at once at the end, however the body ends."""
        self._sinks.append([])
        try:
            yield
        finally:
            to("".join(self._sinks.pop()))

    def captured(self, action: Callable[[], object]) -> str:
        """What an action writes."""
        texts: list[str] = []
        with self.diverted(texts.append):
            action()
        return "".join(texts)

    # Files.

    def new_name(self, prefix: str) -> str:
        """A file name that nothing else has."""
        self._names += 1
        return f"{prefix}{62 + self._names}"

    def read_file(self, shell: Shell, name: str) -> str | None:
        """The text of a file the script has written; None for every other file."""
        path = shell.path(name)
        if path is not None:
            return self.files.get(path)
        if shell.directory is None and name and UNKNOWN not in name:
            # Somebody may have changed the directory: the last file of that name is meant.
            ending = "/" + posixpath.normpath(name)
            return next((text for path, text in reversed(self.files.items()) if f"/{path}".endswith(ending)), None)
        return None

    def write_file(self, shell: Shell, name: str, text: str | None, append: bool = False) -> None:
        """A file gets this text; None: nobody can know what it holds, or that it still exists."""
        path = shell.path(name)
        if path is None and shell.directory is None and name and UNKNOWN not in name:
            path = posixpath.normpath(name)
        if path is None or path in ("/dev/null", "/dev/stderr"):
            return
        if path in ("/dev/stdout", "/dev/tty"):
            self.write(text or "")
            return
        before = self.files.pop(path, "") if append else self.files.pop(path, None) and ""
        if text is not None:
            # What a file held before counts for nothing, as the content of any file that is not written here.
            whole = (before or "") + text
            self.files[path] = whole if len(whole) <= LONGEST else UNKNOWN

    # Scripts.

    def run_text(self, text: str, shell: Shell, stdin: Input | None = None) -> Status:
        """A script in a shell of its own: `exit` ends it, its EXIT trap comes last."""

        def body() -> Status:
            return self.run_inline(text, Scope(Script.empty(), shell, stdin))

        # A new process knows nothing of the loop or condition that its parent stands in.
        before = self._tested, self.loops
        self._tested = self.loops = 0
        try:
            return self._to_the_end(shell, body)
        finally:
            self._tested, self.loops = before

    def run_inline(self, text: str, scope: Scope) -> Status:
        """A script in the present shell: eval, source, an alias."""
        # Parsing costs more than walking, and code may be evaluated in a loop.
        self.spend(1 + len(text) // 8)
        script = parse(text)
        if script is None:
            self.found("dynamic" if UNKNOWN in text else "unparseable")
            return None
        self._enter()
        try:
            return self.statements(script.root.children, scope._replace(script=script))
        finally:
            self._depth -= 1

    def spend(self, amount: int) -> None:
        """Takes from the budget.

        Raises:
          EnoughFound: it is spent.
        """
        self._budget -= amount
        if self._budget < 0:
            self.found("dynamic")
            raise EnoughFound

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._depth -= 1
            self.found("unparseable")
            raise EnoughFound

    def _to_the_end(self, shell: Shell, body: Callable[[], Status]) -> Status:
        """A shell process until it ends, its EXIT trap included."""
        try:
            status = body()
        except Leave as leave:
            status = leave.status
        at_exit = shell.traps.pop("EXIT", None)
        if at_exit is not None:
            try:
                self.run_inline(at_exit, Scope(Script.empty(), shell, None))
            except Leave:
                pass
        return status

    def subshell(self, scope: Scope, body: Callable[[Scope], Status]) -> Status:
        """A body in a copy of the shell; what it changes stays there."""
        inner = scope.shell.copy()
        inner.traps = {}
        return self._to_the_end(inner, lambda: body(scope._replace(shell=inner)))

    def perhaps(self, scope: Scope, body: Callable[[], Status]) -> Status:
        """A body that may or may not be executed."""
        before = scope.shell.copy()
        written = self.written
        try:
            status = body()
        except Leave as leave:
            self.left(leave, scope)
            scope.shell.become(before)
            status = None
        else:
            scope.shell.merge(before)
        if self.written != written:
            self.write(PERHAPS)
        return status

    def left(self, leave: Leave, scope: Scope) -> None:
        """Where the shell perhaps ended, what it does at its end is perhaps executed now."""
        if leave.kind == "exit" and "EXIT" in scope.shell.traps:
            self._to_the_end(scope.shell, lambda: leave.status)

    def either(self, scope: Scope, bodies: Sequence[Callable[[], Status]]) -> Status:
        """Bodies of which one is executed, nobody knows which.

        Raises:
          Leave: each of them leaves.
        """
        before = scope.shell.copy()
        written = self.written
        ends: list[Shell] = []
        statuses: list[Status] = []
        left: Leave | None = None
        at_leaving = before
        for body in bodies:
            scope.shell.become(before)
            try:
                statuses.append(body())
            except Leave as leave:
                if left is not None:
                    self.left(left, scope)
                left = leave
                at_leaving = scope.shell.copy()
                continue
            ends.append(scope.shell.copy())
        if left is not None:
            scope.shell.become(at_leaving)
            if not ends:
                raise left
            self.left(left, scope)
        scope.shell.become(ends[0])
        for end in ends[1:]:
            scope.shell.merge(end)
        if self.written != written:
            self.write(PERHAPS)
        return statuses[0] if left is None and len(set(statuses)) == 1 else None

    # What expansion asks for (`words.Runner`).

    def substituted(self, nodes: list[Node], script: Script, shell: Shell) -> str:
        """Output of `$(...)`."""
        scope = Scope(script, shell, None)
        if len(nodes) == 1 and nodes[0].type == "file_redirect":
            # $(< file)
            with self._handlers.redirected(self, nodes, scope) as streams:
                return UNKNOWN if streams.stdin is None else streams.stdin.take()
        return self.captured(lambda: self.subshell(scope, lambda inner: self.statements(nodes, inner)))

    def substituted_text(self, text: str, shell: Shell) -> str:
        """Output of a script given as text."""
        return self.captured(
            lambda: self.subshell(Scope(Script.empty(), shell, None), lambda inner: self.run_inline(text, inner))
        )

    def piped_file(self, node: Node, script: Script, shell: Shell) -> str:
        """Runs a process substitution; the name of the file it stands for."""
        name = self.new_name("/dev/fd/")
        if text_of(node).startswith("<"):
            self.files[name] = self.substituted(node.named_children, script, shell)
        else:
            scope = Scope(script, shell, Input(UNKNOWN))
            self.subshell(scope, lambda inner: self.statements(node.named_children, inner))
        return name

    # Statements.

    def statements(self, nodes: Sequence[Node], scope: Scope) -> Status:
        """Statements one after the other; one before `&` runs in a subshell."""
        status: Status = True
        for node, after in zip_longest(nodes, nodes[1:]):
            if not node.is_named or node.type == "comment":
                continue
            if after is not None and after.type == "&":
                self.subshell(scope, lambda inner, node=node: self.statement(node, inner))
                status = True
                continue
            status = self.statement(node, scope)
            if status is False and not self._tested:
                self._failed(node, scope)
        return status

    def _failed(self, node: Node, scope: Scope) -> None:
        """What bash does when a statement nobody tests has failed for certain: the ERR trap, and `set -e`."""
        if node.type in ("negated_command", "list"):
            return
        trap = scope.shell.traps.pop("ERR", None)
        if trap is not None:
            self.run_inline(trap, scope)
            scope.shell.traps.setdefault("ERR", trap)
        if scope.shell.stops_at_errors:
            raise Leave("exit", status=False)

    def tested(self, body: Callable[[], Status]) -> Status:
        """A body whose failure is looked at: `set -e` and ERR leave it alone."""
        self._tested += 1
        try:
            return body()
        finally:
            self._tested -= 1

    def statement(self, node: Node, scope: Scope, redirects: Sequence[Node] = ()) -> Status:
        """One statement; `redirects` stand behind it in the text and belong to its last command."""
        self.spend(1)
        if node.type in _SIMPLE:
            return self._handlers.simple(self, node, scope, redirects)
        self._enter()
        try:
            return self._compound(node, scope, redirects)
        finally:
            self._depth -= 1

    def _compound(self, node: Node, scope: Scope, redirects: Sequence[Node]) -> Status:
        if node.type == "redirected_statement":
            body = node.child_by_field_name("body")
            # A here-string behind a construct has no field name.
            inner = [child for child in node.named_children if child.type.endswith("_redirect")]
            if body is not None:
                return self.statement(body, scope, [*inner, *redirects])
            return self._handlers.simple(self, node, scope, redirects)
        if node.type in ("list", "pipeline", "negated_command"):
            return self._handlers.chain(self, node, scope, redirects)
        if node.type == "function_definition":
            return self._define(node, scope)
        with self._handlers.redirected(self, redirects, scope) as streams:
            if streams.stdin is not None:
                scope = scope._replace(stdin=streams.stdin)
            return self._handlers.block(self, node, scope)

    def _define(self, node: Node, scope: Scope) -> Status:
        name = node.child_by_field_name("name")
        body = node.child_by_field_name("body")
        if name is not None and body is not None:
            text = "".join(text for text, _ in quoting.unquoted_pieces(text_of(name)))
            scope.shell.functions[text] = Function(body, scope.script)
        return True

    def loop(self, body: Callable[[], object]) -> bool:
        """One round of a loop's body; whether the loop goes on.

        Raises:
          Leave: it leaves more than this loop.
        """
        self.loops += 1
        try:
            body()
        except Leave as leave:
            if leave.kind not in ("break", "continue"):
                raise
            if leave.levels > 1 and self.loops > 1:
                raise Leave(leave.kind, leave.levels - 1) from leave
            return leave.kind == "continue"
        finally:
            self.loops -= 1
        return True

    def call(self, name: str, arguments: list[str], scope: Scope) -> Status:
        """A function of the shell; recursion ends after three calls."""
        function = scope.shell.functions[name]
        shell = scope.shell
        if shell.calls.count(name) > 2:
            return None
        before, shell.parameters = shell.parameters, arguments
        shell.saved.append({})
        shell.calls = (*shell.calls, name)
        try:
            return self.statement(function.body, scope._replace(script=function.script))
        except Leave as leave:
            if leave.kind != "return":
                raise
            return leave.status
        finally:
            shell.variables.update(shell.saved.pop() if shell.saved else {})
            shell.parameters = before
            shell.calls = shell.calls[:-1]

    def expander(self, scope: Scope) -> Expander:
        """Expansion of words that stand in this scope."""
        return Expander(self, scope.script, scope.shell)
