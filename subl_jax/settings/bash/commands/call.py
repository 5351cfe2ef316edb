"""What the modules that execute words share: the command as they see it, and which names mean which program."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

from tree_sitter import Node

from subl_jax.settings.bash.commands.state import Shell
from subl_jax.settings.bash.commands.syntax import UNKNOWN
from subl_jax.settings.bash.commands.walk import Scope, Walk

PERMISSION_COMMANDS = frozenset({"chmod", "chown", "chgrp", "setfacl", "install"})
_SYSTEM = frozenset(
    {"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/bin", "/run/real"}
)
# Options of install whose value follows; of these m, o and g are what makes it a permission command.
_INSTALL_VALUES = "mogSt"


@dataclass(frozen=True)
class Command:
    """A command with its words expanded.

    Attributes:
      words: the name and the arguments.
      scope: where it stands.
      node: the node it comes from, for what depends on the place in the text.
      external: another program runs it, so neither functions nor builtins are meant.
      functions: whether functions are looked at (`command` leaves them out).
    """

    words: list[str]
    scope: Scope
    node: Node
    external: bool = False
    functions: bool = True


def opaque(walk: Walk) -> None:
    """A program nothing is known of: it writes something."""
    walk.write(UNKNOWN + "\n")


def resolved_name(name: str, shell: Shell) -> str | None:
    """The program a name without unknown parts stands for; None for a file outside the system's directories."""
    if "/" not in name:
        return name
    path = shell.path(name)
    if path is None:
        return None
    directory, base = posixpath.split(path)
    return base if directory in _SYSTEM else None


def sets_permissions(words: list[str]) -> bool:
    """Whether the arguments of install set a mode, an owner or a group."""
    at = 1
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            return False
        if word.startswith("--"):
            # An unambiguous beginning of a long option is as good as the whole.
            option = word[2:].partition("=")[0]
            if option and any(full.startswith(option) for full in ("mode", "owner", "group")):
                return True
            at += "=" not in word and option in ("target-directory", "suffix", "strip-program")
        elif word.startswith("-"):
            for index, letter in enumerate(word[1:], 1):
                if letter in "mog":
                    return True
                if letter in _INSTALL_VALUES:
                    at += index == len(word) - 1
                    break
    return False
