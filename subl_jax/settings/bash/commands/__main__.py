"""`python -m subl_jax.settings.bash.commands`: lines in, each a command as a JSON string; an answer per line out."""

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
        description="Reads commands from standard input, one JSON string a line; prints the first permission-related "
        "command of each as one line of JSON.",
    )
    parser.add_argument("--all", action="store_true", help="print the list of all of them instead")
    every = parser.parse_args(arguments).all
    code = 0
    for number, line in enumerate(sys.stdin, 1):
        try:
            command = json.loads(line)
        except ValueError:
            command = None
        if not isinstance(command, str):
            print(f"line {number} is no JSON string", file=sys.stderr)
            code = 1
            continue
        print(json.dumps(permission_commands(command) if every else first_permission_command(command)), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
