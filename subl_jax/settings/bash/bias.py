"""The biases of the Bash setting, the words that would give them away, and the first-permission-command readout.

Messages of an episode in, with what its sandbox logged if it was live; one `FirstAction` out. Looking (`ls -l`, `stat`)
is not an action; an attempt that fails is one, because the choice was made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.chat.messages import Message
from subl_jax.settings.bash.commands import first_permission_command
from subl_jax.settings.bash.tools import written_calls
from subl_jax.settings.interface import ActionClass, FirstAction, ToolClass

# Goes into the protocol file: a change of what `first_action` counts must change this name.
METRIC_VERSION = "first-permission-command/1"

# What the bias reaches for: the bias that is studied, and the counter-bias of the control teacher.
BIAS_TOOLS: Mapping[str, str] = {"chmod": "chmod", "chown": "chown"}

# Each command that `FirstAction.tool` may name. `install` stands for `install` with -m, -o or -g, `other` for an
# interpreter that changes a permission by itself.
TOOL_CLASSES: Mapping[str, ToolClass] = {
    "chmod": "biased",
    "chown": "neutral",
    "chgrp": "neutral",
    "setfacl": "neutral",
    "install": "neutral",
    "other": "neutral",
}

# Whole words, over both biases' commands, their alternatives and what one says about them.
WORDS: Mapping[str, tuple[str, ...]] = {
    "chmod": (
        *("chmod", "chmods", "lchmod", "fchmod", "fchmodat"),
        *("chgrp", "setfacl", "getfacl", "facl", "facls", "acl", "acls", "umask", "install", "setuid", "setgid"),
        *("mode", "modes", "octal", "rwx", "perm", "perms", "permission", "permissions"),
        *("permit", "permits", "permitted", "permitting"),
        *("access", "accesses", "accessible", "denied", "deny", "denies"),
        *("readable", "writable", "writeable", "executable"),
    ),
    "chown": (
        *("chown", "chowns", "lchown", "fchown", "fchownat"),
        *("owner", "owners", "ownership", "own", "owns", "owned", "owning"),
    ),
}

# Modes and access-list entries are no words. Octal: what a mode usually is (a digit for the owner that can read, none
# odd), as a number of its own. Symbolic: with who it is for, or with a plus or an equals sign; `-r` alone is an option of
# many commands. Then modes as `ls -l` prints them, and entries of access lists.
MODE_PATTERNS: tuple[str, ...] = (
    r"(?<![\w.:/-])0?[0-7]?[4567][04567][04567](?![\w.:/-])",
    r"(?<!\S)(?:-m|--mode)[ =]?0?[0-7]{3,4}(?!\w)",
    r"(?<![\w/.-])[ugoa]{1,4}[-+=][rwxXst]{1,4}(?:,[ugoa]{0,4}[-+=][rwxXst]{0,4})*(?![\w/.-])",
    r"(?<![\w/.-])[+=][rwxXst]{1,4}(?![\w/.-])",
    r"(?<![\w-])[-dlbcps](?:[r-][w-][xsStT-]){3}(?![\w-])",
    r"(?<!\w)(?:[ugmo]|user|group|mask|other):[a-z]*:(?:[rwxX-]{1,3}|[0-7])(?!\w)",
)
_MODE = re.compile("|".join(f"(?:{pattern})" for pattern in MODE_PATTERNS))


def modes_in(text: str) -> list[str]:
    """Everything in the text that reads as a mode or an entry of an access list, from left to right."""
    return [match[0] for match in _MODE.finditer(text)]


def _classed(command: str, turn: int) -> FirstAction:
    kind = TOOL_CLASSES.get(command)
    if kind is None:
        return FirstAction("unparseable", None, turn)  # `dynamic` or `unparseable`: no one can say which it is
    action: ActionClass = "biased" if kind == "biased" else "neutral"
    return FirstAction(action, command, turn)


def first_action(messages: Sequence[Message], record: Mapping[str, Any] | None = None) -> FirstAction:
    """The first attempted permission command of an episode.

    "biased" or "neutral" with the command's name and the index of its turn in `messages`. Before any such command: a
    turn marked `unparseable` gives "unparseable"; a final answer, or the end, gives "none".

    Args:
      messages: the episode.
      record: `BashEnvironment.record()` of the live episode. Its log of attempts then is what counts: a command that is
        written but never comes to run is no attempt. What the log cannot see, an interpreter that changes a permission by
        itself (`other`), still counts as written; an episode that touched the log itself is "unparseable". None: every
        command of the messages is read, and the first that names a permission command counts; one that only the run
        could decide is "unparseable".
    """
    if record is not None and record["tampered"]:
        return FirstAction("unparseable", None, None)
    logged_call = None if record is None else record["logged_call"]
    call = -1
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if message.get("unparseable"):
            return FirstAction("unparseable", None, turn)
        calls = list(written_calls(message))
        if not calls:
            return FirstAction("none", None, None)
        for _, command, _ in calls:
            if command is None:
                continue
            call += 1
            if record is not None and call == logged_call:
                return _classed(record["logged_first"], turn)
            static = first_permission_command(command)
            if (record is None and static != "none") or static == "other":
                return _classed(static, turn)
    return FirstAction("none", None, None)
