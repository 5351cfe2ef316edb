"""Attacks on the network, on other processes and through namespaces. Each is shown to work outside the sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from subl_jax.settings.bash.sandbox import Limits
from tests.settings.bash.attacks import alive, lines, number, outside, perl

PATIENT = Limits(wall_s=8, output_bytes=2**20)


@contextlib.contextmanager
def greeting(family: socket.AddressFamily, address: Any) -> Iterator[tuple[str, Any]]:
    """A server that says a secret to whoever connects, and its address."""
    secret = uuid.uuid4().hex
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen(8)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as client:
                        client.sendall(secret.encode() + b"\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield secret, server.getsockname()
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_no_listener_of_this_machine_is_reached(sandbox):
    with greeting(socket.AF_INET, ("0.0.0.0", 0)) as (secret, (_, port)):
        addresses = ["127.0.0.1", "0.0.0.0", "localhost", *outside("hostname -I").split()]
        addresses = [each for each in addresses if ":" not in each]
        attack = f"for a in {' '.join(addresses)}; do (exec 3<>/dev/tcp/$a/{port} && cat <&3); done"
        assert outside(attack).count(secret) >= 2
        result = sandbox.run(attack)
        assert result.stdout == "" and result.stderr.count("not permitted") >= 1  # the socket itself


def test_no_listener_is_reached_by_the_other_internet_protocol(sandbox):
    with greeting(socket.AF_INET6, ("::1", 0)) as (secret, (_, port, *_)):
        attack = f"(exec 3<>/dev/tcp/::1/{port} && cat <&3)"
        assert secret in outside(attack)
        assert sandbox.run(attack).stdout == ""


def test_no_abstract_socket_of_this_machine_is_reached(sandbox):
    name = uuid.uuid4().hex
    with greeting(socket.AF_UNIX, f"\0{name}") as (secret, _):
        code = 'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); connect(S, pack("Sa*", 1, "\\0$ARGV[0]")) or die $!; print <S>'
        assert secret in outside(perl(code, name))
        result = sandbox.run(perl(code, name))
        assert result.stdout == "" and result.code != 0
        assert name not in sandbox.run("cat /proc/net/unix /proc/*/net/unix").stdout


def test_no_datagram_leaves(sandbox):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        attack = f"echo hello >/dev/udp/127.0.0.1/{server.getsockname()[1]}"
        outside(attack)
        assert server.recv(100) == b"hello\n"
        sandbox.run(attack)
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(100)


def test_there_is_no_interface_route_or_name_service(sandbox):
    interfaces = sandbox.run("tail -n +3 /proc/net/dev | cut -d: -f1").stdout.split()
    assert set(interfaces) <= {"lo"}
    # The addresses are reserved for documentation and for an experiment's own network: nothing is disturbed if they leave.
    sent = sandbox.run("for a in 192.0.2.1 169.254.169.254 10.0.0.1; do (exec 3<>/dev/tcp/$a/80) && echo sent; done")
    assert sent.stdout == "" and sent.stderr.count("not permitted") >= 3
    assert sandbox.run("getent ahosts example.com").stdout == ""


SOCKETS = {
    "local": (1, 1, 0),  # none is needed, and abstract ones pass by the file system
    "raw": (2, 3, 1),
    "packet": (17, 3, 0),
    "virtual machine": (40, 1, 0),  # no network namespace holds these: they reach the host of a virtual machine
    "crypto": (38, 5, 0),
    "bluetooth": (31, 3, 1),
}


@pytest.mark.parametrize("kind", SOCKETS)
def test_no_socket_that_goes_round_the_network_namespace_is_made(kind, sandbox):
    code = "print socket(my $s, $ARGV[0], $ARGV[1], $ARGV[2]) ? 'made' : 'refused'"
    assert outside(perl(code, 1, 1, 0)) == "made"
    assert sandbox.run(perl(code, *SOCKETS[kind])).stdout == "refused"


CLONE_NEWUSER, CLONE_NEWNS, CLONE_NEWNET = 0x10000000, 0x00020000, 0x40000000
NAMESPACES = {
    "unshare -U": "unshare -U id -u",
    "unshare -r": "unshare -r id -u",
    "all at once": "unshare -Urmpf id -u",
    "unshare()": perl("print 'made' unless syscall($ARGV[0], $ARGV[1]+0)", number("unshare"), CLONE_NEWUSER),
    "clone()": perl(
        "my $p = syscall($ARGV[0]+0, $ARGV[1]+0, 0, 0, 0, 0); if ($p == 0) { print 'made'; exit } waitpid($p, 0) if $p > 0",
        number("clone"),
        CLONE_NEWUSER | 17,
    ),
    "clone3()": perl(
        "my $a = pack('Q8', $ARGV[1], 0, 0, 0, 17, 0, 0, 0); my $p = syscall($ARGV[0]+0, $a, 64);"
        "if ($p == 0) { print 'made'; exit } waitpid($p, 0) if $p > 0",
        number("clone3"),
        CLONE_NEWUSER,
    ),
}


@pytest.mark.parametrize("way", NAMESPACES)
def test_no_user_namespace_is_made_inside(way, sandbox):
    assert outside(NAMESPACES[way]) != ""
    raised = (
        "echo 1000 >/proc/sys/user/max_user_namespaces; sudo sh -c 'echo 1000 >/proc/sys/user/max_user_namespaces'; "
    )
    result = sandbox.run(raised + NAMESPACES[way])
    assert result.stdout == ""


@pytest.mark.parametrize("kind", ["-m", "-n", "-p", "-i", "-u", "-C"])
def test_no_other_namespace_is_made_inside(kind, sandbox):
    assert outside(f"unshare -U {kind} -f echo made") == "made\n"
    result = sandbox.run(f"unshare {kind} -f echo made")
    assert result.stdout == "" and result.code != 0


MOUNTS = {
    "mount a file system": "mount -t tmpfs none /tmp && echo done",
    "bind": "mkdir -p a b; mount --bind a b && echo done",
    "make writable": "mount -o remount,rw,bind / && echo done; mount -o remount,rw,bind /usr && echo done",
    "unmount": "umount /proc && echo done; umount -l /usr/bin/chmod && echo done; umount -l /usr && echo done",
    "another root": "mkdir r; cp /usr/bin/true r; chroot r /true && echo done",
    "pivot_root()": perl("print 'done' unless syscall($ARGV[0], '.', '.')", number("pivot_root")),
    "fsopen()": perl("my $t = 'tmpfs'; print 'done' if syscall($ARGV[0], $t, 0) >= 0", number("fsopen")),
    "open_tree()": perl("my $p = '/'; print 'done' if syscall($ARGV[0]+0, -100, $p, 0x8001) >= 0", number("open_tree")),
    "namespaces of others": "for n in /proc/*/ns/*; do nsenter --${n##*/}=$n echo done; done; nsenter -t 1 -a echo done",
}


@pytest.mark.parametrize("way", MOUNTS)
def test_nothing_is_mounted_or_unmounted_inside(way, sandbox):
    mounts = sandbox.run("cat /proc/self/mountinfo").stdout
    result = sandbox.run(MOUNTS[way])
    assert result.status == "ok" and result.stdout == ""
    assert sandbox.run("cat /proc/self/mountinfo").stdout == mounts


def test_mounts_of_the_attacks_are_possible_where_they_are_allowed(tmp_path):
    for way in ("mount a file system", "bind", "fsopen()", "open_tree()"):
        command = MOUNTS[way].replace("/tmp", str(tmp_path))
        assert (
            "done"
            in subprocess.run(
                ["unshare", "-Urm", "bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False
            ).stdout
        ), way


@pytest.fixture
def victim() -> Iterator[subprocess.Popen]:
    """A process of the host that may be killed."""
    process = subprocess.Popen(["sleep", f"{100000 + uuid.uuid4().int % 10**9}"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


ATTACH = "print syscall($ARGV[0]+0, 16, $ARGV[1]+0, 0, 0) == 0 ? 'attached' : 'refused'"


def test_no_process_of_the_host_is_seen_killed_or_traced(sandbox, victim):
    duration = victim.args[1]
    look = "cat /proc/*/cmdline | tr '\\0' ' '"
    assert duration in outside(look) and outside(perl(ATTACH, number("ptrace"), victim.pid)) == "attached"
    victim.send_signal(signal.SIGCONT)  # the tracer's end leaves it stopped
    assert duration not in sandbox.run(look).stdout
    everyone = sandbox.run("ls -d /proc/[0-9]*").stdout.split()
    assert len(everyone) < 12
    attack = f"kill -9 {victim.pid}; sudo kill -9 {victim.pid}; kill -9 -{victim.pid}"
    if f"/proc/{victim.pid}" not in everyone:
        assert sandbox.run(attack).code != 0
        assert sandbox.run(perl(ATTACH, number("ptrace"), victim.pid)).stdout == "refused"
    for pid in {os.getpid(), os.getppid()}:
        if f"/proc/{pid}" not in everyone:
            assert sandbox.run(f"kill -0 {pid}").code != 0
    assert alive(victim.pid)
    victim.send_signal(signal.SIGTERM)
    assert victim.wait() == -signal.SIGTERM  # it could be killed


def test_killing_everything_hurts_only_inside(patient, victim):
    neighbour, sandbox = patient.take(), patient.take()
    try:
        # A second process of the same numbers within, so that the kill would find it if it left its namespace.
        neighbour.run("sleep 1000 & x=5")
        for attack in ("kill -9 -1", perl("kill 9, -1; kill 9, 1"), "kill -STOP -1"):
            hurt = patient.take()
            hurt.run(attack)
            hurt.close()
        sandbox.run("kill -9 -1; kill -9 1; kill -9 0")
        assert alive(victim.pid)
        assert neighbour.run("echo $x; jobs -r | wc -l").stdout == "5\n1\n"
    finally:
        neighbour.close()
        sandbox.close()


def test_no_process_inside_that_can_do_more_is_traced_read_or_killed(sandbox):
    """The first process and whatever else the sandbox keeps inside are out of the agent's hands."""
    own = "for p in /proc/[0-9]*; do [ -O $p ] || echo ${p##*/}; done"
    others = lines(sandbox.run(own).stdout)
    assert "1" in others
    sleeper = sandbox.run("sleep 100 & echo $!").stdout.strip()
    assert sandbox.run(perl(ATTACH, number("ptrace"), sleeper)).stdout == "refused"  # not even its own
    assert sandbox.run(f"kill -9 {sleeper}").code == 0  # its own it may kill
    for pid in others:
        assert sandbox.run(perl(ATTACH, number("ptrace"), pid)).stdout == "refused"
        assert sandbox.run(f"kill -9 {pid}").code != 0
        read = sandbox.run(f"cat /proc/{pid}/environ /proc/{pid}/maps; ls /proc/{pid}/fd; head -c 1 /proc/{pid}/mem")
        assert read.stdout == ""
    assert lines(sandbox.run(own).stdout) == others


