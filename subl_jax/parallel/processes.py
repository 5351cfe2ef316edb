"""A run on several processes: how they find each other, refuse to be unlike each other, wait, and end together.

`start` comes before any use of JAX. What processes tell each other besides their arrays (barriers, counts, one's decision)
goes through the coordination service and runs nothing on a device, so that a wait can say for whom it waits. Of one process
everything here is immediate.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags, logging
from jax._src import clusters, distributed  # what JAX finds out of a cluster, and its client, have no public names

from subl_jax.parallel import contract, roll_call

# Seconds of waiting after which it is said for whom.
_PATIENCE = 30
# What process 0 leaves the others to read its answers in, before its service is gone.
_LAST_WORDS_S = 1.0
# How long processes that were asked to stop wait for one another.
_STOPPING_S = 10.0
# A wait at a barrier ends by itself: one that is dead is found by its missing heartbeats, long before.
_LONGEST = 24 * 3600

_numbers: Iterator[int] = itertools.count()
_hosts: list[str] = []


class ProcessError(RuntimeError):
    """Processes that cannot run together; one line with who, what and the remedy."""


class PeerLost(ProcessError):
    """Another process did not come, or does not answer any more: the run may be started again."""


def define_flags() -> None:
    """Flags that say who this process is, where neither a launcher's environment nor a cluster does."""
    flags.DEFINE_string(
        "coordinator", None,
        "host:port of process 0, for a run of several processes. Launchers, Slurm and TPU pods say it by themselves.",
    )  # fmt: skip
    flags.DEFINE_integer("num_processes", None, "Processes of the run, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "start_timeout_s", None,
        f"Seconds that processes wait for one another at the start ({contract.DEFAULT_START_TIMEOUT}).", lower_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer(
        "heartbeat_timeout_s", None,
        "Seconds without a sign of life after which a process is taken for dead and the others end "
        f"({contract.DEFAULT_HEARTBEAT_TIMEOUT}).", lower_bound=10,
    )  # fmt: skip


def _asked(flag: str, variable: str) -> str | None:
    """A flag's value, or else that of the environment."""
    value = flags.FLAGS[flag].value if flag in flags.FLAGS else None
    return str(value) if value is not None else os.environ.get(variable)


def _seconds(flag: str, variable: str, default: int) -> int:
    value = flags.FLAGS[flag].value if flag in flags.FLAGS else None
    try:
        return contract.seconds(variable, default) if value is None else value
    except ValueError as error:
        raise ProcessError(str(error)) from None


def identity() -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`; empty: JAX finds them itself (Slurm, TPU pods).

    Raises:
      ProcessError: some of coordinator, number and id are given, others not; or they are no such numbers.
    """
    names = {
        "coordinator_address": ("coordinator", contract.COORDINATOR),
        "num_processes": ("num_processes", contract.NUM_PROCESSES),
        "process_id": ("process_id", contract.PROCESS_ID),
    }
    found = {name: _asked(*where) for name, where in names.items()}
    missing = [f"--{names[name][0]} (or {names[name][1]})" for name, value in found.items() if value is None]
    if len(missing) == len(names):
        return {}
    if missing:
        raise ProcessError(f"{' and '.join(missing)} is not given; a run of several processes needs all three, or none")
    try:
        count, own = int(found["num_processes"] or ""), int(found["process_id"] or "")
    except ValueError:
        raise ProcessError(
            f"num_processes={found['num_processes']} and process_id={found['process_id']} must be integers"
        ) from None
    if not 0 <= own < count:
        raise ProcessError(f"process_id={own} is outside 0 to {count - 1}, the ids of {count} processes")
    if not re.fullmatch(r".+:\d+", found["coordinator_address"] or ""):
        raise ProcessError(f"coordinator {found['coordinator_address']!r} is no host:port")
    return {"coordinator_address": found["coordinator_address"], "num_processes": count, "process_id": own}


def _in_a_cluster() -> bool:
    """Whether the environment is that of one task of several under Slurm, or of one host of a TPU pod or several slices."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys():
        return True
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES") or "1") > 1


def only_one(what: str) -> None:
    """Refuses several processes for what runs on one: each would do all of it, in the same place.

    Raises:
      ProcessError: this is one of several.
    """
    if identity().get("num_processes", 1) > 1 or _in_a_cluster():
        raise ProcessError(f"{what} runs on one process; start it without a launcher, or with --processes=1")


def start(alike: Mapping[str, Any]) -> None:
    """Joins the other processes of the run, if there are any; before anything touches a device.

    Args:
      alike: what has to be equal in all of them besides versions and devices: the configuration, seeds, the work directory.

    Raises:
      ProcessError: processes did not come in time, or are unlike the first; they and what differs are named.
    """
    if distributed.global_state.client is not None:
        return
    given = identity()
    if given.get("num_processes") == 1 or not (given or _in_a_cluster()):
        return
    timeout = _seconds("start_timeout_s", contract.START_TIMEOUT, contract.DEFAULT_START_TIMEOUT)
    beat = _seconds("heartbeat_timeout_s", contract.HEARTBEAT_TIMEOUT, contract.DEFAULT_HEARTBEAT_TIMEOUT)
    # Its handler would swallow SIGTERM for good, whatever the run is doing: see `distill.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    address, count, rank = _place(given, timeout)
    try:
        _hosts[:] = roll_call.roll_call(address, count, rank, timeout)
    except roll_call.RollCallError as error:
        raise PeerLost(
            f"{error}; look at its log, and raise --start_timeout_s (or {contract.START_TIMEOUT}) if it only comes late"
        ) from error
    jax.distributed.initialize(
        **given, initialization_timeout=timeout, heartbeat_timeout_seconds=beat, shutdown_timeout_seconds=beat
    )
    # Software first: devices of several processes meet when the first of them is looked at, and other versions may not.
    for name, own in (("software and configuration", {**_versions(), **_plain(alike)}), ("devices", None)):
        differing = _differences(gather(name, _devices() if own is None else own))
        if differing:
            raise ProcessError(f"processes are unlike each other: {'; '.join(differing[:8])}; start all of them alike")
    logging.info("process %d of %d on %s", jax.process_index(), jax.process_count(), _hosts[jax.process_index()])


def _place(given: Mapping[str, Any], timeout: int) -> tuple[str, int, int]:
    """Address of process 0, how many there are, and which this one is: as given, or as JAX finds out."""
    address, count, rank, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        given.get("coordinator_address"), given.get("num_processes"), given.get("process_id"), None, None, timeout
    )
    assert address is not None and count is not None and rank is not None  # `_in_a_cluster`
    return address, count, rank


