"""How a walk goes: exit statuses, and what ends a construct, or the walk itself, from within."""

from __future__ import annotations

# None where nobody knows it before the execution.
Status = bool | None


class EnoughFound(Exception):
    """As many events as were asked for, or the budget is spent."""


class Leave(Exception):
    """`exit`, `return`, `break` or `continue`, on its way to the construct that it ends."""

    def __init__(self, kind: str, levels: int = 1, status: Status = None):
        """Sets out.

        Args:
          kind: the builtin's name.
          levels: how many loops `break` and `continue` are meant for.
          status: the exit status that `exit` and `return` name.
        """
        super().__init__(kind)
        self.kind = kind
        self.levels = levels
        self.status = status
