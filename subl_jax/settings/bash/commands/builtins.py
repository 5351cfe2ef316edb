"""The builtins of the shell that decide what is executed later, or whether anything is."""

from __future__ import annotations

import re
from collections.abc import Callable

from subl_jax.settings.bash.commands import quoting
from subl_jax.settings.bash.commands.arithmetic import evaluate
from subl_jax.settings.bash.commands.call import PERMISSION_COMMANDS, Command, opaque
from subl_jax.settings.bash.commands.conditions import known_test_of_words
from subl_jax.settings.bash.commands.flow import Leave, Status
from subl_jax.settings.bash.commands.state import Alias
from subl_jax.settings.bash.commands.syntax import UNKNOWN
from subl_jax.settings.bash.commands.walk import Walk

_NAME = re.compile(r"[A-Za-z_]\w*")
_SIGNALS = {"0": "EXIT", "SIGEXIT": "EXIT"}


def _true(walk: Walk, command: Command) -> Status:
    return True


def _false(walk: Walk, command: Command) -> Status:
    return False


def _nothing(walk: Walk, command: Command) -> Status:
    return None


def _says_something(walk: Walk, command: Command) -> Status:
    opaque(walk)
    return None


def _echo(walk: Walk, command: Command) -> Status:
    walk.write(quoting.echoed(command.words[1:]))
    return True


def _printf(walk: Walk, command: Command) -> Status:
    words = command.words[1:]
    if len(words) > 2 and words[0] == "-v":
        command.scope.shell.assign(words[1], quoting.printed(words[2:]))
    else:
        walk.write(quoting.printed(words))
    return True


def _test(walk: Walk, command: Command) -> Status:
    words = command.words[1:]
    if command.words[0] == "[":
        words = words[:-1]
    return known_test_of_words(words)


# The directory.


def _cd(walk: Walk, command: Command) -> Status:
    shell = command.scope.shell
    names = [word for word in command.words[1:] if word in ("-",) or not re.fullmatch(r"-[LPe@]+|--", word)]
    if not names:
        shell.directory = "~"
    elif names[0] == "-":
        shell.directory = None
    else:
        shell.directory = shell.path(names[0])
    return None


def _pushd(walk: Walk, command: Command) -> Status:
    shell = command.scope.shell
    before = shell.directory
    names = [word for word in command.words[1:] if not re.fullmatch(r"[-+]\d+|-n|--", word)]
    shell.directory = shell.path(names[0]) if names else None
    shell.stack.append(before)
    opaque(walk)
    return None


def _popd(walk: Walk, command: Command) -> Status:
    shell = command.scope.shell
    shell.directory = shell.stack.pop() if shell.stack else None
    opaque(walk)
    return None


# Code.


def _eval(walk: Walk, command: Command) -> Status:
    words = command.words[2:] if command.words[1:2] == ["--"] else command.words[1:]
    text = " ".join(words)
    return walk.run_inline(text, command.scope) if text.strip() else True


def _source(walk: Walk, command: Command) -> Status:
    words = command.words[2:] if command.words[1:2] == ["--"] else command.words[1:]
    if not words:
        return False
    shell = command.scope.shell
    if words[0] in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"):
        stdin = command.scope.stdin
        text = None if stdin is None or stdin.foreign else stdin.take()
    else:
        text = walk.read_file(shell, words[0])
    if text is None:
        return None
    before, calls = shell.parameters, shell.calls
    shell.calls = (*calls, ".")
    if words[1:]:
        shell.parameters = words[1:]
    try:
        return walk.run_inline(text, command.scope)
    except Leave as leave:
        if leave.kind != "return":
            raise
        return leave.status
    finally:
        shell.calls = calls
        if words[1:]:
            shell.parameters = before


