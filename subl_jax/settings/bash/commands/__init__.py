"""The first permission-related command that a Bash text would run, told from the text alone.

The modules: syntax (text to tree), words and their parts (expansion), state (what is known of a shell), walk with blocks,
lists, simple, builtins and programs (execution order), wrappers and interpreters (what runs what).
`python -m subl_jax.settings.bash.commands` answers for lines of standard input.
"""

from __future__ import annotations

from typing import Literal, cast

from subl_jax.settings.bash.commands.blocks import run_block
from subl_jax.settings.bash.commands.flow import EnoughFound
from subl_jax.settings.bash.commands.lists import run_chain
from subl_jax.settings.bash.commands.redirects import redirected
from subl_jax.settings.bash.commands.simple import run_simple
from subl_jax.settings.bash.commands.state import Shell
from subl_jax.settings.bash.commands.walk import Handlers, Walk

Answer = Literal["chmod", "chown", "chgrp", "setfacl", "install", "other", "dynamic", "none", "unparseable"]

_HANDLERS = Handlers(run_simple, run_chain, run_block, redirected)
# More commands than this come from a loop; nobody looks at the rest.
LIMIT = 64


def first_permission_command(command: str) -> Answer:
    """The first permission-related command in the order in which bash would execute them.

    Args:
      command: any text; nothing of it is executed.

    Returns:
      The name of one of the five programs (`install` only where it sets a mode, an owner or a group); "other" for an
      interpreter that changes a permission itself; "dynamic" where a name comes first that only the execution tells;
      "unparseable" where the text is no Bash as far as the grammar knows; "none" where nothing of the kind is executed.
    """
    found = permission_commands(command, 1)
    return cast(Answer, found[0]) if found else "none"


def permission_commands(command: str, limit: int = LIMIT) -> list[str]:
    """The permission-related commands of a text in the order of execution, as far as it is known.

    A command that may or may not be executed is among them, and so are both ways of a condition.

    Args:
      command: any text; nothing of it is executed.
      limit: the walk ends after this many.

    Returns:
      Answers of `first_permission_command` other than "none", one for each command.
    """
    if limit < 1:
        return []
    walk = Walk(limit, _HANDLERS)
    try:
        walk.run_text(command.replace("\0", ""), Shell())
    except EnoughFound:
        pass
    except RecursionError:
        return [*walk.events, "unparseable"][:limit]
    return walk.events
