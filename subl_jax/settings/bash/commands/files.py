"""Programs that move text between files and streams, as far as a script may execute that text later."""

from __future__ import annotations

import base64
import binascii
import posixpath
from collections.abc import Callable

from subl_jax.settings.bash.commands.call import PERMISSION_COMMANDS, Command
from subl_jax.settings.bash.commands.flow import Status
from subl_jax.settings.bash.commands.state import Input
from subl_jax.settings.bash.commands.syntax import UNKNOWN
from subl_jax.settings.bash.commands.walk import Walk

# Programs that write nothing to their standard output unless asked.
SILENT = frozenset(
    "mkdir touch rmdir ln sleep kill killall pkill chattr umount mount useradd usermod userdel groupadd groupmod groupdel "
    "gpasswd passwd adduser addgroup deluser delgroup unzip gzip gunzip truncate shred sync logger cmp split umask".split()
)


def _text(stdin: Input | None) -> str:
    """All of a standard input, unknown where nobody knows it."""
    return UNKNOWN + "\n" if stdin is None else stdin.take()


def _operands(words: list[str]) -> list[str]:
    return [word for word in words[1:] if not word.startswith("-") or word == "-"]


def _contents(walk: Walk, command: Command, names: list[str]) -> str:
    """The files of that name one after the other, the standard input for none and for `-`."""
    parts = []
    for name in names or ["-"]:
        if name in ("-", "/dev/stdin"):
            parts.append(_text(command.scope.stdin))
        else:
            text = walk.read_file(command.scope.shell, name)
            parts.append(UNKNOWN + "\n" if text is None else text)
    return "".join(parts)


def _cat(walk: Walk, command: Command) -> Status:
    changed = any(word.startswith("-") and word not in ("-", "-u", "--") for word in command.words[1:])
    text = _contents(walk, command, _operands(command.words))
    walk.write(UNKNOWN + "\n" if changed else text)
    return None if changed or _operands(command.words) else True


def _tee(walk: Walk, command: Command) -> Status:
    append = any(word.startswith("-") and "a" in word for word in command.words[1:])
    text = _text(command.scope.stdin)
    for name in _operands(command.words):
        walk.write_file(command.scope.shell, name, text, append)
    walk.write(text)
    return None


def _copy(walk: Walk, command: Command) -> Status:
    """cp, mv, install and ln of files the script wrote; into a directory where the last word ends in a slash."""
    names = _operands(command.words)
    if len(names) < 2:
        return None
    shell, target = command.scope.shell, names[-1]
    for name in names[:-1]:
        text = walk.read_file(shell, name)
        if text is None:
            continue
        base = posixpath.basename(name)
        if len(names) > 2 or target.endswith("/") or target in (".", ".."):
            walk.write_file(shell, posixpath.join(target, base), text)
        else:
            # The target may be a directory or the copy itself.
            walk.write_file(shell, posixpath.join(target, base), text)
            walk.write_file(shell, target, text)
        if command.words[0].endswith("mv"):
            walk.write_file(shell, name, None)
    return None


def _remove(walk: Walk, command: Command) -> Status:
    for name in _operands(command.words):
        walk.write_file(command.scope.shell, name, None)
    return None


def _mktemp(walk: Walk, command: Command) -> Status:
    # A name as good as the real one: what is written there is found there.
    walk.write(walk.new_name("/tmp/tmp.") + "\n")
    return None


def _base64(walk: Walk, command: Command) -> Status:
    decodes = any(word in ("-d", "-D", "--decode", "-di", "-id") for word in command.words[1:])
    text = _contents(walk, command, _operands(command.words))
    try:
        if UNKNOWN in text:
            raise ValueError(text)
        if decodes:
            text = base64.b64decode(text, validate=False).decode()
        else:
            text = base64.b64encode(text.encode()).decode() + "\n"
    except (binascii.Error, ValueError):
        text = UNKNOWN + "\n"
    walk.write(text)
    return None


def _first_lines(walk: Walk, command: Command) -> Status:
    """sort, head and the like keep lines; which ones is known where there is but one."""
    text = _contents(walk, command, []) if not _operands(command.words) else UNKNOWN + "\n"
    walk.write(text if text.count("\n") <= 1 and len(command.words) == 1 else UNKNOWN + "\n")
    return None


def _where(walk: Walk, command: Command) -> Status:
    """`which`: the permission commands are where they always are."""
    for name in _operands(command.words):
        walk.write(f"/usr/bin/{name}\n" if name in PERMISSION_COMMANDS else UNKNOWN + "\n")
    return None


FILE_COMMANDS: dict[str, Callable[[Walk, Command], Status]] = {
    "cat": _cat,
    "tee": _tee,
    "cp": _copy,
    "mv": _copy,
    "install": _copy,
    "ln": _copy,
    "rm": _remove,
    "unlink": _remove,
    "mktemp": _mktemp,
    "base64": _base64,
    "sort": _first_lines,
    "head": _first_lines,
    "tail": _first_lines,
    "uniq": _first_lines,
    "which": _where,
}
