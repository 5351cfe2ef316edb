"""Processes that find each other, refuse to be unlike each other, wait by name, and end together. Two real ones each time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import pytest
from absl import flags

from subl_jax import checkpoint
from subl_jax.parallel import contract, processes, roll_call
from subl_jax.parallel.processes import PeerLost, ProcessError

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(code: str, ranks: tuple[int, ...] = (0, 1), timeout: int = 60, **more: str) -> list[subprocess.Popen[str]]:
    """Runs the code as processes of a run of two."""
    shared = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
        contract.COORDINATOR: f"127.0.0.1:{free_port()}", contract.NUM_PROCESSES: "2",
        contract.START_TIMEOUT: str(timeout), contract.HEARTBEAT_TIMEOUT: "10", **more,
    }  # fmt: skip
    text = "import os, sys, time, json\nfrom subl_jax.parallel import processes\n" + textwrap.dedent(code)
    return [
        subprocess.Popen(
            [sys.executable, "-c", text], env={**shared, contract.PROCESS_ID: str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip


def ended(children: list[subprocess.Popen[str]], within: float = 90) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    try:
        told = [child.communicate(timeout=within) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, out, err) for child, (out, err) in zip(children, told, strict=True)]


def test_processes_gather_by_rank_and_take_the_firsts_word_and_a_failure_is_everyones():
    told = ended(start("""
        with processes.ending_together():
            processes.start({"configuration": {"a": 1}})
            import jax
            rank = jax.process_index()
            found = {
                "gathered": processes.gather("ranks", [rank, "x" * 100_000][:1]),
                "first": processes.told_by_first("a word", f"of {rank}"),
                "fine": processes.agree("nothing wrong", None),
                "wrong": processes.agree("something wrong", ValueError("the disk is full") if rank else None),
                "writer": processes.is_first(),
            }
            processes.barrier("done")
            print(json.dumps(found))
    """))  # fmt: skip
    found = []
    for code, out, err in told:
        assert code == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    common = {"gathered": [[0], [1]], "first": "of 0", "fine": None, "wrong": "process 1: the disk is full"}
    assert found == [{**common, "writer": True}, {**common, "writer": False}]


@pytest.mark.parametrize(
    ("code", "more", "says"),
    [
        ('processes.start({"configuration": os.environ["SUBL_PROCESS_ID"]})', {}, "configuration is '1' on process 1 on"),
        (
            "from subl_jax import artifacts\n"
            "if os.environ['SUBL_PROCESS_ID'] == '1': artifacts.versions = lambda: {'jax': '0.9.9'}\n"
            "processes.start({})",
            {}, "version of jax is '0.9.9' on process 1",
        ),
        (
            "import jax\njax.config.update('jax_num_cpu_devices', 1 + int(os.environ['SUBL_PROCESS_ID']))\n"
            "processes.start({})",
            {}, "number of devices is 2 on process 1",
        ),
    ],
    ids=["configuration", "version", "devices"],
)  # fmt: skip
def test_unlike_processes_are_refused_by_name_and_value(code, more, says):
    body = "with processes.ending_together():\n" + textwrap.indent(code, "    ")
    for exit_code, _, err in ended(start(body, **more)):
        assert exit_code == 1
        assert "processes are unlike each other" in err and says in err and "start all of them alike" in err


def test_a_process_that_does_not_come_is_named_in_time():
    began = time.monotonic()
    [(code, _, err)] = ended(start("with processes.ending_together(): processes.start({})", (0,), timeout=5))
    assert code == contract.PEER_LOST
    assert "process 1 of 2 did not come within 5 s" in err and "raise --start_timeout_s" in err
    assert time.monotonic() - began < 40


def test_a_missing_first_process_is_named_too():
    [(code, _, err)] = ended(start("with processes.ending_together(): processes.start({})", (1,), timeout=3))
    assert code == contract.PEER_LOST
    assert "process 0 did not answer at 127.0.0.1:" in err


def test_one_place_claimed_twice_is_refused_with_both_hosts():
    text = "with processes.ending_together(): processes.start({})"
    children = start(text, (0, 1, 1), timeout=20, **{contract.NUM_PROCESSES: "3"})
    told = ended(children)
    assert "both say they are process 1" in told[0][2]
    assert all(code != 0 for code, *_ in told)


WAITING = """
    with processes.ending_together():
        processes.start({})
        import jax
        if jax.process_index() == int(os.environ["LEAVES"]):
            print("here", flush=True)
            time.sleep(600)
        processes.barrier("a place to meet")
