"""The first process of a pool: makes the keeper in namespaces of its own, and cleans up when host or keeper are gone.

It stays on the host's side as a watchdog. Whatever ends the framework's process, SIGKILL included, ends the keeper, which is
process 1 of a pid namespace, so the kernel then ends every process of every sandbox; the cgroups are removed after that.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import time
import traceback

from . import kernel
from .service import serve

_NAMESPACES = (
    kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
)


class _Refused(Exception):
    """A step of the start that the machine refused: (step, cause)."""


def main(descriptor: int) -> None:
    """Runs until the keeper or the host process ends. `descriptor`: a SOCK_SEQPACKET pair's end; the first message is the
    configuration, the answer {"ready": true} or {"step": ..., "error": ...}.
    """
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    config = json.loads(channel.recv(1 << 20))
    try:
        host = os.pidfd_open(config["host"])
    except ProcessLookupError:
        return
    if os.getppid() != config["host"]:
        return
    # Ctrl-C goes to the whole group; the host process decides when a pool ends.
    os.setsid()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kernel.adopt_orphans()
    keeper = None
    try:
        keeper = _make_keeper(channel, config)
        keeper_alive = os.pidfd_open(keeper)
        channel.close()
        select.select([host, keeper_alive], [], [])
    except _Refused as refused:
        step, cause = refused.args
        channel.send(json.dumps({"step": step, "error": str(cause)}).encode())
    finally:
        if keeper is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGKILL)
        _reap_all()
        _remove_cgroups(config["cgroups"])


def _make_keeper(channel: socket.socket, config: dict) -> int:
    """Forks a child that unshares, gives it its users, and lets it fork the keeper, which this process then adopts."""
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    maker = os.fork()
    if maker == 0:
        try:
            os.close(to_child)
            _unshare_and_fork(channel, config, from_parent, to_parent)
        finally:
            os._exit(1)
    os.close(to_parent)
    os.close(from_parent)
    reader = os.fdopen(from_child)
    with contextlib.closing(reader):
        try:
            _expect(reader, "unshare")
            _map_users(maker, config["ids"], config["mappers"])
            os.write(to_child, b"m")
            keeper = int(_expect(reader, "users"))
            os.waitpid(maker, 0)
        except _Refused:
            os.kill(maker, signal.SIGKILL)
            raise
    os.write(to_child, b"a")
    os.close(to_child)
    return keeper


def _expect(reader, step: str) -> str:
    line = reader.readline().strip()
    if not line or line.startswith("!"):
        raise _Refused(step, line[1:] or "the process ended")
    return line


def _unshare_and_fork(channel: socket.socket, config: dict, from_parent: int, to_parent: int) -> None:
    try:
        kernel.unshare(_NAMESPACES)
        os.write(to_parent, b"unshared\n")
        if os.read(from_parent, 1) != b"m":
            return
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        kernel.show_in_proc()
    except OSError as error:
        os.write(to_parent, f"!{error}\n".encode())
        return
    keeper = os.fork()
    if keeper == 0:
        try:
            os.close(to_parent)
            # Not before the maker is gone: the parent whose death counts is the starter.
            if os.read(from_parent, 1) == b"a":
                kernel.die_with_parent()
                serve(channel, config)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.write(to_parent, f"{keeper}\n".encode())
    os._exit(0)


def _map_users(pid: int, ids: dict[str, list[int]], mappers: dict[str, str] | None) -> None:
    """Writes the maps, directly as root, by newuidmap and newgidmap (`mappers`) otherwise."""
    for kind in ("uid", "gid"):
        first, count = ids[kind]
        try:
            if mappers:
                done = subprocess.run(
                    [mappers[kind], str(pid), "0", str(first), str(count)], capture_output=True, text=True, timeout=10
                )
                if done.returncode:
                    raise _Refused("map", done.stderr.strip())
            else:
                with open(f"/proc/{pid}/{kind}_map", "w", encoding="utf-8") as handle:
                    handle.write(f"0 {first} {count}")
        except OSError as error:
            raise _Refused("map", error) from error


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _remove_cgroups(bases: list[str]) -> None:
    for base in bases:
        for attempt in range(100):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(base):
                    if entry.is_dir(follow_symlinks=False):
                        with contextlib.suppress(OSError):
                            os.rmdir(entry.path)
            try:
                os.rmdir(base)
                break
            except FileNotFoundError:
                break
            except OSError:  # a process is still on its way out
                time.sleep(0.01 * min(attempt + 1, 5))