def _trap(walk: Walk, command: Command) -> Status:
    words = [word for word in command.words[1:] if word != "--"]
    if not words or words[0].startswith("-") and len(words[0]) > 1:
        return True
    code, signals = words[0], words[1:] or words[:1]
    for signal in signals:
        name = _SIGNALS.get(signal.upper(), signal.upper())
        if len(words) < 2 or code == "-":
            command.scope.shell.traps.pop(name, None)
        elif name in ("EXIT", "ERR", "RETURN"):
            command.scope.shell.traps[name] = code
        elif name == "DEBUG":
            # It runs before every command from here on; once is enough to know.
            walk.perhaps(command.scope, lambda: walk.run_inline(code, command.scope))
    return True


# Options, parameters, aliases.


def _set(walk: Walk, command: Command) -> Status:
    shell = command.scope.shell
    words = command.words[1:]
    if not words:
        opaque(walk)
    while words:
        word = words[0]
        if word in ("--", "-"):
            if word == "--" or words[1:]:
                shell.parameters = words[1:]
            return True
        if not re.fullmatch(r"[-+][A-Za-z]+", word):
            shell.parameters = words
            return True
        named = words[1] if "o" in word and len(words) > 1 else ""
        if "e" in word[1:] or named == "errexit":
            shell.stops_at_errors = word[0] == "-"
        if named == "pipefail":
            shell.pipe_fails = word[0] == "-"
        if word[0] == "-" and ("n" in word or named == "noexec"):
            # From here on nothing is executed.
            raise Leave("exit")
        words = words[2 if named else 1 :]
    return True


def _shift(walk: Walk, command: Command) -> Status:
    shell = command.scope.shell
    amount = command.words[1] if len(command.words) > 1 else "1"
    if shell.parameters is None or not amount.isdigit():
        shell.parameters = None
        return None
    if int(amount) > len(shell.parameters):
        return False
    shell.parameters = shell.parameters[int(amount) :]
    return True


def _shopt(walk: Walk, command: Command) -> Status:
    words = command.words[1:]
    if "expand_aliases" in words:
        if "-s" in words:
            command.scope.shell.expands_aliases = True
        elif "-u" in words:
            command.scope.shell.expands_aliases = False
    return None


def _alias(walk: Walk, command: Command) -> Status:
    top = command.node
    while top.parent is not None and top.parent.parent is not None:
        top = top.parent
    for word in command.words[1:]:
        name, equals, text = word.partition("=")
        if equals and name:
            command.scope.shell.aliases[name] = Alias(text, command.scope.script, top.end_point.row)
    return True


def _unalias(walk: Walk, command: Command) -> Status:
    for word in command.words[1:]:
        if word == "-a":
            command.scope.shell.aliases.clear()
        command.scope.shell.aliases.pop(word, None)
    return True


# Values.


def _read(walk: Walk, command: Command) -> Status:
    names: list[str] = []
    raw, plain, array = False, True, False
    at = 1
    while at < len(command.words):
        word = command.words[at]
        at += 1
        if not re.fullmatch(r"-[A-Za-z].*", word, re.DOTALL) or names:
            names.append(word)
            continue
        for index, letter in enumerate(word[1:], 1):
            raw |= letter == "r"
            array |= letter == "a"
            if letter in "adinNptu":
                plain &= letter in "ptai"
                value = word[index + 1 :]
                if not value:
                    value = "".join(command.words[at : at + 1])
                    at += 1
                names += [value] if letter == "a" else []
                break
    names = [name for name in names if _NAME.fullmatch(name)] or ["REPLY"]
    shell = command.scope.shell
    stdin = command.scope.stdin
    if stdin is None or stdin.foreign or not plain:
        for name in names:
            shell.assign(name, None)
        return None
    line, status = stdin.line()
    if not raw:
        line = re.sub(r"\\(.)", r"\1", line)
    separator = shell.variables.get("IFS")
    separator = separator if isinstance(separator, str) and separator.strip() and len(separator) == 1 else None
    if array:
        shell.assign(names[0], line.split(separator))
        return status
    if len(names) == 1:
        parts = [line if separator else line.strip(" \t")] if shell.variables.get("IFS") != "" else [line]
    else:
        parts = line.split(separator, len(names) - 1)
    for index, name in enumerate(names):
        shell.assign(name, parts[index] if index < len(parts) else UNKNOWN if UNKNOWN in line else "")
    return status


