"""Programs that run another program given in their arguments: where that program begins, or what its text is.

One table row per program, from its manual: the options that take a value, and how many words of its own come first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from subl_jax.settings.bash.commands.syntax import UNKNOWN

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")


@dataclass(frozen=True)
class Wrapper:
    """How the command behind a program's own options is found.

    Attributes:
      short: letters of short options that take a value.
      long: long options that take their value as the next word.
      operands: words of its own before the command (`timeout 5`).
      assigns: `NAME=value` words come before the command (env, sudo).
      looks: options with which nothing is executed (`command -v`).
      text: options whose value is shell code (`su -c`).
    """

    short: str = ""
    long: frozenset[str] = frozenset()
    operands: int = 0
    assigns: bool = False
    looks: frozenset[str] = frozenset()
    text: frozenset[str] = frozenset()


def _long(names: str) -> frozenset[str]:
    return frozenset(f"--{name}" for name in names.split())


_C = frozenset({"-c", "--command"})
_SU = Wrapper("cgGsuTw", _long("command group supp-group shell user whitelist-environment"), 0, False, frozenset(), _C)

WRAPPERS: dict[str, Wrapper] = {
    "sudo": Wrapper(
        "ugUCDhprtTRa",
        _long("user group other-user close-from chdir host prompt role type command-timeout chroot"),
        assigns=True,
        looks=frozenset({"-l", "-v", "-V", "-e", "-k", "-K", "--list", "--validate", "--version", "--edit"}),
    ),
    "doas": Wrapper("uCa", looks=frozenset({"-L"})),
    "env": Wrapper("uC", _long("unset chdir"), assigns=True),
    "nohup": Wrapper(),
    "setsid": Wrapper(),
    "time": Wrapper("fo", _long("format output")),
    "nice": Wrapper("n", _long("adjustment")),
    "ionice": Wrapper("cn", _long("class classdata"), looks=frozenset({"-p", "-P", "-u"})),
    "timeout": Wrapper("ks", _long("kill-after signal"), operands=1),
    "stdbuf": Wrapper("ioe", _long("input output error")),
    "chrt": Wrapper("TPD", _long("sched-runtime sched-period sched-deadline"), 1, looks=frozenset({"-p", "-m"})),
    "taskset": Wrapper("", operands=1, looks=frozenset({"-p"})),
    "chroot": Wrapper("", _long("userspec groups"), operands=1),
    "flock": Wrapper("wEc", _long("timeout conflict-exit-code command"), operands=1, text=_C),
    "unshare": Wrapper("SGRw", _long("setuid setgid root wd propagation")),
    "nsenter": Wrapper("tSG", _long("target setuid setgid")),
    "setpriv": Wrapper(
        "", _long("reuid regid ruid euid rgid egid groups inh-caps ambient-caps bounding-set securebits pdeathsig")
    ),
    "prlimit": Wrapper("", looks=frozenset({"-p", "--pid"})),
    "capsh": Wrapper("", looks=frozenset({"--print"})),
    "fakeroot": Wrapper("lsibf", _long("lib faked")),
    "gosu": Wrapper("", operands=1),
    "su-exec": Wrapper("", operands=1),
    "strace": Wrapper("abeEIoOpPsSuUX", looks=frozenset({"-p"})),
    "ltrace": Wrapper("aeFlnopsuxAD", looks=frozenset({"-p"})),
    "unbuffer": Wrapper(),
    "dbus-run-session": Wrapper("", _long("config-file dbus-daemon")),
    "busybox": Wrapper(),
    "toybox": Wrapper(),
    "su": _SU,
    "runuser": _SU,
    "sg": Wrapper("c", operands=1, text=_C),
    "script": Wrapper("cIOBTEmo", _long("command log-in log-out log-io log-timing"), text=_C),
    "watch": Wrapper("nqs", _long("interval equexit")),
    "parallel": Wrapper(
        "jIaPSNnLsd", _long("jobs arg-file max-args delay timeout retries colsep joblog sshlogin workdir")
    ),
    "xargs": Wrapper(
        "adEeIiLlnPs", _long("arg-file delimiter max-lines max-args max-procs max-chars process-slot-var")
    ),
    "command": Wrapper("", looks=frozenset({"-v", "-V"})),
    "builtin": Wrapper(),
    "exec": Wrapper("a"),
}
# -i, -e and -l of xargs take a value only when it is attached.
_ATTACHED_ONLY = {"xargs": "iel"}


class Unwrapped(NamedTuple):
    """What a wrapper runs.

    Attributes:
      words: the command and its arguments; empty where there is none.
      assignments: `NAME=value` words before it.
      text: shell code that it runs instead, or None.
      options: the wrapper's own options with their values.
    """

    words: list[str]
    assignments: list[str] = []
    text: str | None = None
    options: dict[str, str] = {}


def unwrap(name: str, words: list[str]) -> Unwrapped | None:
    """The command in a wrapper's arguments.

    Args:
      name: a key of `WRAPPERS`.
      words: the wrapper with its arguments, expanded.

    Returns:
      What it runs; None where it only looks or the command cannot be told from an unknown option.
    """
    wrapper = WRAPPERS[name]
    options, at = _options(name, wrapper, words)
    if wrapper.looks & options.keys():
        return None
    for option in wrapper.text & options.keys():
        return Unwrapped([], [], options[option], options)
    rest = words[at:]
    if name == "env" and (split := options.get("-S", options.get("--split-string"))) is not None:
        rest = split.split() + rest
    assignments = []
    while wrapper.assigns and rest and _ASSIGNMENT.match(rest[0]):
        assignments.append(rest.pop(0))
    if name in ("su", "runuser"):
        return Unwrapped(rest if "-u" in options or "--user" in options else [], [], None, options)
    rest = rest[wrapper.operands :]
    if wrapper.text and rest and (rest[0] in wrapper.text) and len(rest) > 1:
        # flock FILE -c CODE and sg GROUP -c CODE.
        return Unwrapped([], [], rest[1], options)
    if name == "sg":
        return Unwrapped([], [], rest[0] if rest else None, options)
    if name == "script":
        return Unwrapped([], [], None, options)
    if name == "watch" and not {"-x", "--exec"} & options.keys():
        return Unwrapped([], [], " ".join(rest) or None, options)
    return Unwrapped(rest, assignments, None, options)


def _options(name: str, wrapper: Wrapper, words: list[str]) -> tuple[dict[str, str], int]:
    """The options before the first operand, and where that stands; su takes them behind its operand too."""
    options: dict[str, str] = {}
    at = 1
    while at < len(words):
        word = words[at]
        if word == "--":
            return options, at + 1
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            takes = option in wrapper.long and not equals
            if name == "env" and option == "--split-string" and not equals:
                takes = True
            options[option] = words[at + 1] if takes and at + 1 < len(words) else value
            at += 2 if takes else 1
        elif word.startswith("-") and (len(word) > 1 or name in ("env", "su")):
            at += _cluster(name, wrapper, words, at, options)
        elif name == "su" or (name == "script" and at + 1 < len(words)):
            at += 1
        else:
            break
    return options, at


def _cluster(name: str, wrapper: Wrapper, words: list[str], at: int, options: dict[str, str]) -> int:
    """Reads `-xyz VALUE` into `options`; how many words it took."""
    word = words[at]
    if name == "nice" and re.fullmatch(r"-\d+", word):
        return 1
    short = wrapper.short + ("S" if name == "env" else "")
    for index, letter in enumerate(word[1:], 1):
        option = f"-{letter}"
        value = word[index + 1 :]
        options[option] = value
        if letter in _ATTACHED_ONLY.get(name, ""):
            return 1
        if letter in short:
            if value:
                return 1
            options[option] = words[at + 1] if at + 1 < len(words) else ""
            return 2
    return 1


def find_commands(words: list[str]) -> list[list[str]]:
    """The commands of `find ... -exec cmd {} ;`, in order, with `{}` unknown."""
    commands = []
    at = 1
    while at < len(words):
        if words[at] in ("-exec", "-execdir", "-ok", "-okdir"):
            end = at + 1
            while end < len(words) and words[end] != ";" and not (words[end] == "+" and words[end - 1] == "{}"):
                end += 1
            # Without its end find refuses to start.
            if end < len(words):
                commands.append([word.replace("{}", UNKNOWN) for word in words[at + 1 : end]])
            at = end
        at += 1
    return commands


@dataclass
class ShellCall:
    """What `bash [options] [-c CODE] [FILE] [arguments]` executes; `code` and `file` None means standard input."""

    code: str | None = None
    file: str | None = None
    parameters: list[str] = field(default_factory=list)
    executes: bool = True
    flags: str = ""
    zero: str | None = None


def shell_call(words: list[str]) -> ShellCall:
    """Reads the arguments of a shell, sh to zsh."""
    flags, at = "", 1
    while at < len(words) and words[at][:1] in "-+" and len(words[at]) > 1:
        word = words[at]
        at += 1
        if word == "--":
            break
        if word.startswith("--"):
            if word in ("--help", "--version"):
                return ShellCall(executes=False)
            at += word in ("--rcfile", "--init-file")
            continue
        flags += word[1:]
        at += sum(word.count(letter) for letter in "oO")
        if "o" in word and "noexec" in words[at - 1 : at]:
            return ShellCall(executes=False)
    if at < len(words) and words[at] == "-":
        at += 1
    rest = words[at:]
    executes = "n" not in flags
    if "c" in flags:
        return ShellCall(rest[0] if rest else "", None, rest[2:], executes, flags, "".join(rest[1:2]) or None)
    if rest and "s" not in flags:
        return ShellCall(None, rest[0], rest[1:], executes, flags, rest[0])
    return ShellCall(None, None, rest, executes, flags)