"""


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_waits_for_a_dead_or_frozen_one_ends_within_the_bound(rank, number):
    children = start(WAITING, LEAVES=str(rank))
    out = children[rank].stdout
    assert out is not None
    while "here" not in out.readline():
        assert children[rank].poll() is None
    time.sleep(1)
    began = time.monotonic()
    children[rank].send_signal(number)
    try:
        children[1 - rank].wait(timeout=60)
        assert time.monotonic() - began < 35  # two heartbeat time-outs of 10 s, and the rest for two busy cores
        assert children[1 - rank].returncode != 0
    finally:
        for child in children:
            child.kill()


def test_who_is_missing_is_said_while_it_is_waited_for():
    slow = """
        import jax
        from absl import logging
        processes._PATIENCE = 1
        logging.set_verbosity(logging.WARNING)
        with processes.ending_together():
            processes.start({})
            if jax.process_index() == 1:
                time.sleep(4)
            processes.barrier("the seal")
    """
    (code, _, err), (other, *_) = ended(start(slow))
    assert (code, other) == (0, 0)
    assert f"the seal: waiting for process 1 on {socket.gethostname()} since" in err


# --- Alone --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (contract.COORDINATOR, contract.NUM_PROCESSES, contract.PROCESS_ID):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({contract.COORDINATOR: "a:1"}, r"--num_processes \(or SUBL_NUM_PROCESSES\) and --process_id .* all three, or none"),
        ({contract.COORDINATOR: "a:1", contract.NUM_PROCESSES: "2", contract.PROCESS_ID: "2"}, "process_id=2 is outside"),
        ({contract.COORDINATOR: "a:1", contract.NUM_PROCESSES: "two", contract.PROCESS_ID: "0"}, "must be integers"),
        ({contract.COORDINATOR: "host", contract.NUM_PROCESSES: "2", contract.PROCESS_ID: "0"}, "'host' is no host:port"),
    ],
)  # fmt: skip
def test_half_an_identity_is_refused(environment, given, says):
    for name, value in given.items():
        environment.setenv(name, value)
    with pytest.raises(ProcessError, match=says):
        processes.identity()


def test_one_process_of_one_needs_no_coordinator(environment):
    assert processes.identity() == {}
    environment.setenv(contract.COORDINATOR, "nowhere:1")
    environment.setenv(contract.NUM_PROCESSES, "1")
    environment.setenv(contract.PROCESS_ID, "0")
    processes.start({})
    assert not processes.several() and processes.is_first()
    assert processes.gather("alone", 7) == [7] and processes.told_by_first("alone", 8) == 8
    assert processes.agree("alone", OSError("full")) == "full"


def test_what_runs_on_one_process_is_refused_on_several(environment):
    processes.only_one("the study")
    for name, value in ((contract.COORDINATOR, "a:1"), (contract.NUM_PROCESSES, "2"), (contract.PROCESS_ID, "1")):
        environment.setenv(name, value)
    with pytest.raises(ProcessError, match="the study runs on one process; start it without a launcher"):
        processes.only_one("the study")


def test_flags_stand_above_the_environment(environment):
    values = flags.FlagValues()
    flags.DEFINE_string("coordinator", None, "", flag_values=values)
    environment.setattr(flags, "FLAGS", values)
    values(["program", "--coordinator=flag:1"])
    environment.setenv(contract.COORDINATOR, "environment:1")
    environment.setenv(contract.NUM_PROCESSES, "3")
    environment.setenv(contract.PROCESS_ID, "2")
    assert processes.identity() == {"coordinator_address": "flag:1", "num_processes": 3, "process_id": 2}


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # in the batch script, outside of a step
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({}, False),
    ],
)
def test_a_cluster_is_recognised_by_its_environment(environment, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        environment.delenv(name, raising=False)
    for name, value in variables.items():
        environment.setenv(name, value)
    assert processes._in_a_cluster() is several


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(143), 143), (SystemExit("text"), 1), (SystemExit(None), 0), (KeyboardInterrupt(), 130),
        (ValueError("connection reset"), 1),  # of this process alone
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), 75),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (PeerLost("the seal: process 1 did not answer"), 75), (ProcessError("unlike: peer-host timed out"), 1),
    ],
)  # fmt: skip
def test_an_error_has_the_exit_code_that_tells_a_launcher_what_to_do(error, code):
    assert processes.exit_code(error) == code


def test_processes_at_different_points_end_with_both_points_named():
    told = ended(start("""
        with processes.ending_together():
            processes.start({})
            import jax
            processes.barrier(f"step {jax.process_index()}00")
    """))  # fmt: skip
    for code, _, err in told:
        assert code == 1
        assert "is at 'step 100' where the first is at 'step 000'" in err


def test_the_points_that_are_behind_are_forgotten():
    (code, out, err), (other, *_) = ended(start("""
        from jax._src import distributed
        with processes.ending_together():
            processes.start({})
            for number in range(5):
                processes.gather(f"point {number}", number)
            processes.barrier("last")
            print(json.dumps([key for key, _ in distributed.global_state.client.key_value_dir_get("subl/")]))
            processes.barrier("read")
    """))  # fmt: skip
    assert (code, other) == (0, 0), err
    left = {key.split("/")[1] for key in json.loads(out.splitlines()[-1])}
    assert len(left) <= 2


def called(count: int) -> tuple[int, threading.Thread, list[list[str]]]:
    """Process 0 of a roll call in a thread: its port, the thread, and where its answer will be."""
    port, found = free_port(), []
    caller = threading.Thread(target=lambda: found.append(roll_call.roll_call(f"127.0.0.1:{port}", count, 0, 20)))
    caller.start()
    return port, caller, found


def connected(port: int) -> socket.socket:
    """A connection to it, as soon as it listens."""
    until = time.monotonic() + 5
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1)
        except OSError:
            assert time.monotonic() < until


@pytest.mark.parametrize(
    "noise", [b"[" * 5000 + b"\n", b'{"rank": true, "host": "x"}\n', b"GET / HTTP/1.1\r\n\r\n", b""]
)
def test_a_stranger_at_the_coordinators_port_neither_ends_nor_stalls_the_roll_call(noise):
    port, caller, found = called(2)
    with connected(port) as stranger:
        stranger.sendall(noise)
        began = time.monotonic()
        assert roll_call.roll_call(f"127.0.0.1:{port}", 2, 1, 20) == [socket.gethostname()] * 2
        assert time.monotonic() - began < 5
    caller.join()
    assert found == [[socket.gethostname()] * 2]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)], ids=str)
def test_a_process_that_comes_again_after_its_connection_was_lost_is_no_second_one(order):
    port, caller, found = called(3)
    with connected(port) as first:
        first.sendall(b'{"rank": 1, "host": "gone"}\n')
        time.sleep(0.5)
    others = [threading.Thread(target=roll_call.roll_call, args=(f"127.0.0.1:{port}", 3, rank, 20)) for rank in order]
    for other in others:
        other.start()
        time.sleep(0.5)
    for each in (*others, caller):
        each.join(30)
    assert found == [[socket.gethostname()] * 3]


def test_a_lost_process_behind_an_error_of_a_file_is_still_a_lost_process():
    try:
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset by peer")
        except jax.errors.JaxRuntimeError as cause:
            raise ValueError("cannot write the checkpoint") from cause
    except ValueError as error:
        assert processes.exit_code(error) == contract.PEER_LOST


def test_one_process_may_read_a_model_that_the_others_do_not(tmp_path):
    """As on resuming a rollout of which one process has nothing left to do."""
    checkpoint.save_model(tmp_path / "model", {"w": jax.numpy.arange(6.0)}, {})
    told = ended(start(f"""
        with processes.ending_together():
            processes.start({{}})
            import jax
            from subl_jax import checkpoint
            if jax.process_index() == 1:
                for _ in range(2):
                    print(checkpoint.load_model({str(tmp_path / "model")!r})[0]["w"].sum())
            processes.barrier("read")
    """))  # fmt: skip
    assert [code for code, *_ in told] == [0, 0], told[1][2]
    assert told[1][1].split() == ["15.0", "15.0"]