def _mapfile(walk: Walk, command: Command) -> Status:
    names = [word for word in command.words[1:] if _NAME.fullmatch(word)]
    stdin = command.scope.stdin
    text = None if stdin is None or stdin.foreign else stdin.take()
    known = text is not None and UNKNOWN not in text and set(command.words[1:]) <= {"-t", *names}
    values = text.rstrip("\n").split("\n") if text is not None and known else None
    command.scope.shell.assign(names[-1] if names else "MAPFILE", values)
    return None


def _let(walk: Walk, command: Command) -> Status:
    values = [evaluate(word, command.scope.shell) for word in command.words[1:]]
    return None if not values or values[-1] is None else values[-1] != 0


def _getopts(walk: Walk, command: Command) -> Status:
    """Every name among the words gets a value."""
    for word in command.words[1:]:
        for name in _NAME.findall(word):
            command.scope.shell.assign(name, None)
    return None


def _declare(walk: Walk, command: Command) -> Status:
    """`command export x=y`, `builtin local x=y`: declarations that the grammar does not see."""
    shell = command.scope.shell
    for word in command.words[1:]:
        name, equals, value = word.partition("=")
        if _NAME.fullmatch(name):
            if equals:
                shell.assign(name, value)
            if command.words[0] == "export":
                shell.exported.add(name)
    return True


def _unset(walk: Walk, command: Command) -> Status:
    for word in command.words[1:]:
        if word in command.scope.shell.functions and word not in command.scope.shell.variables:
            command.scope.shell.functions.pop(word)
        elif _NAME.fullmatch(word):
            command.scope.shell.variables[word] = ""
    return True


def _type(walk: Walk, command: Command) -> Status:
    """`type -p chmod`, `command -v chmod`: where the permission commands are is known."""
    paths = command.words[0] == "command" or {"-p", "-P"} & set(command.words)
    for word in command.words[1:]:
        if not word.startswith("-"):
            walk.write(f"/usr/bin/{word}\n" if paths and word in PERMISSION_COMMANDS else UNKNOWN + "\n")
    return None


# Ends.


def _leave(walk: Walk, command: Command) -> Status:
    kind = command.words[0]
    given = command.words[1] if len(command.words) > 1 else ""
    if kind in ("exit", "return", "logout"):
        if kind == "return" and not command.scope.shell.calls:
            # Outside a function bash complains and goes on.
            return False
        status = int(given) & 255 == 0 if re.fullmatch(r"\d{1,9}", given) else None
        raise Leave("return" if kind == "return" else "exit", status=status)
    if not walk.loops:
        return True
    raise Leave(kind, int(given) if re.fullmatch(r"[1-9]\d{0,3}", given) else 1)


# Programs of the same name exist for these.
PROGRAMS: dict[str, Callable[[Walk, Command], Status]] = {
    "true": _true,
    "false": _false,
    "echo": _echo,
    "printf": _printf,
    "test": _test,
    "[": _test,
    "pwd": _says_something,
    "kill": _nothing,
}
BUILTINS: dict[str, Callable[[Walk, Command], Status]] = {
    **PROGRAMS,
    ":": _true,
    "cd": _cd,
    "pushd": _pushd,
    "popd": _popd,
    "eval": _eval,
    "source": _source,
    ".": _source,
    "trap": _trap,
    "set": _set,
    "shift": _shift,
    "shopt": _shopt,
    "alias": _alias,
    "unalias": _unalias,
    "read": _read,
    "mapfile": _mapfile,
    "readarray": _mapfile,
    "let": _let,
    "getopts": _getopts,
    "type": _type,
    "unset": _unset,
    **dict.fromkeys(("export", "declare", "typeset", "local", "readonly"), _declare),
    **dict.fromkeys(("exit", "return", "break", "continue", "logout"), _leave),
    **dict.fromkeys(("dirs", "jobs", "history", "times", "help", "caller", "compgen", "ulimit"), _says_something),
    **dict.fromkeys(("wait", "umask", "hash", "bind", "complete", "compopt", "disown", "enable", "bg", "fg"), _nothing),
    "suspend": _nothing,
}
