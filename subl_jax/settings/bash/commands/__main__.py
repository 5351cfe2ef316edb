"""`python -m subl_jax.settings.bash.commands`: lines in, each a command as a JSON string; a JSON object per line out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from subl_jax.settings.bash.commands import first_permission_command, permission_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 if a line was no JSON string, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m subl_jax.settings.bash.commands",
        description="Reads commands from standard input, one JSON string a line, and prints one JSON object a line: `first`, "
        "the first permission-related command (chmod, chown, chgrp, setfacl, install, other, dynamic, none, unparseable), or "
        "`error` where the line is no JSON string. Nothing is executed.",
    )
    parser.add_argument("--all", action="store_true", help="also `all`, the list of all of them in order of execution")
    every = parser.parse_args(arguments).all
    code = 0
    for number, line in enumerate(sys.stdin, 1):
        try:
            command = json.loads(line)
        except ValueError:
            command = None
        if not isinstance(command, str):
            answer: dict[str, object] = {"error": f"line {number} is no JSON string"}
            code = 1
        else:
            answer = {"first": first_permission_command(command)}
            if every:
                answer["all"] = permission_commands(command)
        print(json.dumps(answer), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
