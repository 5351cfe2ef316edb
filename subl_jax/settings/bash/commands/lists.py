"""Commands joined by `&&`, `||`, `|` and `!`."""

from __future__ import annotations

from collections.abc import Sequence

from tree_sitter import Node

from subl_jax.settings.bash.commands.flow import Leave, Status
from subl_jax.settings.bash.commands.state import Input
from subl_jax.settings.bash.commands.syntax import text_of
from subl_jax.settings.bash.commands.walk import PERHAPS, Scope, Walk

# A command of a pipeline and the redirections behind it.
Stage = tuple[Node, Sequence[Node]]


def run_chain(walk: Walk, node: Node, scope: Scope, redirects: Sequence[Node]) -> Status:
    """A list, a pipeline or a negated command; the redirections behind it are its last command's."""
    if node.type == "list":
        return _list(walk, node, scope, redirects)
    if node.type == "pipeline":
        return _run_stages(walk, _stages(node, redirects), scope)
    status = walk.tested(lambda: walk.statement(node.named_children[-1], scope, redirects))
    return None if status is None else not status


def _list(walk: Walk, node: Node, scope: Scope, redirects: Sequence[Node], piped: Sequence[Stage] = ()) -> Status:
    """`a && b || c`, from the left; the grammar nests it to the left. `piped` reads its last command."""
    chain: list[tuple[str, Node]] = []
    while node.type == "list" and node.named_child_count >= 2:
        left, right = node.named_children[0], node.named_children[-1]
        operator = next(text_of(child) for child in node.children if not child.is_named)
        chain.append((operator, right))
        node = left
    # The shell as it is where what came before succeeded, and as it is where that failed; one of them if it is known.
    status = walk.tested(lambda: walk.statement(node, scope))
    ways = {way: scope.shell.copy() for way in (True, False) if status in (None, way)}
    for index, (operator, right) in enumerate(reversed(chain)):
        last = index == len(chain) - 1
        behind = redirects if last else ()

        def run(right: Node = right, behind: Sequence[Node] = behind, last: bool = last) -> Status:
            if last and piped:
                return _run_stages(walk, [*_stages(right, behind), *piped], scope)
            if last:
                return walk.statement(right, scope, behind)
            return walk.tested(lambda: walk.statement(right, scope, behind))

        needed = operator == "&&"
        if needed not in ways:
            continue
        scope.shell.become(ways.pop(needed))
        written = walk.written
        try:
            status = run()
        except Leave as leave:
            if not ways:
                raise
            walk.left(leave, scope)
            continue
        if ways and walk.written != written:
            walk.write(PERHAPS)
        for way in (True, False):
            if status is None or status is way:
                if way in ways:
                    ways[way].merge(scope.shell)
                else:
                    ways[way] = scope.shell.copy()
    (status, shell), *others = ways.items()
    for _, other in others:
        shell.merge(other)
    scope.shell.become(shell)
    return None if others else status


def _stages(node: Node, redirects: Sequence[Node]) -> list[Stage]:
    """The commands of a pipeline (one for any other statement), each with the redirections behind it."""
    if node.type != "pipeline":
        return [(node, redirects)]
    nodes = [stage for stage in node.named_children if stage.type != "comment"]
    return [(stage, redirects if stage == nodes[-1] else ()) for stage in nodes]


def _run_stages(walk: Walk, given: Sequence[Stage], scope: Scope) -> Status:
    """Stages from the left, each in a subshell, the output of one the input of the next."""
    first, behind_first = given[0]
    body = first.child_by_field_name("body") if first.type == "redirected_statement" else first
    if len(given) > 1 and body is not None and body.type == "list":
        # For the grammar `a && b < x | c` is a pipeline that begins with a list.
        own = [child for child in first.named_children if child.type.endswith("_redirect")]
        return _list(walk, body, scope, [*own, *behind_first], given[1:])
    stages = [stage for stage, _ in given]
    negated = stages[0].type == "negated_command"
    stdin = scope.stdin
    status: Status = None
    statuses: list[Status] = []
    for index, stage in enumerate(stages):
        last = index == len(stages) - 1
        if index == 0 and negated:
            stage = stage.named_children[-1]
        behind = given[index][1]
        inner = scope._replace(stdin=stdin)

        def run(stage: Node = stage, inner: Scope = inner, behind: Sequence[Node] = behind) -> Status:
            return walk.subshell(inner, lambda sub: walk.statement(stage, sub, behind))

        if last:
            status = run()
        else:
            stdin = Input(walk.captured(lambda run=run: statuses.append(run())))
    if scope.shell.pipe_fails and status is not False:
        status = False if False in statuses else None if None in statuses else status
    return (None if status is None else not status) if negated else status
