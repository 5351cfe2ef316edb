"""Attacks by excess: processes, memory, disk, output, time. Each ends soon and leaves the machine to the others."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subl_jax.settings.bash.sandbox import Host, Limits, Result, Sandbox, SandboxPool
from tests.settings.bash.attacks import anonymous_mib, marked, members, outside, perl, within

LIMITS = Limits(wall_s=1)  # half of the usual, for the many that use all of it
SLACK = 8.0  # seconds a busy machine may take beyond the time of a command
PATIENT = Limits(wall_s=30)


@pytest.fixture(scope="module")
def hasty(sandbox_ready: None) -> Iterator[SandboxPool]:
    pool = SandboxPool(LIMITS, size=1)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def sandbox(hasty: SandboxPool) -> Iterator[Sandbox]:
    """Of the usual limits; whatever was done to it, nothing of it is left on the host."""
    sandbox = hasty.take()
    inside = namespace(sandbox)
    # With the first of a namespace all of it is gone; its number may by then be that of the pool's next.
    first = set(members(inside))
    assert first
    try:
        yield sandbox
    finally:
        sandbox.close()
    assert within(5, lambda: not first & set(members(inside)))


def namespace(sandbox: Sandbox) -> str:
    return sandbox.run("readlink /proc/self/ns/pid").stdout.strip()


def unique() -> str:
    """A duration of sleep that nobody else on this machine sleeps."""
    return f"{1000 + uuid.uuid4().int % 10**6}.{uuid.uuid4().int % 10**9:09d}"


class Watch:
    """The largest value a measure takes while the block runs."""

    def __init__(self, measure: Callable[[], float]):
        self._measure, self._stop, self.largest = measure, threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.03):
            self.largest = max(self.largest, self._measure())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def timed(sandbox: Sandbox, command: str) -> tuple[Result, float]:
    start = time.monotonic()
    return sandbox.run(command), time.monotonic() - start


FORKS = {
    "the classic": "bomb() { bomb | bomb & }; bomb; sleep 60",
    "in the foreground": "bomb() { bomb | bomb; }; bomb",
    "a program": perl("fork while 1"),
    "daemons": perl("$SIG{CHLD} = 'IGNORE'; while (1) { fork or exec 'setsid', 'sleep', '60' }"),
}


@pytest.mark.parametrize("bomb", FORKS)
def test_a_fork_bomb_stays_small_and_hurts_nobody(bomb, sandbox, patient):
    inside, neighbour = namespace(sandbox), patient.take()
    try:
        with Watch(lambda: len(members(inside))) as watch:
            result, took = timed(sandbox, FORKS[bomb])
            assert neighbour.run("for i in $(seq 20); do /bin/true || echo failed; done; echo fine").stdout == "fine\n"
        assert result.status != "ok" or result.code != 0
        assert took < LIMITS.wall_s + SLACK
        assert 10 < watch.largest <= LIMITS.processes + 4  # it did bomb; the sandbox's own first processes come on top
    finally:
        neighbour.close()


def resident_mib(inside: str) -> float:
    """Memory of the sandbox's processes that no file backs."""
    total = 0.0
    for pid in members(inside):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024
    return total


GROW = "my @x; while (1) { push @x, 'x' x (1 << 22) }"


@pytest.mark.parametrize(
    "command", [perl(GROW), "x=x; while :; do x=$x$x; done", "tail /dev/zero"], ids=["perl", "bash", "tail"]
)
def test_a_memory_bomb_of_one_process_is_stopped(command, sandbox):
    inside = namespace(sandbox)
    with Watch(lambda: resident_mib(inside)) as watch:
        result, took = timed(sandbox, command)
    assert result.status != "ok" or result.code != 0
    assert took < LIMITS.wall_s + SLACK
    assert watch.largest <= LIMITS.memory_mib + 16


@pytest.mark.parametrize("cgroups", [True, False])
def test_a_memory_bomb_of_many_processes_and_files_is_stopped(cgroups, sandbox_ready):
    pool = SandboxPool(PATIENT, size=0, host=Host(cgroups=cgroups))
    # Without a cgroup it is looked at every so often, and what grows meanwhile comes on top.
    overshoot = 16 if pool.client.holds_memory else LIMITS.memory_mib
    try:
        sandbox = pool.take()
        inside = namespace(sandbox)
        grow = "my $x = 'x' x (180 << 20); sleep 3"
        files = "for d in ~ /tmp /dev/shm; do for i in 1 2 3 4 5 6 7 8; do head -c 7M /dev/zero >$d/$i & done; done"
        with Watch(lambda: resident_mib(inside)) as watch:
            result = sandbox.run(f"{files}; for i in $(seq 20); do {perl(grow)} & done; wait; exit 1")
        assert result.status != "ok"
        assert watch.largest <= LIMITS.memory_mib + overshoot
        assert sandbox.inspect("echo still here").stdout == "still here\n"
    finally:
        pool.close()


PLACES = ("/home/agent", "/tmp", "/dev/shm")  # the first two are one disk, /home being its top


