"""A command whose words are known: which one it is, and what it executes in turn."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Callable
from dataclasses import replace

from subl_jax.settings.bash.commands.builtins import BUILTINS, PROGRAMS
from subl_jax.settings.bash.commands.call import PERMISSION_COMMANDS, Command, opaque, resolved_name, sets_permissions
from subl_jax.settings.bash.commands.files import FILE_COMMANDS, SILENT
from subl_jax.settings.bash.commands.flow import Leave, Status
from subl_jax.settings.bash.commands.interpreters import Language, changes_permissions, interpreter_call, language_of
from subl_jax.settings.bash.commands.state import Input
from subl_jax.settings.bash.commands.syntax import UNKNOWN
from subl_jax.settings.bash.commands.walk import ROUNDS, Walk
from subl_jax.settings.bash.commands.wrappers import WRAPPERS, Unwrapped, find_commands, shell_call, unwrap

# What may have made a file executable.
_OPENING = frozenset({"chmod", "setfacl", "install", "other", "dynamic"})
SHELLS = frozenset({"bash", "sh", "dash", "ash", "zsh", "ksh", "mksh", "rbash"})
_ALIASES_ON = frozenset({"sh", "dash", "ash", "ksh", "mksh", "zsh"})
_STDIN = frozenset({"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
_SHEBANG = re.compile(r"#![ \t]*(\S+)(?:[ \t]+(?:-S[ \t]+)?(\S+))?")


def run_words(walk: Walk, command: Command) -> Status:
    """Executes a command.

    Args:
      walk: the walk that hears of it.
      command: its words, expanded, at least one.

    Returns:
      Its exit status, None where nobody knows it.
    """
    walk.spend(1)
    name = command.words[0]
    shell = command.scope.shell
    if not command.external and command.functions and name in shell.functions:
        return walk.call(name, command.words[1:], command.scope)
    if UNKNOWN in name:
        return _unknown(walk, command)
    if not command.external:
        if name in ("command", "builtin", "exec"):
            return _prefixed(walk, command)
        if name in BUILTINS:
            return BUILTINS[name](walk, command)
    program = resolved_name(name, shell)
    if program is None:
        return _file(walk, command)
    return _program(walk, replace(command, words=[program, *command.words[1:]]))


def _unknown(walk: Walk, command: Command) -> Status:
    """A name with unknown parts. A file in some directory is a program like any other; any other name may be anything."""
    name = command.words[0]
    base = posixpath.basename(name)
    known_base = UNKNOWN not in base and base not in PERMISSION_COMMANDS and base != ""
    relative = "/" in name and not name.startswith(("/", UNKNOWN)) and not walk.files
    if known_base or relative:
        return _file(walk, command)
    walk.found("dynamic")
    opaque(walk)
    return None


def _program(walk: Walk, command: Command) -> Status:
    """A program of the system."""
    name, *arguments = command.words
    if name in PERMISSION_COMMANDS and (name != "install" or sets_permissions(command.words)):
        walk.found(name)
    if name in PROGRAMS:
        return PROGRAMS[name](walk, command)
    if name in FILE_COMMANDS:
        return FILE_COMMANDS[name](walk, command)
    if name in PERMISSION_COMMANDS:
        return None
    if name in ("command", "builtin", "exec"):
        return False
    if name in WRAPPERS:
        return _wrapper(walk, command)
    if name in SHELLS:
        return _shell(walk, command)
    if name == "find":
        for words in find_commands(command.words):
            if words:
                run_words(walk, replace(command, words=words, external=True))
    elif (language := language_of(name)) is not None:
        _interpreter(walk, command, language)
    if name not in SILENT:
        opaque(walk)
    return None


# Files that are executed.


def _file(walk: Walk, command: Command) -> Status:
    """`./x`: what the script wrote there, once somebody has made it executable."""
    text = walk.read_file(command.scope.shell, command.words[0])
    if text is None:
        opaque(walk)
        return None
    if not _OPENING.intersection(walk.events):
        # A new file cannot be executed before a permission command has let it.
        return None
    found = _SHEBANG.match(text)
    program = posixpath.basename(found[1]) if found else "sh"
    if found and program == "env":
        program = found[2] or ""
    language = language_of(program)
    if language is not None:
        return _judge(walk, language, text)
    if program not in SHELLS:
        return None
    child = command.scope.shell.child()
    child.parameters = command.words[1:]
    return walk.run_text(text, child, command.scope.stdin)


def _shell(walk: Walk, command: Command) -> Status:
    """Bash and its kin: code, a file, or the standard input."""
    call = shell_call(command.words)
    if not call.executes:
        return None
    scope = command.scope
    child = scope.shell.child()
    child.parameters = call.parameters
    child.zero = call.zero
    child.expands_aliases = command.words[0] in _ALIASES_ON or "i" in call.flags
    child.stops_at_errors = "e" in call.flags
    if call.code is not None:
        return walk.run_text(call.code, child, scope.stdin)
    if call.file is not None and call.file not in _STDIN:
        text = walk.read_file(scope.shell, call.file)
        if text is not None:
            return walk.run_text(text, child, scope.stdin)
        if UNKNOWN in posixpath.basename(call.file) and walk.files:
            # It may be one of those the script wrote.
            walk.found("dynamic")
        opaque(walk)
        return None
    return _from_stdin(walk, command, lambda text: walk.run_text(text, child))


def _from_stdin(walk: Walk, command: Command, action: Callable[[str], Status]) -> Status:
    """What a text on the standard input makes an interpreter do; a file from elsewhere, or a terminal, tells nothing."""
    stdin = command.scope.stdin
    if stdin is None or stdin.foreign:
        opaque(walk)
        return None
    return action(stdin.take())


def _interpreter(walk: Walk, command: Command, language: Language) -> Status:
    call = interpreter_call(language, command.words)
    if not call.executes:
        return None
    if call.code is not None:
        return _judge(walk, language, call.code)
    if call.file is not None and call.file not in _STDIN:
        text = walk.read_file(command.scope.shell, call.file)
        return None if text is None else _judge(walk, language, text)
    stdin = command.scope.stdin
    if stdin is not None and not stdin.foreign:
        return _judge(walk, language, stdin.take())
    return None


def _judge(walk: Walk, language: Language, code: str) -> Status:
    changes = changes_permissions(language, code)
    if changes:
        walk.found("other")
    elif changes is None:
        walk.found("dynamic")
    return None


# Programs that run other programs.


def _prefixed(walk: Walk, command: Command) -> Status:
    """command, builtin, exec: in this shell, unlike the other wrappers."""
    name = command.words[0]
    inner = unwrap(name, command.words)
    if inner is None:
        return BUILTINS["type"](walk, command)
    if not inner.words:
        return True
    if name == "command":
        return run_words(walk, replace(command, words=inner.words, functions=False))
    if name == "builtin":
        if inner.words[0] in ("command", "builtin", "exec"):
            return _prefixed(walk, replace(command, words=inner.words))
        known = inner.words[0] in BUILTINS
        return BUILTINS[inner.words[0]](walk, replace(command, words=inner.words)) if known else False
    status = run_words(walk, replace(command, words=inner.words, external=True))
    raise Leave("exit", status=status)


def _wrapper(walk: Walk, command: Command) -> Status:
    name = command.words[0]
    inner = unwrap(name, command.words)
    if inner is None:
        opaque(walk)
        return None
    scope = command.scope
    if inner.text is not None:
        return walk.run_text(inner.text, scope.shell.child(), scope.stdin)
    if name == "xargs":
        return _xargs(walk, command, inner)
    if name == "parallel":
        return _parallel(walk, command, inner)
    if not inner.words:
        shell_wanted = name == "su" or {"-s", "-i", "--shell", "--login"} & inner.options.keys()
        if name in ("su", "sudo", "doas") and shell_wanted or name in ("unshare", "chroot", "nsenter", "fakeroot"):
            child = scope.shell.child()
            return _from_stdin(walk, command, lambda text: walk.run_text(text, child))
        opaque(walk)
        return None
    if inner.assignments:
        shell = scope.shell.copy()
        for assignment in inner.assignments:
            variable, _, value = assignment.partition("=")
            shell.assign(variable, value)
            shell.exported.add(variable)
        scope = scope._replace(shell=shell)
    return run_words(walk, replace(command, words=inner.words, scope=scope, external=True))


def _xargs(walk: Walk, command: Command, inner: Unwrapped) -> Status:
    """The words that come from the standard input stand behind the command, or where -I says."""
    options = inner.options
    words = inner.words or ["echo"]
    stdin = command.scope.stdin
    file = options.get("-a", options.get("--arg-file"))
    if file is not None:
        text = walk.read_file(command.scope.shell, file)
    else:
        text = None if stdin is None or stdin.foreign else stdin.take()
    mark = options.get("-I") or options.get("-i") or options.get("--replace")
    if mark is None and {"-i", "--replace"} & options.keys() or mark == "":
        mark = "{}"
    groups = _groups(text, mark is not None, options)
    if not groups:
        # Without a word xargs runs the command once, unless told otherwise.
        groups = [] if mark or {"-r", "--no-run-if-empty"} & options.keys() else [[]]
    scope = command.scope._replace(stdin=Input(""))
    for group in groups[:ROUNDS]:
        run = [word.replace(mark, group[0]) for word in words] if mark else words + group
        run_words(walk, replace(command, words=run, scope=scope, external=True))
    return None


def _groups(text: str | None, by_line: bool, options: dict[str, str]) -> list[list[str]]:
    """The words of each call that xargs makes."""
    if text is None:
        return [[UNKNOWN]]
    delimiter = options.get("-d", options.get("--delimiter"))
    if {"-0", "--null"} & options.keys():
        return [[text]] if text else []
    if delimiter is not None or by_line:
        split = {"\\n": "\n", "\\t": "\t", None: "\n", "": "\n"}.get(delimiter, delimiter or "\n")
        items = [item.strip() if by_line else item for item in text.split(split) if item.strip()]
    else:
        try:
            items = shlex.split(text)
        except ValueError:
            items = text.split()
    number = options.get("-n") or options.get("--max-args") or options.get("-L") or options.get("--max-lines") or ""
    size = 1 if by_line else int(number) if re.fullmatch(r"[1-9]\d{0,5}", number) else len(items) or 1
    return [items[at : at + size] for at in range(0, len(items), size)]


def _parallel(walk: Walk, command: Command, inner: Unwrapped) -> Status:
    """GNU parallel: its words are one text for a shell, `{}` in it an argument."""
    cut = next((at for at, word in enumerate(inner.words) if word.startswith(":::")), len(inner.words))
    text = " ".join(inner.words[:cut])
    if text:
        return walk.run_text(re.sub(r"\{[./%]*\}", UNKNOWN, text), command.scope.shell.child(), Input(""))
    return _from_stdin(walk, command, lambda code: walk.run_text(code, command.scope.shell.child()))
