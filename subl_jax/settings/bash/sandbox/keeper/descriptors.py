"""Descriptors that must not reach an agent: received closed on exec, and closed before anything is executed."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable

_FIRST_FREE = 3


def receive(channel: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which no executed program inherits (socket.recv_fds ignores its flags)."""
    space = socket.CMSG_LEN(most * array.array("i").itemsize)
    message, ancillary, _, _ = channel.recvmsg(size, space, socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received.frombytes(data[: len(data) - len(data) % received.itemsize])
    return message, list(received)


def close_all_but(keep: Iterable[int]) -> None:
    """Closes everything besides the standard streams and `keep`, whatever its flags."""
    start = _FIRST_FREE
    for descriptor in sorted(each for each in keep if each >= _FIRST_FREE):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, max(start, os.sysconf("SC_OPEN_MAX")))
