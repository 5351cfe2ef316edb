"""Attacks from one episode on another, beside it or after it, and on the time after their parent's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from subl_jax.settings.bash.sandbox import Limits, Sandbox, SandboxPool
from tests.settings.bash.attacks import descendants, marked, number, outside, perl, within

PATIENT = Limits(wall_s=30, output_bytes=2**20)
REPOSITORY = Path(__file__).parents[3]

# What one episode leaves for another (with a name nobody knows), and how the other looks for it.
KEY = "my ($t, $n, $v) = ('user', $ARGV[1], $ARGV[2]); print syscall($ARGV[0]+0, $t, $n, $v, length $v, $ARGV[3]+0)"
FIND_KEY = (
    "my ($t, $n, $b) = ('user', $ARGV[2], \"\\0\" x 64); my $k = syscall($ARGV[0]+0, 10, $ARGV[3]+0, $t, $n, 0);"
    "$k = syscall($ARGV[1]+0, $t, $n, 0, 0) if $k < 0; syscall($ARGV[0]+0, 11, $k, $b, 64) if $k > 0; print $b"
)
SHM = "my $id = shmget($ARGV[0], 64, 0666 | 01000) // die $!; shmwrite($id, $ARGV[1], 0, 32); print $id"
FIND_SHM = "my $id = shmget($ARGV[0], 64, 0) // exit; my $b; shmread($id, $b, 0, 32); print $b"
LISTEN = (
    "use Socket; my ($f, $a, $s) = ($ARGV[0] eq 'unix') ? (AF_UNIX, pack('Sa*', 1, \"\\0$ARGV[1]\"))"
    " : (AF_INET, pack_sockaddr_in($ARGV[1], INADDR_LOOPBACK)); socket($s, $f, SOCK_STREAM, 0); bind($s, $a) or die $!;"
    "listen($s, 5); open(STDIN, '/dev/null'); exit if fork; close STDOUT; close STDERR;"
    "while (accept(my $c, $s)) { syswrite $c, $ARGV[2]; close $c }"
)
CALL = (
    "use Socket; my ($f, $a, $s) = ($ARGV[0] eq 'unix') ? (AF_UNIX, pack('Sa*', 1, \"\\0$ARGV[1]\"))"
    " : (AF_INET, pack_sockaddr_in($ARGV[1], INADDR_LOOPBACK)); socket($s, $f, SOCK_STREAM, 0);"
    "connect($s, $a) or exit; print <$s>"
)
N = 0x5A17
TRACES = {
    "file at home": ("echo {secret} >~/left", "cat ~/left; cat /proc/*/root/home/agent/left /proc/*/cwd/left"),
    "temporary file": ("echo {secret} >/tmp/left", "cat /tmp/left"),
    "shared memory file": ("echo {secret} >/dev/shm/left", "cat /dev/shm/*"),
    "process": ("setsid sleep 999 {secret} 2>/dev/null & (exec -a {secret} sleep 999) & true", "cat /proc/*/cmdline"),
    "variable": ("export X={secret}; sleep 99 &", "echo $X; cat /proc/*/environ"),
    "shared memory": (perl(SHM, N, "{secret}"), perl(FIND_SHM, N) + "; ipcs -m"),
    "abstract socket": (perl(LISTEN, "unix", "left", "{secret}"), perl(CALL, "unix", "left")),
    "loopback": (perl(LISTEN, "inet", 5017, "{secret}"), perl(CALL, "inet", 5017)),
    "user keyring": (
        perl(KEY, number("add_key"), "left", "{secret}", -4),
        perl(FIND_KEY, number("keyctl"), number("keyctl") - 1, "left", -4),
    ),
    "session keyring": (
        perl(KEY, number("add_key"), "left", "{secret}", -3),
        perl(FIND_KEY, number("keyctl"), number("keyctl") - 1, "left", -3),
    ),
    "program": (
        "mkdir -p ~/bin /usr/local/bin; echo 'echo {secret}' >/usr/local/bin/ls; hash -p ~/bin/x ls",
        "ls; cat /usr/local/bin/ls",
    ),
    "host name": ("hostname {secret}; sudo hostname {secret}", "hostname; cat /proc/sys/kernel/hostname"),
}


@pytest.fixture(scope="module")
def pair(sandbox_ready: None) -> Iterator[SandboxPool]:
    pool = SandboxPool(PATIENT, size=2)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def single(sandbox_ready: None) -> Iterator[SandboxPool]:
    pool = SandboxPool(PATIENT, size=1)
    try:
        yield pool
    finally:
        pool.close()


def leave(sandbox: Sandbox, trace: str) -> tuple[str, str]:
    """Leaves the trace; returns the secret, and what finds it."""
    secret = uuid.uuid4().hex
    left, look = TRACES[trace]
    sandbox.run(left.replace("{secret}", secret))
    return secret, look


# May be impossible even within one episode.
REFUSED = (
    *("user keyring", "session keyring", "host name", "program"),
    *("shared memory file", "shared memory", "abstract socket", "loopback"),
)


def appears(secret, sandbox, look, within_s=10.0) -> bool:
    """A process that was left running has its name only once it has been executed."""
    until = time.monotonic() + within_s
    while secret not in sandbox.run(look).stdout:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("trace", TRACES)
def test_no_episode_sees_what_is_beside_it(trace, pair):
    first, second = pair.take(), pair.take()
    try:
        secret, look = leave(first, trace)
        if trace not in REFUSED:
            assert appears(secret, first, look)  # it is there to be found
        assert secret not in second.run(look).stdout
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("trace", TRACES)
def test_no_episode_sees_what_was_before_it(trace, single):
    first = single.take()
    secret, look = leave(first, trace)
    first.close()
    for _ in range(2):
        second = single.take()
        try:
            assert secret not in second.run(look).stdout
        finally:
            second.close()


def test_traces_that_may_be_refused_inside_are_real_outside():
    secret = uuid.uuid4().hex
    for trace in ("user keyring", "session keyring"):
        left, look = (part.replace("left", secret[:8]).replace("{secret}", secret) for part in TRACES[trace])
        forget = perl(
            "my ($t, $n) = ('user', $ARGV[1]); my $k = syscall($ARGV[0]+0, 10, $ARGV[2]+0, $t, $n, 0);"
            "syscall($ARGV[0]+0, 3, $k) if $k > 0",
            number("keyctl"),
            secret[:8],
            -4 if trace == "user keyring" else -3,
        )
        found = outside(f"{left}; {look}; {forget}")
        # Kernels may be built without keyrings, and a session may not hold its user's: then the key is made and not read.
        assert secret in found or found.startswith("-1") or found.rstrip("\0").isdigit()


KEYED = """
import ctypes, subprocess, sys
from subl_jax.settings.bash.sandbox import Limits, SandboxPool
add_key, keyctl, secret, look = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode(), sys.argv[4]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(keyctl, 1, None)  # a session keyring of this process alone
libc.syscall(add_key, b"user", b"left", secret, len(secret), -3)
print("control", subprocess.run(look, shell=True, stdout=subprocess.PIPE).stdout.decode(errors="replace"))
pool = SandboxPool(Limits(wall_s=30), size=1)
print("inside", pool.take().run(look + "; cat /proc/keys").stdout)
pool.close()
"""


def test_no_key_of_this_process_is_read(sandbox_ready):
    secret, look = uuid.uuid4().hex, TRACES["session keyring"][1]
    arguments = [str(number("add_key")), str(number("keyctl")), secret, look]
    seen = python(KEYED, *arguments).communicate(timeout=60)[0]
    control, _, inside = seen.partition("inside")
    assert secret in control or "\0" in control
    assert "control" in seen and secret not in inside


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """The program in an interpreter of its own, started like any that uses the library."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


