"""The agent's persistent Bash: what is written to it, and what is read back from it.

Bash reads its script from a pipe, so its standard input stays free for the commands. Each command is an `eval` of the
quoted text in that script, then a record on the channel with its number and exit status. No output passes through a marker
in stdout, and a command that closes descriptors cannot cut the channel, which is opened by its path each time.
"""

from __future__ import annotations

import re
import shlex
from typing import Literal, NamedTuple

from subl_jax.settings.bash.sandbox.stand_ins import DONE, RECORD, UNIT, Attempt

Status = Literal["ok", "timeout", "exited", "killed", "broken"]

# The first line: closes the script's first descriptor (bash holds a copy of its own) and goes home.
OPENING = 'exec 9<&-; cd /home/agent; unset OLDPWD _; __status() { return "$1"; }\n'
# A function of one of these names would break the line below. Special builtins come before functions in POSIX mode, and an
# assignment alone switches that on, so nothing on this line can have been redefined.
_REPAIR = 'POSIXLY_CORRECT=; unset -f unset builtin eval printf __status; unset POSIXLY_CORRECT; __status() { return "$1"; }\n'
_NUMBERED = re.compile(r"^bash: (eval: )?line (\d+): ", re.MULTILINE)
_RISKY = re.compile(r"unset|builtin|eval|printf|__status|POSIXLY_CORRECT")


class Result(NamedTuple):
    """What one command did.

    status: "ok"; "exited", the shell itself ended; "timeout", its wall time ran out and all that it left was killed;
    "killed", a limit killed the shell; "broken", the sandbox is gone. code is the command's exit status, the shell's
    where that ended by itself, None otherwise. attempts: the permission commands that were called meanwhile.
    """

    stdout: str
    stderr: str
    code: int | None
    status: Status
    attempts: tuple[Attempt, ...]


def lines_for(command: str, number: str, last_code: int, repair: bool) -> tuple[str, str]:
    """The script lines that run `command`, and the text with which `set -x` would show them."""
    quoted = shlex.quote(command.replace("\0", ""))
    call = f"builtin eval {quoted}"
    # `$?` is the code of the command before; a condition, so that `set -e` does not mind.
    run = f"if __status {last_code}; then :; else {call}; fi" if last_code else call
    report = f"{{ builtin printf '{RECORD}{DONE}{UNIT}{number}{UNIT}%s{RECORD}' \"$?\" > /run/channel; }} 2>/dev/null"
    # The empty line: after an eval of an unfinished text, bash takes no reserved word until a line has ended.
    return f"{_REPAIR if repair else ''}{run}\n\n{report}\n", f"+ {call}\n"


def renumbered(errors: str, line: int) -> str:
    """The shell's messages as if the command stood at line 1; it stands at `line` of the script."""

    def one(found: re.Match[str]) -> str:
        number = int(found[2]) - line + 1
        return f"bash: line {number}: " if number > 0 else found[0]

    return _NUMBERED.sub(one, errors)


def redefines(command: str) -> bool:
    """Whether a command might redefine a word of the lines above."""
    return "(" in command and _RISKY.search(command) is not None


def done_code(record: str, number: str) -> int | None:
    """The exit status in a record of the channel that reports the end of command `number`; None for any other."""
    parts = record.split(UNIT)
    if len(parts) != 3 or parts[0] != DONE or parts[1] != number or not parts[2].isdigit():
        return None
    return int(parts[2])


class Stream:
    """The front of a stream, and how much more there was."""

    def __init__(self, limit: int):
        """Keeps `limit` bytes."""
        self._limit = limit
        self._kept = bytearray()
        self.seen = 0

    def add(self, data: bytes) -> None:
        """More of the stream."""
        self.seen += len(data)
        if len(self._kept) < self._limit:
            self._kept += data[: self._limit - len(self._kept)]

    def text(self, hidden: str = "") -> str:
        """The kept text, what was cut off said at its end; `hidden` is left out at the front."""
        text = self._kept.decode("utf-8", "replace")
        if hidden and text.startswith(hidden):
            text = text[len(hidden) :]
        more = self.seen - len(self._kept)
        if more:
            # A character that the cut split is no garbage of the command's.
            text = f"{text.removesuffix(chr(0xFFFD))}\n[truncated: {more} bytes more]\n"
        return text