def _versions() -> dict[str, Any]:
    from subl_jax import artifacts

    return {f"version of {name}": version for name, version in artifacts.versions().items()}


def _devices() -> dict[str, Any]:
    return {"number of devices": jax.local_device_count(), "kind of device": jax.local_devices()[0].device_kind}


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    from subl_jax import artifacts

    return {name: artifacts.digest(each) if not isinstance(each, str | int) else each for name, each in value.items()}


def _differences(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the processes say that differs from process 0."""
    first = told[0]
    return [
        f"{name} is {each.get(name)!r} on process {rank}{_host(rank)}, {first.get(name)!r} on process 0{_host(0)}"
        for rank, each in enumerate(told)
        for name in sorted(first.keys() | each.keys())
        if each.get(name) != first.get(name)
    ]


def several() -> bool:
    """Whether the run has more than one process, and has found them."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes what all share: markers, metadata, metrics, the report."""
    return distributed.global_state.process_id == 0


# --- What processes tell each other -----------------------------------------------------------------------------------


def gather(name: str, value: Any) -> list[Any]:
    """What every process has to say at this point, by rank; all come to it in the same order.

    Args:
      name: of the point, for whoever waits.
      value: JSON-able and small (it passes through the first process).

    Raises:
      PeerLost: another process did not come within a day, or is known to be gone.
      ProcessError: another process is at another point; both are named.
    """
    if not several():
        return [value]
    client, state = distributed.global_state.client, distributed.global_state
    assert client is not None
    number, own = next(_numbers), json.dumps([name, value])
    point = f"subl/{number}"
    if state.process_id == 0:
        told = [own, *(_awaited(client, f"{point}/{rank}", name, rank) for rank in range(1, state.num_processes))]
        everything = f"[{','.join(told)}]"
        client.key_value_set(f"{point}/all", everything)
        # Whoever has come here has read the answers of the point before.
        client.key_value_delete(f"subl/{number - 1}/")
    else:
        client.key_value_set(f"{point}/{state.process_id}", own)
        everything = _awaited(client, f"{point}/all", name, 0)
    found = json.loads(everything)
    for rank, (where, _) in enumerate(found):
        if where != found[0][0]:
            raise ProcessError(
                f"process {rank}{_host(rank)} is at {where!r} where the first is at {found[0][0]!r}: they do not see the same "
                "files, or this is a mistake of ours; look at the logs of both"
            )
    return [said for _, said in found]


def _awaited(client: Any, key: str, name: str, rank: int) -> str:
    """The value of a key once it is there; says from time to time who is missing."""
    began = time.monotonic()
    while True:
        try:
            return client.blocking_key_value_get(key, _PATIENCE * 1000)
        except Exception as error:  # the client's own error type has no public name
            waited = time.monotonic() - began
            if "DEADLINE_EXCEEDED" not in str(error) or waited > _LONGEST:
                raise PeerLost(
                    f"{name}: process {rank}{_host(rank)} did not answer ({' '.join(str(error).split())[:200]})"
                ) from error
            logging.warning("%s: waiting for process %d%s since %.0f s", name, rank, _host(rank), waited)


def _host(rank: int) -> str:
    return f" on {_hosts[rank]}" if rank < len(_hosts) else ""


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    gather(name, None)


def told_by_first(name: str, value: Any) -> Any:
    """Process 0's value, in every process."""
    return gather(name, value)[0] if several() else value


def agree(name: str, error: BaseException | None) -> str | None:
    """None if no process has an error here; else what the first that has one says. All get the same answer."""
    said = gather(name, None if error is None else (str(error) or type(error).__name__))
    return next((f"process {rank}: {text}" if several() else text for rank, text in enumerate(said) if text), None)


# --- The end ----------------------------------------------------------------------------------------------------------

# What JAX, XLA and Gloo say where a process they wait for is gone.
_LOST = re.compile(
    r"gloo|connection (reset|closed|refused)|broken pipe|heartbeat|coordination|unavailable|socket closed"
    r"|distributed service|timed out|deadline_exceeded|closed by peer", re.IGNORECASE,
)  # fmt: skip


def exit_code(error: BaseException) -> int:
    """What a process that fails with this error tells its launcher; see `parallel.contract`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    cause: BaseException | None = error
    while cause is not None:  # what is told of a file may come of a process that is gone
        if isinstance(cause, PeerLost) or (isinstance(cause, jax.errors.JaxRuntimeError) and _LOST.search(str(cause))):
            return contract.PEER_LOST
        cause = cause.__cause__
    return 1


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A block whose failure ends a process of several at once.

    An orderly exit would wait for the others, which wait for this one in a collective; they learn of its end by the broken
    connection, by their launcher, or by the missing heartbeats.
    """
    try:
        yield
        if several():
            barrier("end")
    except ProcessError as error:
        _leave(error)
    except BaseException as error:
        if not several():
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    code = exit_code(error)
    if not isinstance(error, SystemExit):
        traceback.print_exc()
        rank = distributed.global_state.process_id
        lost = " (another process is gone)" if code == contract.PEER_LOST else ""
        print(f"error: process {rank}{_host(rank)}{lost}: {' '.join(str(error).split())[:1000]}", file=sys.stderr)
    if code == contract.REQUEUE and several():
        # All have saved; whoever ends first may have its launcher end the rest, who are still closing their files.
        with contextlib.suppress(Exception):
            distributed.global_state.client.wait_at_barrier("subl/stopped", int(1000 * _STOPPING_S))  # type: ignore[union-attr]
    if is_first():  # the others' answers come from here
        time.sleep(_LAST_WORDS_S)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
