from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from subl_jax.launching import local, supervision
from subl_jax.launching.command import LaunchError
from subl_jax.launching.output import Line, Lines, Printer
from subl_jax.parallel import contract

ROOT = Path(__file__).parent.parent.parent
COUNTING = str(ROOT / "tests" / "launching" / "counting.py")
# What stand-ins begin with.
RANK = "import os, signal, sys, time\nrank = int(os.environ['SUBL_PROCESS_ID'])\n"


def launch(*flags: str, script: str = "", command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The launcher with a stand-in that every process runs."""
    behind = command or ("python", "-c", RANK + textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local", *flags, "--", *behind],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(launched: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = launched.communicate(timeout=60)
    return launched.returncode, out, error


def ran(script: str, processes: int = 2, **plan) -> tuple[int, str, str]:
    """The same within this process."""
    out, error = io.StringIO(), io.StringIO()
    command = ("python", "-c", RANK + textwrap.dedent(script))
    return local.run(local.Plan(command, processes, **plan), Printer(out, error)), out.getvalue(), error.getvalue()


def await_files(*paths: Path) -> None:
    end = time.monotonic() + 30
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, f"{paths} did not come"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended (one that nobody has waited for yet has too)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


# --- What each process is told -----------------------------------------------------------------------------------------


def test_every_process_is_told_the_same_coordinator_and_its_own_rank() -> None:
    code, out, _ = ran("""
        names = ("SUBL_COORDINATOR", "SUBL_NUM_PROCESSES", "SUBL_PROCESS_ID", "SUBL_START_TIMEOUT_S", "JAX_PLATFORMS")
        print(*(os.environ[name] for name in names), sys.executable)
        """, processes=3, start_timeout_s=7)  # fmt: skip
    assert code == 0
    lines = sorted(out.splitlines())
    address = lines[0].split()[1]
    assert address.startswith("127.0.0.1:")
    assert lines == [f"[{rank}] {address} 3 {rank} 7 cpu {sys.executable}" for rank in range(3)]


def test_each_process_gets_gpus_of_its_own_out_of_those_that_may_be_used() -> None:
    plan = local.Plan(("python",), processes=2, devices_per_process=2, gpus=True)
    base = {"CUDA_VISIBLE_DEVICES": "7,5,3,1"}
    assert [local.told(plan, rank, 1, base)["CUDA_VISIBLE_DEVICES"] for rank in range(2)] == ["7,5", "3,1"]
    assert "JAX_PLATFORMS" not in local.told(plan, 0, 1, base)
    with pytest.raises(LaunchError, match="need 4, and 1 are here"):
        local.told(plan, 0, 1, {"CUDA_VISIBLE_DEVICES": "0"})


def test_devices_per_process_replaces_the_number_in_xla_flags_and_keeps_the_rest() -> None:
    base = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2"}
    found = local.told(local.Plan(("python",), devices_per_process=3), 0, 1, base)
    assert found["XLA_FLAGS"] == "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=3"
    assert "XLA_FLAGS" not in local.told(local.Plan(("python",)), 0, 1, base)


def test_a_slurm_allocation_around_the_launcher_is_hidden_from_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert all("SLURM_PROCID" not in each for each in local.environments(local.Plan(("python",))))


def test_dry_run_prints_one_line_for_each_process_and_starts_none(tmp_path: Path) -> None:
    code, out, _ = ended(launch("--dry_run", command=("touch", str(tmp_path / "a b"))))
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "SUBL_PROCESS_ID=1" in out.splitlines()[1]
    assert out.splitlines()[1].endswith(f"touch '{tmp_path}/a b'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "command", "said"),
    [
        ((), (), "no command is given"),
        ((), ("no-such-program",), "there is no program 'no-such-program'"),
        ((), ("python", "-m", "experiments.api_deletoin"), "did you mean experiments.api_deletion?"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(flags, command, said) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *flags, "--", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


# --- Failures ----------------------------------------------------------------------------------------------------------


def test_the_first_failure_ends_all_and_its_traceback_comes_last() -> None:
    began = time.monotonic()
    code, _, error = ran("""
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: (print("rank 0 saves", file=sys.stderr), sys.exit(143)))
            time.sleep(30)
        time.sleep(0.5)
        def broken(): raise ValueError("the cause")
        broken()
        """, grace_s=20)  # fmt: skip
    assert code == 1
    assert time.monotonic() - began < 15
    assert "[0] rank 0 saves" in error
    assert error.splitlines()[-1] == "[1] ValueError: the cause"
    assert "process 1 of 2 failed first: exit code 1" in error
    assert error.rindex("Traceback") > error.index("[0] rank 0 saves")


@pytest.mark.parametrize("code", [3, contract.PEER_LOST, contract.REQUEUE])
def test_exit_codes_are_those_of_the_process(code: int) -> None:
    assert ran(f"sys.exit({code} if rank else 0)")[0] == code


def test_a_process_killed_by_a_signal_is_the_cause_though_another_one_ends_with_it(tmp_path: Path) -> None:
    pid = str(tmp_path / "pid")
    code, _, error = ran(f"""
        if rank == 1:
            open({pid!r} + "_", "w").write(str(os.getpid())); os.rename({pid!r} + "_", {pid!r}); time.sleep(30)
        while not os.path.exists({pid!r}): time.sleep(0.01)
        os.kill(int(open({pid!r}).read()), signal.SIGSEGV)
        os._exit(1)
        """)
    assert code == 128 + signal.SIGSEGV
    assert "process 1 of 2 failed first: ended by SIGSEGV" in error


def test_of_ends_that_come_together_the_likeliest_cause_is_a_signal_and_the_least_a_lost_process() -> None:
    ends = [-signal.SIGKILL, 1, -signal.SIGABRT, contract.REQUEUE, contract.PEER_LOST]
    assert sorted(reversed(ends), key=supervision.weight, reverse=True) == ends


def test_a_process_that_lost_another_one_is_not_the_cause_though_it_ends_first() -> None:
    code, _, error = ran("""
    if rank == 0: sys.exit(75)
    time.sleep(0.8); raise ValueError("slow to say so")
    """)  # fmt: skip
    assert code == 1
    assert error.splitlines()[-1] == "[1] ValueError: slow to say so"


def test_a_stopped_process_is_killed_after_the_grace() -> None:
    began = time.monotonic()
    code, _, _ = ran("""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 0: os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5); sys.exit(9 if rank else 0)
        """, grace_s=0.5)  # fmt: skip
    assert code == 9
    assert time.monotonic() - began < 10


def test_a_stopped_process_that_is_asked_wakes_up_to_save(tmp_path: Path) -> None:
    ran(
        f"""
        def save(*_): open({str(tmp_path / "saved")!r}, "w").write("all"); sys.exit(143)
        signal.signal(signal.SIGTERM, save)
        if rank == 0: os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5); sys.exit(9)
        """,
        grace_s=20,
    )
    assert (tmp_path / "saved").read_text() == "all"


def test_the_others_are_left_to_save_when_one_ends_because_it_was_asked_to(tmp_path: Path) -> None:
    """A second request would cut a checkpoint short."""
    code, _, _ = ran(f"""
        if rank == 1: sys.exit(143)
        time.sleep(1.5)
        open({str(tmp_path / "saved")!r}, "w").write("all")
        sys.exit(143)
        """, grace_s=20)  # fmt: skip
    assert code == 143
    assert (tmp_path / "saved").read_text() == "all"


# --- The launcher itself ends -------------------------------------------------------------------------------------------

_WAITS = """
folder = {folder!r}
def asked(*_):
    time.sleep({saves}); open(f"{{folder}}/saved{{rank}}", "w").write("yes"); sys.exit(143)
