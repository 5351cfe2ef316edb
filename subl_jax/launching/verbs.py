"""Launchers of several verbs, as `launch.gke submit ... -- python -m ...`: the verb is read, and its failure told in a line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from subl_jax.launching.command import LaunchError, given


def carried(
    argv: Sequence[str],
    verbs: Sequence[str],
    starting: Sequence[str],
    carry_out: Callable[[str, list[str] | None], None],
) -> None:
    """Reads the verb and carries it out; a launch that cannot be made is one message and exit code 1.

    Args:
      argv: as absl leaves it: the program's name, the verb, and what stands behind `--`.
      verbs: that there are; starting: those of them that take a command.
      carry_out: gets the verb, and the command or None.
    """
    verb = argv[1] if len(argv) > 1 else ""
    try:
        if verb not in verbs:
            near = difflib.get_close_matches(verb, verbs, 1)
            hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(verbs)}"
            raise LaunchError(f"{verb or 'nothing'} is no verb; {hint}")
        command = given(argv[1:]) if verb in starting else None
        if command is None and len(argv) > 2:
            raise LaunchError(f"unexpected arguments {argv[2:]}; only {' and '.join(starting)} take a command")
        carry_out(verb, command)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted here; what runs there goes on", file=sys.stderr)
        sys.exit(130)