def test_the_disk_is_filled_up_to_its_limit(sandbox):
    fill = "for i in $(seq 40); do head -c 4M /dev/zero >$d/$i || break; done"
    result = sandbox.run(f"for d in {' '.join(PLACES)}; do {fill}; done 2>&1; du -sm {' '.join(PLACES)} | cut -f1")
    if result.status == "ok":
        sizes = [int(line) for line in result.stdout.splitlines() if line.isdigit()]
        assert len(sizes) == 3 and sizes[0] >= LIMITS.disk_mib // 2  # it was filled
        assert max(sizes) <= LIMITS.disk_mib + 1
        assert "No space left" in result.stdout
    again = sandbox.run("echo still here")
    assert again.stdout == "still here\n" or again.status == "exited"


def test_no_other_place_takes_what_the_limit_refuses(sandbox):
    # Owners can be changed: what is only root's by its owner is taken first.
    take = "chown agent / /* /*/* 2>/dev/null; chmod 777 / /* /*/* 2>/dev/null"
    writable = "find / -path /proc -prune -o -path /usr -prune -o -type d -writable -print"
    fill = f"for d in $({writable}); do head -c 7M /dev/zero >$d/a && echo $d; done 2>/dev/null"
    assert sandbox.run(take).status == "ok"
    found = [line for line in sandbox.run(fill).stdout.splitlines() if not line.startswith(("/home", "/tmp"))]
    assert found == []


def test_one_file_is_no_larger_than_its_limit(sandbox):
    sandbox.run(
        '(head -c 12M /dev/zero >big); perl -e \'$SIG{XFSZ} = "IGNORE"; open F, ">b"; syswrite F, "x" x 65536 for 1..200\''
    )
    sizes = [int(size) for size in sandbox.run("stat -c %s big b").stdout.split()]
    assert max(sizes) == LIMITS.file_mib << 20


OUTPUT = {
    "out": "yes",
    "errors": "yes >&2",
    "both": "yes & yes >&2",
    "zeros": "cat /dev/zero",
    "from the background": "yes & yes >&2 & sleep 0.3",
    "a long line": "head -c 50M /dev/zero | tr '\\0' x",
    "straight at the descriptors": "for f in /proc/$$/fd/*; do yes >$f & done; wait",
}


@pytest.mark.parametrize("flood", OUTPUT)
def test_endless_output_is_cut_visibly(flood, sandbox):
    before = anonymous_mib()
    with Watch(anonymous_mib) as watch:
        result, took = timed(sandbox, OUTPUT[flood])
    assert took < LIMITS.wall_s + SLACK
    assert watch.largest - before < 32
    for stream in (result.stdout, result.stderr):
        assert len(stream) <= LIMITS.output_bytes + 100
    if flood != "straight at the descriptors":
        assert "truncated" in result.stdout[-100:] + result.stderr[-100:]
    again, took = timed(sandbox, "echo here")
    assert took < LIMITS.wall_s + SLACK
    assert again.status in ("exited", "timeout", "broken") or "here" in again.stdout