signal.signal(signal.SIGTERM, asked)
open(f"{{folder}}/pid{{rank}}", "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_the_launcher_is_passed_on_and_waited_for(tmp_path: Path, number: int) -> None:
    launched = launch("--restarts=3", script=_WAITS.format(folder=str(tmp_path), saves=0.3))
    await_files(tmp_path / "pid0", tmp_path / "pid1")
    launched.send_signal(number)
    assert ended(launched)[0] == contract.REQUEUE
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_second_request_kills(tmp_path: Path) -> None:
    launched = launch("--grace_s=60", script=_WAITS.format(folder=str(tmp_path), saves=50))
    await_files(tmp_path / "pid0", tmp_path / "pid1")
    launched.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    launched.send_signal(signal.SIGTERM)
    code, _, error = ended(launched)
    assert code == 128 + signal.SIGKILL
    assert "SIGTERM: asking all processes to stop" in error
    assert all(gone(int((tmp_path / f"pid{rank}").read_text())) for rank in range(2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a child's life to its parent's")
def test_processes_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launched = launch(script=_WAITS.format(folder=str(tmp_path), saves=0))
    await_files(tmp_path / "pid0", tmp_path / "pid1")
    launched.kill()
    launched.communicate(timeout=10)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    end = time.monotonic() + 5
    while not all(map(gone, pids)):
        assert time.monotonic() < end, "they live on"
        time.sleep(0.02)


# --- Restarts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", ["sys.exit(75)", "sys.exit(143)", "os.kill(os.getpid(), 9)"])
def test_all_start_again_after_a_failure_that_may_pass(tmp_path: Path, failure: str) -> None:
    code, _, error = ran(f"""
        began = open({str(tmp_path)!r} + f"/{{rank}}", "a"); began.write(os.environ["SUBL_COORDINATOR"] + "\\n"); began.flush()
        if rank == 1 and len(open(began.name).readlines()) == 1: {failure}
        time.sleep(0.3)
        """, restarts=1)  # fmt: skip
    assert code == 0
    assert "restart 1 of at most 1" in error
    assert [len((tmp_path / str(rank)).read_text().splitlines()) for rank in range(2)] == [2, 2]


@pytest.mark.parametrize(("failure", "code", "starts"), [("sys.exit(75)", 75, 3), ("sys.exit(4)", 4, 1)])
def test_restarts_are_bounded_and_other_failures_have_none(
    tmp_path: Path, failure: str, code: int, starts: int
) -> None:
    began = str(tmp_path / "began")
    found, _, _ = ran(f"open({began!r}, 'a').write('x'); {failure}", processes=1, restarts=2)  # fmt: skip
    assert found == code
    assert Path(began).read_text() == "x" * starts


# --- Output ------------------------------------------------------------------------------------------------------------


def _fed(*pieces: bytes) -> list[Line]:
    lines = Lines(0, True)
    return [line for piece in (*pieces, b"") for line in lines.feed(piece)]


def test_lines_are_whole_however_they_arrive() -> None:
    assert [line.text for line in _fed(b"on", b"e\ntwo\r\nthr", "eé".encode()[:2], "é".encode()[1:])] == [
        "one",
        "two",
        "threé",
    ]


def test_a_bar_is_told_from_lines_and_its_last_state_becomes_one_at_the_line_end() -> None:
    found = _fed(b"\r 10%", b"\r 20%", b"\r100%\nafter\n")
    assert [(line.text, line.bar) for line in found] == [
        (" 10%", True),
        (" 20%", True),
        ("100%", False),
        ("after", False),
    ]


def test_a_bar_that_is_wiped_out_leaves_nothing() -> None:
    assert [line.text for line in _fed(b"\r 10%", b"\r     \r", b"after\n")] == [" 10%", "after"]
    assert [line.text for line in _fed(b"\r 10%", b"\r     \r")] == [" 10%"]


def test_bars_that_end_in_carriage_returns_are_shown_and_do_not_pile_up() -> None:
    lines = Lines(0, True)
    found = [lines.feed(f"{number}%\r".encode()) for number in range(50)]
    assert [line.text for part in found for line in part] == [f"{number}%" for number in range(50)]
    assert len(lines._rest) < 10


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_only_the_first_process_draws_its_bar_and_lines_take_its_place() -> None:
    error = _Terminal()
    printer = Printer(error, error)
    for line in (Line(0, True, "50%", True), Line(1, True, "40%", True), Line(1, False, "a line")):
        printer.line(line)
    assert error.getvalue() == "\r\x1b[K[0] 50%\r\x1b[K[1] a line\n"


def test_in_a_log_file_a_bar_is_a_line_now_and_then() -> None:
    error = io.StringIO()
    printer = Printer(error, error)
    for number in range(100):
        printer.line(Line(0, True, f"{number}%", True))
    assert error.getvalue() == "[0] 0%\n"


# --- With JAX ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XLA_FLAGS", "")
    yield


@pytest.mark.slow
def test_two_processes_find_each_other_are_stopped_and_go_on_to_the_same_result(
    tmp_path: Path, one_device: None
) -> None:
    def counted(name: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        return launch(command=("python", COUNTING, str(tmp_path / name), "40", "0.05"))

    assert ended(counted("straight"))[0] == 0
    launched = counted("stopped")
    assert launched.stdout is not None
    while "begins at step 0" not in launched.stdout.readline():
        assert launched.poll() is None
    time.sleep(0.7)
    launched.send_signal(signal.SIGTERM)
    assert ended(launched)[0] == contract.REQUEUE
    assert not (tmp_path / "stopped" / "result.json").exists()
    code, out, _ = ended(counted("stopped"))
    assert code == 0 and "begins at step 0" not in out
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("straight", "stopped")]
    assert results[0] == results[1]
    assert results[0]["processes"] == 2


def test_the_launcher_does_not_import_jax() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, launch.local, launch.slurm; sys.exit('jax' in sys.modules)"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0


def test_time_outs_of_the_environment_reach_the_processes_unless_a_flag_says_another(tmp_path):
    script = "import os; print(os.environ['SUBL_HEARTBEAT_TIMEOUT_S'], os.environ['SUBL_START_TIMEOUT_S'])"
    for flags, said in (((), "17 44"), (("--heartbeat_timeout_s=23",), "23 44")):
        environment = {**os.environ, "SUBL_HEARTBEAT_TIMEOUT_S": "17", "SUBL_START_TIMEOUT_S": "44"}
        done = subprocess.run(
            [sys.executable, "-m", "launch.local", "--processes=2", *flags, "--", "python", "-c", script],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert sorted(done.stdout.split("\n")) == ["", f"[0] {said}", f"[1] {said}"]