ORPHANS = """
import sys, time
from subl_jax.settings.bash.sandbox import Limits, SandboxPool
duration = sys.argv[1]
pool = SandboxPool(Limits(wall_s=100), size=2)
episodes = [pool.take(), pool.take()]
episodes[0].run(f"setsid nohup sleep {duration} >/dev/null 2>&1 & (trap '' HUP TERM; exec sleep {duration}) & true")
episodes[1].run(f"sleep {duration} &")
print("started", flush=True)
if sys.argv[2] == "waiting":
    time.sleep(100)
elif sys.argv[2] == "in a command":
    episodes[1].run(f"sleep {duration}")
elif sys.argv[2] == "leaving":
    sys.exit(0)
elif sys.argv[2] == "forgetting":
    del episodes, pool
    import gc
    gc.collect()
    print("forgotten", flush=True)
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("moment", "kill"),
    [
        ("waiting", signal.SIGKILL),
        ("waiting", signal.SIGTERM),
        ("in a command", signal.SIGKILL),
        ("leaving", None),
        ("forgetting", None),
    ],
)
def test_nothing_survives_the_death_of_the_parent(moment, kill, sandbox_ready):
    duration = f"{10**6 + uuid.uuid4().int % 10**9}"
    parent = python(ORPHANS, duration, moment)
    assert parent.stdout is not None and parent.stdout.readline() == "started\n"
    below = set()
    if kill is not None:
        assert within(5, lambda: len(set(marked(f"sleep\0{duration}"))) >= 3 + (moment == "in a command"))
        below = descendants(parent.pid)
        parent.send_signal(kill)
        parent.wait(20)
    elif moment == "forgetting":
        assert parent.stdout.readline() == "forgotten\n"
    else:
        parent.wait(20)
    try:
        assert within(2 if kill else 5, lambda: not [p for p in marked(duration) if p != parent.pid])
        # Neither the keepers nor whatever else was started.
        assert within(3, lambda: not [p for p in below if p != parent.pid and Path(f"/proc/{p}/stat").exists()])
    finally:
        parent.kill()
        parent.communicate()