HANGS = {
    "sleep": "sleep {0}",
    "ignoring signals": "bash -c \"trap '' TERM INT HUP QUIT; sleep {0}; sleep {0}\"",
    "ignoring every signal": perl("$SIG{$_} = 'IGNORE' for keys %SIG; exec 'sleep', @ARGV", "{0}"),
    "the shell ignoring signals": "trap '' TERM INT HUP QUIT; while :; do sleep {0}; done",
    "a busy loop": "while :; do :; done",
    "a pipe nobody writes": "mkfifo p; cat p",
    "waiting": "sleep {0} & wait",
    "stopping itself": "kill -STOP $$",
    "in another session": "setsid -w sleep {0}",
    "reading the terminal": "read x </dev/tty; sleep {0}",
    "in a trap": "trap 'sleep {0}' EXIT DEBUG; true",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_hang_ends_with_its_time_and_leaves_nothing(hang, sandbox):
    duration, inside = unique(), namespace(sandbox)
    result, took = timed(sandbox, HANGS[hang].replace("{0}", duration))
    assert result.status == "timeout"
    assert LIMITS.wall_s * 0.9 <= took < LIMITS.wall_s + SLACK
    assert within(3, lambda: not marked(duration))
    again, took = timed(sandbox, "echo here")
    assert again.status == "exited" and took < SLACK
    # Process 1 and the one that holds the world open for our look at it; the agent's are all gone.
    assert within(3, lambda: len(members(inside)) == 2)
    assert sandbox.inspect("ls /home").stdout == "agent\n"


@pytest.mark.parametrize("read", ["cat", "read x", "head -c 1", "bash", "mapfile", "cat /dev/stdin", perl("<STDIN>")])
def test_a_command_that_reads_its_input_finds_the_end(read, sandbox):
    result, took = timed(sandbox, f"{read}; echo after")
    assert (result.stdout, result.status) == ("after\n", "ok") and took < SLACK
    assert sandbox.run("echo next").stdout == "next\n"


DAEMONS = {
    "background": "sleep {0} &",
    "nohup": "nohup sleep {0} >/dev/null 2>&1 & disown",
    "setsid": "setsid sleep {0} </dev/null >/dev/null 2>&1 &",
    "double fork": perl("exit if fork; use POSIX; POSIX::setsid(); exit if fork; $0 = 'x'; exec 'sleep', @ARGV", "{0}"),
    "ignoring signals": perl("exit if fork; $SIG{$_} = 'IGNORE' for keys %SIG; exec 'sleep', @ARGV", "{0}"),
    "stopped": "setsid sleep {0} & sleep 0.1; kill -STOP $!",
}


@pytest.mark.parametrize("daemon", DAEMONS)
def test_no_daemon_outlives_its_episode(daemon, hasty):
    duration, sandbox = unique(), hasty.take()
    try:
        result, took = timed(sandbox, DAEMONS[daemon].replace("{0}", duration))
        assert result.status == "ok" and took < SLACK
        assert within(3, lambda: bool(marked(duration)))  # it does run, past its command
        assert sandbox.run("echo next").stdout == "next\n"
    finally:
        sandbox.close()
    assert within(3, lambda: not marked(duration))


def test_open_files_are_few_and_the_machine_keeps_its_own(sandbox):
    code = "my @f; while (open(my $f, '<', '/dev/null')) { push @f, $f } print scalar @f"
    opened = sandbox.run(perl(code))
    assert opened.status == "ok" and 8 <= int(opened.stdout) <= 4096
    Path(os.devnull).read_bytes()


@pytest.mark.parametrize("resource", "cfunv")
def test_no_limit_is_raised(resource, sandbox):
    """The limits that hold the sandbox: cores, file sizes, open files, processes, memory."""
    hard = sandbox.run(f"ulimit -H{resource}").stdout.strip()
    if hard == "unlimited":
        assert resource in "v"  # held for all processes together instead
        return
    assert sandbox.run(f"ulimit -H{resource} {int(hard) + 1}").code != 0
    assert sandbox.run(f"ulimit -H{resource} unlimited; sudo bash -c 'ulimit -H{resource} unlimited'").code != 0
    assert (
        sandbox.run(
            f"prlimit --pid $$ --{dict(c='core', f='fsize', u='nproc', n='nofile', v='as')[resource]}=unlimited"
        ).code
        != 0
    )
    assert sandbox.run(f"ulimit -H{resource}").stdout.strip() == hard


def test_no_priority_is_raised(sandbox):
    raises = ("nice -n -5 true", "chrt -f 1 true", "chrt -r 99 true", "renice -n -5 $$", "ionice -c 1 true")
    own = int(sandbox.run("nice").stdout)
    for raised in raises:
        sandbox.run(raised)
    assert int(sandbox.run("nice").stdout) >= own
    assert int(sandbox.run("nice -n -5 nice").stdout) >= own
    assert (
        sandbox.run("chrt -p $$").stdout.count("SCHED_OTHER") + sandbox.run("chrt -p $$").stdout.count("SCHED_BATCH")
        >= 1
    )
    score = int(sandbox.run("cat /proc/self/oom_score_adj").stdout)
    assert sandbox.run("echo -1000 >/proc/self/oom_score_adj").code != 0
    assert int(sandbox.run("cat /proc/self/oom_score_adj").stdout) == score


@pytest.mark.parametrize(
    "excess",
    [
        "f() { f; }; f",
        "x=$(head -c 3M /dev/zero | tr '\\0' x); /bin/echo $x | wc -c",
        "for i in $(seq 2000); do mkdir d && cd d || break; done; pwd | wc -c",
        "i=0; while :; do : >f$i; i=$((i+1)); done",
        "echo {1..3000000} | wc -c",
        'exec 3<>/dev/null; for i in $(seq 4 300); do eval "exec $i<>/dev/null"; done',
        "cat /dev/urandom | bash",
        "gzip -c </dev/zero | gzip -d | sort",
    ],
    ids=[
        "recursion",
        "long argument",
        "deep directories",
        "many files",
        "large expansion",
        "descriptors",
        "noise run",
        "sort",
    ],
)
def test_an_excess_ends_in_time_and_the_next_episode_is_whole(excess, sandbox, hasty):
    result, took = timed(sandbox, excess)
    assert took < LIMITS.wall_s + SLACK and result.status in ("ok", "timeout", "exited", "killed", "broken")
    sandbox.close()
    fresh = hasty.take()
    try:
        assert fresh.run("ls -A; pwd").stdout == "/home/agent\n"
    finally:
        fresh.close()


def test_the_bombs_of_these_tests_are_real():
    """Outside, within limits set for them alone, the same programs reach what the sandbox refuses."""
    assert outside(f"ulimit -v 700000; {perl(GROW)}; echo $?").strip() != "0"
    assert outside(perl("my $x = 'x' x (300 << 20); print length $x")) == str(300 << 20)
    assert int(outside("nice -n -5 nice")) == os.nice(0) - 5 or os.geteuid() != 0
