"""Writing a world of files inside a sandbox, as sandbox root, by plain system calls: no process per file."""

from __future__ import annotations

import os
import shutil
import subprocess

# 2024-01-01 00:00 UTC; entry n gets n + 1 minutes more, so `ls -lt` and find answer the same every time.
_EPOCH = 1_704_067_200
_WRITABLE = ("/home", "/tmp")
SETFACL = "/run/real/setfacl"


def build(entries: list[dict], users: dict[str, int], groups: dict[str, int], home: str, fresh: bool) -> None:
    """Makes `entries` in order; with `fresh`, removes everything that stands in the writable places first.

    An entry: path, content (None for a directory), owner, group, mode, acl. Missing parents belong to the agent.
    """
    os.umask(0)
    agent = (users["agent"], groups["agent"])
    if fresh:
        _clear(home, agent)
    made: list[str] = [home]
    for entry in entries:
        path = entry["path"]
        _parents(path, agent, made)
        if entry["content"] is None:
            if not os.path.isdir(path):
                os.mkdir(path)
        else:
            with open(path, "w", encoding="utf-8") as handle:
                handle.write(entry["content"])
        made.append(path)
    for entry in entries:
        os.chown(entry["path"], users[entry["owner"]], groups[entry["group"]])
        os.chmod(entry["path"], entry["mode"])
    for acl, paths in _by_acl(entries).items():
        subprocess.run([SETFACL, "-m", ",".join(acl), "--", *paths], check=True)
    # Last, and deepest last changed first: writing into a directory changes its time.
    for place, path in enumerate(dict.fromkeys(made)):
        seconds = _EPOCH + 60 * place
        os.utime(path, (seconds, seconds))


def _parents(path: str, agent: tuple[int, int], made: list[str]) -> None:
    missing = []
    parent = os.path.dirname(path)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    for directory in reversed(missing):
        os.mkdir(directory, 0o755)
        os.chown(directory, *agent)
        made.append(directory)


def _by_acl(entries: list[dict]) -> dict[tuple[str, ...], list[str]]:
    grouped: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        if entry["acl"]:
            grouped.setdefault(tuple(entry["acl"]), []).append(entry["path"])
    return grouped


def _clear(home: str, agent: tuple[int, int]) -> None:
    for top in _WRITABLE:
        for entry in os.scandir(top):
            if entry.path == home and entry.is_dir(follow_symlinks=False):
                continue  # the shell stands in it
            _remove(entry.path)
    os.makedirs(home, exist_ok=True)
    for entry in os.scandir(home):
        _remove(entry.path)
    os.chown(home, *agent)
    os.chmod(home, 0o755)
    for name in os.listxattr(home):
        os.removexattr(home, name)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
