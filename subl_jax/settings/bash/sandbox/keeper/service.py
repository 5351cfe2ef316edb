"""The keeper: process 1 of the pool's pid namespace. It makes worlds and starts processes in them on request.

Requests and answers are JSON messages over a SOCK_SEQPACKET socket, descriptors beside them. Every started process has an
exit pipe, on which its wait status (4 bytes) arrives when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from . import building, descriptors, joining, kernel, memory, root
from .joining import Confinement, Program

_MESSAGE = 1 << 20
_DESCRIPTORS = 16
# The files of a slot's directory.
_PLACE = "/episodes/{slot}"
# What /proc tells of the machine rather than of the world: how it was started, its keys.
_HIDDEN = ("cmdline", "config.gz", "keys", "key-users")
_DISK = "mode=755,size={bytes},nr_inodes={inodes}"


@dataclass
class Slot:
    """The reusable part of a sandbox: its own user and network namespace and its cgroups; and the world in it, if any."""

    user: int
    network: int
    cgroups: list[int]
    inspection_cgroups: list[int]
    first: int | None = None  # pidfd of the sandbox's process 1
    first_pid: int = 0
    holds: list[int] = field(default_factory=list)  # kept open while the world stands

    def standing(self) -> int:
        """The pidfd of process 1.

        Raises:
          ProcessLookupError: there is no world in the slot.
        """
        if self.first is None:
            raise ProcessLookupError("the world is gone")
        return self.first


class Keeper:
    """Slots, and the processes whose end somebody waits for."""

    def __init__(self, config: dict):
        """Builds the root, after which nothing of the host is in reach."""
        root.build(config["etc"], config["local_commands"], config["stand_ins"], config["shell_script"])
        self._config = config
        self._filter = bytes.fromhex(config["filter"])
        self._slots: dict[int, Slot] = {}
        self._exits: dict[int, int] = {}
        self._own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self._filter_file = os.memfd_create("filter")
        os.write(self._filter_file, self._filter)

    @property
    def worlds(self) -> list[int]:
        """The number of process 1 of every world that stands."""
        return [slot.first_pid for slot in self._slots.values() if slot.first is not None]

    # Requests: each returns its answer and the descriptors to send, which are closed here afterwards.

    def slot(self, slot: int, agent_cgroups: int, descriptors: list[int] | tuple[()] = ()) -> tuple[dict, list[int]]:
        """A user and a network namespace for slot number `slot`; descriptors: cgroup.procs files, the agent's first."""
        here, there = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            try:
                here.close()  # or it would wait for itself
                kernel.unshare(kernel.NEWUSER)
                there.send(b"u")
                there.recv(1)
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
                closed = b"1" if _refuse_nested_users() else b"0"
                kernel.unshare(kernel.NEWNET)
                there.send(closed)
                there.recv(1)
            finally:
                os._exit(0)
        there.close()
        here.recv(1)
        count = self._config["ids"]
        for kind in ("uid", "gid"):
            with open(f"/proc/{pid}/{kind}_map", "w", encoding="utf-8") as handle:
                handle.write(f"0 0 {count[kind][1]}")
        here.send(b"m")
        nested_closed = here.recv(1)
        if not nested_closed:
            raise OSError("the namespaces of a sandbox could not be made")
        user, network = (os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net"))
        here.close()
        self._slots[slot] = Slot(user, network, [*descriptors[:agent_cgroups]], [*descriptors[agent_cgroups:]])
        return {"nested_closed": nested_closed == b"1"}, []

    def world(self, slot: int, disk: int, inodes: int, uid: int, gid: int) -> tuple[dict, list[int]]:
        """A fresh world in a slot: its disk, its channel, and bubblewrap around a process that holds it open.

        Returns descriptors: channel, bubblewrap's info, holder's echo (a byte arrives when the world stands), exit.
        """
        there = self._slots[slot]
        place = _PLACE.format(slot=slot)
        for directory in (place, f"{place}/disk"):
            os.makedirs(directory, exist_ok=True)
        kernel.mount(
            "disk",
            f"{place}/disk",
            "tmpfs",
            kernel.MS_NOSUID | kernel.MS_NODEV,
            _DISK.format(bytes=disk, inodes=inodes),
        )
        os.makedirs(f"{place}/disk/home/agent")
        os.chown(f"{place}/disk/home/agent", uid, gid)
        os.mkdir(f"{place}/disk/tmp")
        os.chmod(f"{place}/disk/tmp", 0o1777)
        # Anybody may append to the channel and nobody inside read it: it lies on a read-only mount, so no chmod helps.
        os.mkfifo(f"{place}/channel")
        os.chmod(f"{place}/channel", 0o222)
        channel = os.open(f"{place}/channel", os.O_RDWR | os.O_NONBLOCK)
        info, info_there = os.pipe()
        echo, echo_there = os.pipe()
        feed, feed_here = os.pipe()
        errors, errors_there = os.pipe()
        argv = self._bubblewrap(place, info_there)
        pid = os.fork()
        if pid == 0:
            try:
                for cgroup in there.cgroups:
                    os.write(cgroup, b"0")
                kernel.setns(there.user, kernel.NEWUSER)
                kernel.setns(there.network, kernel.NEWNET)
                os.dup2(feed, 0)
                os.dup2(echo_there, 1)
                os.dup2(errors_there, 2)
                os.set_inheritable(info_there, True)
                filter_copy = os.open(f"/proc/self/fd/{self._filter_file}", os.O_RDONLY)
                os.set_inheritable(filter_copy, True)
                argv[1:1] = ["--seccomp", str(filter_copy)]
                descriptors.close_all_but((info_there, filter_copy))
                os.execve(self._config["bubblewrap"], argv, {})
            except BaseException as error:  # the child must not return into the loop
                os.write(2, f"{error}\n".encode())
            finally:
                os._exit(125)
        for descriptor in (info_there, echo_there, feed, errors_there):
            os.close(descriptor)
        os.write(feed_here, b"\n")
        there.holds.append(feed_here)
        return {"pid": pid}, [channel, info, echo, errors, self._exit_pipe(pid)]

    def shell(self, slot: int, first: int, program: dict) -> tuple[dict, list[int]]:
        """The agent's shell, in the world whose process 1 has the number `first` here.

        Returns descriptors: script (write), stdout, stderr, exit.
        """
        there = self._slots[slot]
        there.first_pid, there.first = first, os.pidfd_open(first)
        script_there, script = os.pipe()
        return self._start(there, there.cgroups, program, {9: script_there}, [script], [script_there])

    def inspect(self, slot: int, program: dict) -> tuple[dict, list[int]]:
        """One of our programs in the world. Returns descriptors: stdout, stderr, exit."""
        there = self._slots[slot]
        return self._start(there, there.inspection_cgroups, program, {}, [], [])

    def build(self, slot: int, fresh: bool, users: dict, groups: dict, home: str, descriptors: list[int]):
        """Writes the entries that stand as JSON in the file given. Returns descriptors: stderr, exit."""
        there = self._slots[slot]
        errors, errors_there = os.pipe()
        with os.fdopen(descriptors[0], "rb") as handle:
            handle.seek(0)
            entries = json.loads(handle.read())

        def child() -> None:
            os.dup2(errors_there, 2)
            joining.enter(there.standing())
            building.build(entries, users, groups, home, fresh)
            os._exit(0)

        pid = self._fork(there, there.inspection_cgroups, child)
        os.close(errors_there)
        return {"pid": pid}, [errors, self._exit_pipe(pid)]

    def kill(self, slot: int, uid: int) -> tuple[dict, list[int]]:
        """Kills every process of user `uid` in the world at once. Returns descriptors: exit (of the killer)."""
        there = self._slots[slot]

        def child() -> None:
            joining.enter(there.standing())
            os.setresuid(uid, uid, uid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # spares the caller and process 1
            os._exit(0)

        pid = self._fork(there, there.inspection_cgroups, child)
        return {}, [self._exit_pipe(pid)]

    def stop(self, pid: int) -> tuple[dict, list[int]]:
        """Kills a process that was started here, and its group."""
        if pid in self._exits:  # not reaped yet, so the number is still its own
            for victim in (-pid, pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        return {}, []

    def end(self, slot: int, pid: int) -> tuple[dict, list[int]]:
        """Ends the world: its processes, its disk, its channel. The exit pipe of `world` says when it is done."""
        there = self._slots[slot]
        if there.first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(there.first, signal.SIGKILL)
            os.close(there.first)
            there.first = None
        self.stop(pid)
        for descriptor in there.holds:
            os.close(descriptor)
        there.holds.clear()
        place = _PLACE.format(slot=slot)
        with contextlib.suppress(OSError):
            kernel.detach(f"{place}/disk")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{place}/channel")
        return {}, []

    # Helpers.

    def _bubblewrap(self, place: str, info: int) -> list[str]:
        binds = ["--ro-bind", root.WORLD, "/", "--bind", f"{place}/disk/home", "/home"]
        binds += ["--bind", f"{place}/disk/tmp", "/tmp", "--ro-bind", f"{place}/channel", root.CHANNEL]
        walls = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
        walls += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--info-fd", str(info)]
        places = ["--proc", "/proc", "--remount-ro", "/proc"]
        for name in _HIDDEN:
            if os.path.exists(f"/proc/{name}"):
                places += ["--ro-bind", root.EMPTY, f"/proc/{name}"]
        places += ["--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/dev/pts", "--chdir", "/"]
        # cat holds the world open for as long as its input is, and its first byte back says that the world stands.
        return ["bwrap", *binds, *walls, *places, "--", "/usr/bin/cat"]

    def _start(
        self, there: Slot, cgroups: list[int], program: dict, files: dict, give: list[int], close: list[int]
    ) -> tuple[dict, list[int]]:
        out, out_there = os.pipe()
        err, err_there = os.pipe()
        for descriptor in (out_there, err_there, *files.values()):
            # So that `echo > /dev/stderr`, which opens the pipe anew, works for its user.
            os.fchown(descriptor, program["user"], program["group"])
        settings = Confinement(
            {int(kind): value for kind, value in self._config["rlimits"].items()},
            self._filter,
            self._config["last_capability"],
        )
        wanted = Program(**program, files={1: out_there, 2: err_there, **files})

        def child() -> None:
            os.dup2(err_there, 2)
            joining.enter(there.standing())
            joining.execute(wanted, settings)

        pid = self._fork(there, cgroups, child)
        for descriptor in (out_there, err_there, *close):
            os.close(descriptor)
        return {"pid": pid}, [*give, out, err, self._exit_pipe(pid)]

    def _fork(self, there: Slot, cgroups: list[int], child: Callable[[], None]) -> int:
        return joining.fork_into(there.standing(), self._own_pids, cgroups, child)

    def _exit_pipe(self, pid: int) -> int:
        reader, self._exits[pid] = os.pipe()
        return reader

    def reap(self) -> None:
        """Passes on the wait statuses of what has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            writer = self._exits.pop(pid, None)
            if writer is not None:
                with contextlib.suppress(BrokenPipeError):
                    os.write(writer, struct.pack("=i", status))
                os.close(writer)


def _refuse_nested_users() -> bool:
    """Allows no user namespace below this one; False where /proc/sys is read-only and only the filter refuses them."""
    try:
        with open("/proc/sys/user/max_user_namespaces", "w", encoding="utf-8") as handle:
            handle.write("0")
        return True
    except OSError:
        return False


def serve(channel: socket.socket, config: dict) -> None:
    """Answers requests until the host process closes its end."""
    try:
        keeper = Keeper(config)
    except OSError as error:
        channel.send(json.dumps({"step": "root", "error": str(error)}).encode())
        return
    wake, wake_there = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wake_there, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_there)
    channel.send(b'{"ready": true}')
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    poll.register(wake, select.POLLIN)
    look_ms = 1000 * memory.LOOK_S if config["memory"] else None
    while True:
        ready = poll.poll(look_ms if keeper.worlds else None)
        if look_ms:
            memory.end_the_greedy(config["memory"], keeper.worlds)
        for descriptor, _ in ready:
            if descriptor == wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
                keeper.reap()
            else:
                try:
                    if not _answer(keeper, channel):
                        return
                except ConnectionError:  # the host process has ended between two messages
                    return


def _answer(keeper: Keeper, channel: socket.socket) -> bool:
    """Answers one request; False where the host process has closed its end."""
    message, received = descriptors.receive(channel, _MESSAGE, _DESCRIPTORS)
    if not message:
        return False
    request = json.loads(message)
    number = request.pop("number")
    if received:
        request["descriptors"] = received
    give: list[int] = []
    try:
        answer, give = getattr(keeper, request.pop("do"))(**request)
    except Exception as error:  # one request that fails must not end the other sandboxes
        answer = {"error": f"{type(error).__name__}: {error}"}
    socket.send_fds(channel, [json.dumps({**answer, "number": number}).encode()], give)
    for descriptor in give:
        os.close(descriptor)
    return True
