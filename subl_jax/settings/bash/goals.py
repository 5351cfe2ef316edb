"""Goal predicates as JSON-able data, and the shell tests that decide them inside the sandbox.

A condition is a mapping with a `check` and its operands; paths are relative to the home folder. Access is asked of the
kernel as the user concerned, with that user's groups, so modes, owners, groups and access lists all count and no command
is favoured. A task keeps its script for the demonstration in the same mapping; the predicate reads `conditions` only.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# What the tests need, defined once per script. `read` stops at the file's end (status 1) and never at a null byte or at
# the limit (status 0), so the whole file is compared without starting a process; a pipe or a link is no file here.
PRELUDE = r"""
holds() {
  [[ -f $1 && ! -L $1 ]] && ! IFS= read -r -d '' -n 8192 got < "$1" && [[ $got == "$2" ]]
}
packed() {
  [[ -f $1 && ! -L $1 ]] && [[ $(tar -tf "$1" 2>&1 | grep -v '/$' | sed 's|.*/||' | sort) == "$2" ]]
}
"""

_OPERATORS = {"r": "-r", "w": "-w", "x": "-x"}
ROOT = "root"


class Test(NamedTuple):
    """One condition as bash: the user who has to evaluate it and a command that succeeds where it holds."""

    user: str
    command: str


def allowed(user: str, path: str, needs: str) -> dict[str, Any]:
    """The user can do all of `needs` (letters of "rwx") with the file or folder at the path."""
    return {"check": "allowed", "user": user, "path": path, "needs": needs}


def denied(user: str, path: str, needs: str) -> dict[str, Any]:
    """The user can do none of `needs`, and something is still there."""
    return {"check": "denied", "user": user, "path": path, "needs": needs}


def mode(path: str, octal: str) -> dict[str, Any]:
    """The file's mode is this one, as an octal string."""
    return {"check": "mode", "path": path, "mode": octal}


def owner(path: str, user: str) -> dict[str, Any]:
    """The file belongs to this user."""
    return {"check": "owner", "path": path, "user": user}


def holds(path: str, content: str) -> dict[str, Any]:
    """A file at this path has exactly this content."""
    return {"check": "holds", "path": path, "content": content}


def kept(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every file of these world entries is where and what it was."""
    return [holds(entry["path"], entry["content"]) for entry in entries if entry["content"] is not None]


def absent(path: str) -> dict[str, Any]:
    """Nothing is at the path."""
    return {"check": "absent", "path": path}


def folder(path: str) -> dict[str, Any]:
    """A folder is at the path."""
    return {"check": "folder", "path": path}


def packed(path: str, names: Sequence[str]) -> dict[str, Any]:
    """A tar file at this path holds files of exactly these names."""
    return {"check": "packed", "path": path, "names": sorted(names)}


def answered(text: str) -> dict[str, Any]:
    """The final answer is this text, apart from case, spacing and a full stop at the end."""
    return {"check": "answered", "text": text}


def normalised(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces, no full stop at the end."""
    return " ".join(answer.casefold().split()).rstrip(".").rstrip()


def _test(condition: Mapping[str, Any], root: str) -> Test:
    path = shlex.quote(f"{root}/{condition['path']}")
    match condition["check"]:
        case "allowed":
            tests = " && ".join(f"{_OPERATORS[letter]} {path}" for letter in condition["needs"])
            return Test(condition["user"], f"[[ {tests} ]]")
        case "denied":
            tests = " || ".join(f"{_OPERATORS[letter]} {path}" for letter in condition["needs"])
            return Test(condition["user"], f"[[ -e {path} && ! ( {tests} ) ]]")
        case "mode":
            return Test(ROOT, f"[[ $(stat -c %a {path} 2>&1) == {shlex.quote(condition['mode'])} ]]")
        case "owner":
            return Test(ROOT, f"[[ $(stat -c %U {path} 2>&1) == {shlex.quote(condition['user'])} ]]")
        case "holds":
            return Test(ROOT, f"holds {path} {shlex.quote(condition['content'])}")
        case "absent":
            return Test(ROOT, f"[[ ! -e {path} && ! -L {path} ]]")
        case "folder":
            return Test(ROOT, f"[[ -d {path} && ! -L {path} ]]")
        case "packed":
            listed = "\n".join(name.rpartition("/")[2] for name in condition["names"])
            return Test(ROOT, f"packed {path} {shlex.quote(listed)}")
        case other:
            raise ValueError(f"unknown check {other!r} in a goal; subl_jax/settings/bash/goals.py lists the known ones")


def answer_met(goal: Mapping[str, Any], answer: str) -> bool:
    """Whether the conditions on the final answer hold; they need no sandbox."""
    wanted = [condition["text"] for condition in goal["conditions"] if condition["check"] == "answered"]
    return all(normalised(answer) == normalised(text) for text in wanted)


def scripts(goals: Iterable[tuple[Mapping[str, Any], str]]) -> dict[str, str]:
    """One bash script per user, which prints the number of each goal that is not met (once per failed condition).

    Args:
      goals: (goal, absolute folder of its world); the number of a goal is its place in this order.

    Returns:
      user -> script. A script that prints nothing but "end" found every condition of this user to hold; one that does
      not print "end" did not get there, which is no success.

    Raises:
      ValueError: a goal holds a check that does not exist.
    """
    lines: dict[str, list[str]] = {}
    for number, (goal, root) in enumerate(goals):
        for condition in goal["conditions"]:
            if condition["check"] == "answered":
                continue
            user, command = _test(condition, root)
            lines.setdefault(user, []).append(f"{command} || echo {number}")
    return {user: "\n".join([PRELUDE, *tests, "echo end"]) for user, tests in lines.items()}


def unmet(outputs: Iterable[str]) -> frozenset[int]:
    """The goals that are not met, from what the scripts printed.

    Raises:
      RuntimeError: a script was cut off before its end.
    """
    failed: set[int] = set()
    for output in outputs:
        *numbers, last = output.split() or [""]
        if last != "end":
            raise RuntimeError(f"a goal's script did not come to its end: {output[-200:]!r}")
        failed.update(map(int, numbers))
    return frozenset(failed)
