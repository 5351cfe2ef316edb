"""The keeper's own root: a tmpfs with the host's /usr, /dev and a few files of /etc, and in /world what a sandbox sees.

Built once per pool; the host's file tree is then detached, so that neither the keeper nor anything it starts can reach it.
"""

from __future__ import annotations

import os
import shutil

from . import kernel

# The base of the new root. It exists everywhere, and bubblewrap needs a directory of this name as well.
_BASE = "/tmp"
_SYSTEM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Debian's awk, editor, ... are links through here; the cache only makes the loader fast.
_SHARED_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d")
WORLD = "/world"
CHANNEL = "/run/channel"
# An empty file, laid over what /proc would tell of this machine.
EMPTY = "/empty"


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.lexists(target):
        write(target, "", 0o444)
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)


def write(path: str, text: str, mode: int) -> None:
    """A file of the template; parents are made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(path, mode)


def build(etc: dict[str, str], local_commands: dict[str, str], stand_ins: dict[str, str], shell_script: str) -> None:
    """Makes the root and moves into it.

    etc: file name -> text; local_commands: the whole of /usr/local/bin; stand_ins: command -> text laid over the real
    one, which moves to /run/real; shell_script: what /run/shell/bash points to, the agent shell's script.
    """
    os.umask(0o022)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("keeper", _BASE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=64m")
    for name in ("usr", "dev", "proc", "tmp", "host", "episodes", "world"):
        os.mkdir(f"{_BASE}/{name}", 0o755)
    _bind("/usr", f"{_BASE}/usr")
    _bind("/dev", f"{_BASE}/dev")
    kernel.mount("proc", f"{_BASE}/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
    _system_directories(_BASE, "")
    write(_BASE + EMPTY, "", 0o444)
    world = _BASE + WORLD
    for name in ("etc", "home", "tmp", "proc", "dev", "run/real", "run/shell"):
        os.makedirs(f"{world}/{name}", exist_ok=True)
    _bind("/usr", f"{world}/usr")
    _system_directories(world, "")
    for name in _SHARED_ETC:
        if os.path.exists(f"/etc/{name}"):
            _bind(f"/etc/{name}", f"{world}/etc/{name}")
    for name, text in etc.items():
        write(f"{world}/etc/{name}", text, 0o444)
    write(world + CHANNEL, "", 0o444)
    os.symlink(shell_script, f"{world}/run/shell/bash")
    _local(world, local_commands)
    _stand_ins(world, stand_ins)
    kernel.pivot_root(_BASE, f"{_BASE}/host")
    os.chdir("/")
    kernel.detach("/host")
    os.rmdir("/host")
    # bubblewrap builds its sandboxes on a directory of this name.
    kernel.mount("bwrap", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")


def _system_directories(root: str, host: str) -> None:
    for name in _SYSTEM_DIRECTORIES:
        path = f"{host}/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), f"{root}/{name}")
        elif os.path.isdir(path):
            _bind(path, f"{root}/{name}")


def _local(world: str, commands: dict[str, str]) -> None:
    """Replaces /usr/local, which belongs to the host's administrator and differs between machines."""
    local = f"{_BASE}/local"
    os.makedirs(f"{local}/bin")
    for name, text in commands.items():
        write(f"{local}/bin/{name}", text, 0o555)
    if os.path.isdir(f"{world}/usr/local"):
        _bind(local, f"{world}/usr/local")


# One program that is many, chmod among them, and none of them recorded.
_MULTIPLE = ("busybox", "toybox")


def _stand_ins(world: str, stand_ins: dict[str, str]) -> None:
    for name, text in stand_ins.items():
        real = shutil.which(name, path="/usr/bin:/bin")
        if real is None:
            raise FileNotFoundError(f"{name}: not in /usr/bin or /bin")
        _bind(real, f"{world}/run/real/{name}")
        stand_in = f"{_BASE}/stand_ins/{name}"
        write(stand_in, text, 0o555)
        places = {path for path in (f"{world}/usr/bin/{name}", f"{world}/bin/{name}") if os.path.exists(path)}
        for place in sorted({os.path.realpath(path) for path in places}):
            kernel.mount(stand_in, place, None, kernel.MS_BIND)
    for name in _MULTIPLE:
        for place in {
            os.path.realpath(f"{world}/{folder}/{name}") for folder in ("usr/bin", "bin", "usr/sbin", "sbin")
        }:
            if os.path.exists(place):
                kernel.mount(f"{_BASE}{EMPTY}", place, None, kernel.MS_BIND)