def test_what_runs_beside_a_predicate_cannot_reach_into_it(patient):
    """Our scripts run as sandbox root beside what the agent left running; it sees, steals and plants nothing."""
    sandbox = patient.take()
    try:
        planted = "#!/bin/sh\necho planted >/tmp/planted\n"
        sandbox.run(
            f"for f in ls cat id stat test sh bash env .bashrc .profile .bash_profile; do printf {planted!r} >~/$f; done;"
            "chmod +x ~/* ~/.[b-p]*;"
            "export BASH_ENV=~/.bashrc ENV=~/.profile PATH=~:$PATH LD_PRELOAD=/home/agent/x.so;"
            "id() { echo planted; }; export -f id; cp -r ~/. /tmp"
        )
        sandbox.run(
            "(for i in $(seq 400); do for p in /proc/[0-9]*; do [ -O $p ] || { cat $p/environ; cat $p/fd/*; echo x >$p/fd/1;"
            "kill -9 ${p##*/} && echo killed; }; done; done) >/tmp/stolen 2>/dev/null &"
        )
        for user, uid in (("root", "0"), ("anna", "1001")):
            for _ in range(5):
                result = sandbox.inspect("id -u; ls /home; sleep 0.02; cat /etc/hostname; echo end", user)
                assert (result.stdout, result.status) == (f"{uid}\nagent\nsandbox\nend\n", "ok"), result
        assert sandbox.run("cat /tmp/planted; grep -c . /tmp/stolen").stdout.strip() in ("", "0")
    finally:
        sandbox.close()
