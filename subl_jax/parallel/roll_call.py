"""A roll call before JAX's own start, over the coordinator's port: who is there, on which host, and who is missing.

JAX's client aborts the process where another one does not come in time, and cannot say which. So process 0 first listens on
the port that its coordination service is about to take; the others say who they are; all get one answer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

# Seconds between two tries to reach process 0, and that an answer may be on its way.
_AGAIN_S = 0.2
_ON_THE_WAY_S = 5.0
# Seconds that a newcomer has for its name, while the others wait.
_LINE_S = 1.0
_LONGEST_LINE = 2**24


class RollCallError(RuntimeError):
    """Somebody is missing, or two say they are the same; one line with who."""


def roll_call(address: str, count: int, rank: int, timeout: float) -> list[str]:
    """Waits until all processes have said who they are.

    Args:
      address: host:port of process 0.
      count: how many there are; rank: which one this is.
      timeout: seconds to wait.

    Returns:
      The host of each process, by rank.

    Raises:
      RollCallError: processes are missing after that time, by rank; or a rank was claimed twice, with both hosts.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    if rank:
        return _answer(host.strip("[]"), int(port), rank, until, timeout)
    return _call(int(port), count, until, timeout)


def _call(port: int, count: int, until: float, timeout: float) -> list[str]:
    """Process 0: takes down who comes, and tells all of them how it ended."""
    hosts = {0: socket.gethostname()}
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            # Both kinds of addresses, as JAX's service has them, where the machine knows both.
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
        except OSError as error:
            raise RollCallError(f"process 0 cannot listen on port {port} ({error}); choose another one") from error
        stack.enter_context(listener)
        present: dict[int, socket.socket] = {}
        while len(hosts) < count and not problem:
            listener.settimeout(max(until - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(rank) for rank in range(count) if rank not in hosts)
                problem = f"process {missing} of {count} did not come within {timeout:g} s"
                break
            stack.enter_context(connection)
            said = _line(connection, _is_a_name, min(until, time.monotonic() + _LINE_S))
            if said is None or not 0 < said["rank"] < count:
                continue  # somebody else: a port scanner, a health check
            rank = said["rank"]
            if rank in present and not _gone(present[rank]):
                problem = f"{hosts[rank]} and {said['host']} both say they are process {rank}"
            hosts[rank], present[rank] = said["host"], connection
            if len(hosts) == count:
                # An answer to one that has gone meanwhile reaches nobody: it comes again, or is missing.
                for lost in [other for other, known in present.items() if other != rank and _gone(known)]:
                    del hosts[lost], present[lost]
        answer = {"problem": problem, "hosts": [hosts.get(rank, "") for rank in range(count)]}
        for connection in present.values():
            with contextlib.suppress(OSError):  # it has given up meanwhile
                connection.sendall(json.dumps(answer).encode() + b"\n")
    if problem:
        raise RollCallError(problem)
    return answer["hosts"]


def _answer(host: str, port: int, rank: int, until: float, timeout: float) -> list[str]:
    """Another process: says who it is as soon as process 0 listens, and waits for the answer."""
    cause: OSError | str = "no answer"
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=_ON_THE_WAY_S) as connection:
                connection.sendall(json.dumps({"rank": rank, "host": socket.gethostname()}).encode() + b"\n")
                answer = _line(connection, lambda said: {"problem", "hosts"} <= said.keys(), until + _ON_THE_WAY_S)
        except OSError as error:
            cause = error
            time.sleep(_AGAIN_S)
            continue
        if answer is None:
            time.sleep(_AGAIN_S)
            continue
        if answer["problem"]:
            raise RollCallError(answer["problem"])
        return answer["hosts"]
    raise RollCallError(f"process 0 did not answer at {host}:{port} within {timeout:g} s ({cause})")


def _is_a_name(said: dict[str, Any]) -> bool:
    return type(said.get("rank")) is int and isinstance(said.get("host"), str)


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has closed: a process that was started again, or lost its connection, comes a second time."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_ON_THE_WAY_S)


def _line(connection: socket.socket, fits: Callable[[dict[str, Any]], bool], until: float) -> dict[str, Any] | None:
    """One line of JSON with what is expected; None if the other side says something else, or is not done in time."""
    text = b""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        while not text.endswith(b"\n") and len(text) < _LONGEST_LINE:
            connection.settimeout(max(until - time.monotonic(), 0.001))
            part = connection.recv(65536)
            if not part:
                return None
            text += part
        said = json.loads(text)
        if isinstance(said, dict) and fits(said):
            return said
    return None
