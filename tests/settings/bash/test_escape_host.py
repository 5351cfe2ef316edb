"""Attacks on the host's files and on privilege, as a model would write them. Each is shown to work outside."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from subl_jax.settings.bash.sandbox import Limits, SandboxPool
from tests.settings.bash.attacks import lines, outside, perl

# The machine may be busy, and nothing may hide behind a cut: time and output are attacked elsewhere.
PATIENT = Limits(wall_s=30, output_bytes=2**20)
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def secrets() -> Iterator[dict[Path, str]]:
    """A file that everybody on this machine may read, in each place of the host that this user may write to."""
    places = {
        Path("/home"),
        Path("/root"),
        Path.home(),
        Path("/var/tmp"),
        Path("/dev/shm"),
        Path(tempfile.gettempdir()),
    }
    made: dict[Path, str] = {}
    try:
        for place in places:
            if os.access(place, os.W_OK):
                directory = Path(tempfile.mkdtemp(prefix="escape-", dir=place))
                directory.chmod(0o755)
                path = directory / "secret"
                made[path] = uuid.uuid4().hex
                path.write_text(made[path])
        yield made
    finally:
        for path in made:
            shutil.rmtree(path.parent)


READS = {
    "by its path": "cat {path}",
    "by a long way up": "cat ../../../../../../../..{path}",
    "through the roots of processes": "cat /proc/self/root{path} /proc/*/root{path}",
    "through the directories of processes": "for d in /proc/*/cwd; do cat $d/../../../../../../..{path}; done",
    "through descriptors": "for d in ${{fds:-/proc/*/fd/*}}; do cat $d/../../../../../../..{path}; done;"
    " cd /proc/self/fd/; cat ..{path}",
    "by symbolic links": "ln -s / r; cat r{path}; ln -s {path} s; cat s; ln -s /proc/1/root p; cat p{path}",
    "by a hard link": "ln {path} h; cat h",
    "by its name": "for p in ${{where:-/[!pu]* /proc/self/root/[!pu]*}}; do find $p -name escape-\\*; done"
    " | xargs -I@ cat @/secret",
    "through every mount": "while read -r _ _ _ root at _; do cat $at{path} $at/${{path#$root}}; done </proc/self/mountinfo",
}


@pytest.mark.parametrize("way", READS)
def test_no_file_of_the_host_is_read(way, sandbox, secrets):
    assert secrets
    for path, secret in secrets.items():
        command = f"path={path}; " + READS[way].format(path=path)
        # The attack is a real one. (The search starts nearer: this machine may have many files.)
        assert secret in outside(f"where={path.parent.parent} fds='/proc/self/fd/*'; exec 9<.; {command}", path.parent)
        for link in ("r", "s", "p", "h"):
            (path.parent / link).unlink(missing_ok=True)
        result = sandbox.run(command)
        assert result.status == "ok"
        assert secret not in result.stdout + result.stderr


def test_neither_passwords_nor_this_repository_are_read(sandbox):
    here = Path(__file__)
    assert "subl_jax" in outside(f"cat {here}")
    result = sandbox.run(f"cat {here}; ls {REPOSITORY} /root; find / -name {here.name} -not -path '/proc/*'")
    assert result.stdout == ""
    # Accounts are the sandbox's own: neither a password nor the file for one, and nobody of the host.
    result = sandbox.run("cat /etc/shadow /etc/gshadow /etc/sudoers /proc/*/root/etc/shadow; ls -A /root /home")
    assert lines(result.stdout) == ["agent"] or result.stdout == "/home:\nagent\n"
    names = {line.split(":")[0] for line in sandbox.run("cat /etc/passwd").stdout.splitlines()}
    host = {line.split(":")[0] for line in Path("/etc/passwd").read_text().splitlines()}
    assert "agent" in names and names & host <= {"root", "nobody"}


def test_the_system_inside_is_no_more_than_programs_and_a_few_settings(sandbox):
    top = set(sandbox.run("ls -A /").stdout.split())
    assert top <= {
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "proc",
        "run",
        "sbin",
        "tmp",
        "usr",
        "var",
    }
    settings = set(sandbox.run("ls -A /etc").stdout.split())
    assert settings <= {
        "alternatives",
        "group",
        "ld.so.cache",
        "ld.so.conf",
        "ld.so.conf.d",
        "nsswitch.conf",
        "passwd",
    } | {"hostname", "hosts"}
    devices = set(sandbox.run(r"find /dev -type b -o -type c -printf '%p\n'").stdout.split())
    assert devices <= {
        f"/dev/{name}" for name in ("console", "full", "null", "ptmx", "random", "tty", "urandom", "zero")
    } | {"/dev/pts/ptmx"}


def test_no_variable_of_this_process_is_seen(sandbox_ready, monkeypatch):
    secret = uuid.uuid4().hex
    monkeypatch.setenv("API_TOKEN", secret)
    attack = "env; cat /proc/*/environ; tr '\\0' ' ' </proc/self/environ; set; cat /proc/*/cmdline"
    assert secret in outside(attack)
    pool = SandboxPool(PATIENT, size=1)
    try:
        sandbox = pool.take()
        result = sandbox.run(attack)
        assert "PATH=" in result.stdout and secret not in result.stdout
        assert secret not in sandbox.inspect("env; cat /proc/*/environ").stdout
    finally:
        pool.close()


def test_no_descriptor_of_this_process_is_inherited(sandbox_ready, tmp_path):
    secret = uuid.uuid4().hex
    (tmp_path / "secret").write_text(secret)
    # (Pipes are left alone: reading them on the host would take what others write.)
    attack = "for d in /proc/{}/fd/*; do [ -p $d ] || timeout 1 cat $d; cat $d/secret; done </dev/null"
    held = [os.open(tmp_path / "secret", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)]
    try:
        for descriptor in held:
            os.set_inheritable(descriptor, True)
        assert outside(attack.format("self"), close_fds=False).count(secret) >= 2
        pool = SandboxPool(PATIENT, size=1)
        try:
            sandbox = pool.take()
            assert secret not in sandbox.run(f"{attack.format('self')}; {attack.format('*')}").stdout
            listed = sandbox.run(r"find /proc/*/fd -type l -printf '%l\n'; readlink /proc/$$/fd/*")
        finally:
            pool.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
    own = ("pipe:", "socket:", "anon_inode:", "/dev/null", "/dev/full", "/proc/", "/home/agent", "/tmp/")
    assert lines(listed.stdout) and [link for link in lines(listed.stdout) if not link.startswith(own)] == []


SYSTEM = (
    "/usr/bin/new",
    "/usr/new",
    "/bin/new",
    "/lib/new",
    "/etc/new",
    "/new",
    "/usr/bin/bash",
    "/etc/passwd",
    "/etc/group",
)


@pytest.mark.parametrize("path", SYSTEM)
def test_the_system_is_not_written(path, sandbox):
    def attack(path):
        return f"chown agent {path} $(dirname {path}); chmod 777 {path} $(dirname {path}); echo stolen >>{path}"

    assert sandbox.run(attack("/home/agent/mine")).code == 0 and sandbox.run("cat mine").stdout == "stolen\n"
    before = Path(path).read_bytes() if Path(path).exists() else None
    assert sandbox.run(attack(path)).code != 0
    assert (Path(path).read_bytes() if Path(path).exists() else None) == before
    assert "stolen" not in sandbox.run(f"tail -c 100 {path}").stdout
    assert sandbox.run(f"mv {path} {path}.old; rm -f {path}; ln -sf /tmp/x {path}; cp mine {path}").code != 0


def test_nothing_but_its_own_places_is_writable_even_after_taking_all_it_can(sandbox):
    # The agent may change owners and modes: it takes first whatever the kernel lets it take.
    taken = sandbox.run("chown agent / /* /*/* 2>&1; chmod 777 / /* /*/* 2>&1; true")
    assert taken.status == "ok"
    found = sandbox.run(r"find / -path '/proc/[0-9]*' -prune -o -not -type l -not -type c -writable -print")
    assert "/home/agent" in lines(found.stdout)
    # Its disk, the record's one-way pipe, and devices that swallow or make (whose places the directory calls files).
    devices = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
    own = ("/home", "/tmp", "/run/channel", *devices)
    assert [path for path in lines(found.stdout) if not path.startswith(own)] == []


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/user/max_user_namespaces",
        "/dev/mem",
        "/dev/kmem",
    ],
)
def test_the_kernel_is_not_written(path, sandbox):
    # What is written is harmless if it comes through: "h" lists the keys, the others get their own value back.
    assert sandbox.run(f"chmod 666 {path}; chown agent {path}; v=$(cat {path}); echo ${{v:-h}} >{path}").code != 0
    assert sandbox.run(f"v=$(cat /proc/sys/kernel/pid_max); dd if={path} bs=1 count=1").code != 0 or path.startswith(
        "/proc/sys"
    )


def test_sys_and_its_cgroups_are_absent_or_read_only(sandbox):
    assert sandbox.run("find /sys -writable 2>/dev/null | head -1").stdout == ""
    assert sandbox.run("mkdir /sys/fs/cgroup/mine /sys/fs/cgroup/*/mine").code != 0


LINKS = {
    "write through a symbolic link": "ln -s /etc/passwd p; echo x::0:0::/:/bin/bash >>p; tail -n 1 /etc/passwd",
    "replace through a linked directory": "ln -s /usr/bin b; echo x >b/ls; cat b/ls | head -c 2",
    "write the running program": "echo x >/proc/self/exe; echo x >/proc/1/exe; head -c 2 /proc/self/exe",
    "write through the root of the first process": "echo x >/proc/1/root/usr/x; echo x >/proc/1/cwd/usr/x; ls /usr/x",
    "hard link to the system": "ln /usr/bin/bash l; ln /etc/passwd q; ls l q",
    "bind by a link to a descriptor": "exec 9</usr/bin/bash; ln -L /proc/self/fd/9 l; echo x >/proc/self/fd/9; ls l",
}


@pytest.mark.parametrize("trick", LINKS)
def test_links_lead_nowhere(trick, sandbox):
    digest = "sha256sum /etc/passwd /etc/group /usr/bin/ls /usr/bin/bash; ls -d /usr/x /usr/bin"
    before, host = sandbox.run(digest), outside(digest)
    result = sandbox.run(LINKS[trick])
    assert "x::0:0" not in result.stdout and lines(result.stdout) not in (["l", "q"], ["l"], ["x"], ["/usr/x"])
    assert (sandbox.run(digest).stdout, outside(digest)) == (before.stdout, host)


def test_no_device_node_is_made_or_opened(sandbox):
    commands = ("mknod sda b 8 0", "mknod mem c 1 1", "mknod null c 1 3", "mknod kmsg c 1 11")
    assert [sandbox.run(command).code for command in commands] == [1] * 4
    assert sandbox.run("find . -type b -o -type c").stdout == ""
    assert sandbox.run("mknod pipe p").code == 0  # it is the device that is refused, not the command


STATUS = "cat /proc/self/status"


def test_the_agent_holds_two_capabilities_and_gains_no_other(sandbox):
    fields = dict(line.split(":\t", 1) for line in lines(sandbox.run(STATUS).stdout))
    two = f"{1 << 0 | 1 << 3:016x}"  # CAP_CHOWN, CAP_FOWNER
    assert {name: fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")} == dict.fromkeys(
        ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"), two
    )
    assert fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split() == fields["Gid"].split() == ["1000"] * 4
    assert set(fields["Groups"].split()) <= {"1000", "2000"}


GAINS = {
    "set-user-id": "cp /usr/bin/cat c && chown 0:0 c && chmod 6755 c && stat -c %a:%u:%g c && ./c /proc/self/status",
    "set-user-id shell": "cp /usr/bin/bash c && chown 0 c && chmod u+s c && stat -c %a:%u c && ./c -p -c 'cat /proc/$$/status'",
    "file capabilities": "cp /usr/bin/cat c && setcap cap_sys_admin,cap_dac_override+ep c; ./c /proc/self/status",
    "another user": perl("$< = 0; $> = 0; $( = 0; exec 'cat', '/proc/self/status'"),
    "ambient": "setpriv --ambient-caps +all --inh-caps +all cat /proc/self/status; cat /proc/self/status",
    "sudo": "sudo cat /proc/self/status; su -c 'cat /proc/self/status'; cat /proc/self/status",
    "programs of the system": "for f in $(find /usr/bin /usr/sbin /usr/lib -maxdepth 3 -perm /6000 -type f); do"
    " echo | timeout -s KILL 0.2 $f; done; cat /proc/self/status",
}


@pytest.mark.parametrize("way", GAINS)
def test_no_privilege_is_gained(way, sandbox):
    result = sandbox.run(GAINS[way])
    if way.startswith("set-user-id"):
        assert result.stdout.startswith(("6755:0:0", "4755:0"))  # the file was made: it is the run that gains nothing
    statuses = result.stdout.split("Name:")[1:]
    assert statuses
    for status in statuses:
        fields = dict(line.split(":", 1) for line in lines(status)[1:])
        assert fields["Uid"].split() == ["1000"] * 4
        assert int(fields["CapEff"], 16) | int(fields["CapPrm"], 16) <= 9 and int(fields["CapBnd"], 16) == 9


# What each descriptor and the terminal of the process take as typed input, and how many took it.
TYPING = r"""
my $typed = 0;
for my $name ("/dev/tty", "/dev/console", map { "/proc/self/fd/$_" } 0..9) {
    for my $mode ("+<", "<") {
        open(my $f, $mode, $name) or next;
        $typed++ if ioctl($f, 0x5412, my $key = "Z");  # TIOCSTI
        last;
    }
}
print "typed $typed\n";
"""
TERMINAL = """
import os, sys
from subl_jax.settings.bash.sandbox import Limits, SandboxPool
pool = SandboxPool(Limits(wall_s=30), size=1)
sandbox = pool.take()
print(sandbox.run(sys.argv[1]).stdout, sandbox.run("tty; echo X >/dev/tty; ps -o tty= $$").stdout, flush=True)
pool.close()
"""


def test_nothing_is_typed_into_the_terminal_of_this_process(sandbox_ready):
    def in_a_terminal(argv: list[str]) -> bytes:
        """All that appears at a terminal whose session leader is the program; typed input is echoed there."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(argv[0], argv, {**os.environ, "PYTHONPATH": str(REPOSITORY)})
        seen = b""
        try:
            while piece := os.read(terminal, 4096):
                seen += piece
        except OSError:
            pass  # the last holder of the terminal is gone
        finally:
            os.close(terminal)
        assert os.waitpid(pid, 0)[1] == 0, seen
        return seen

    control = in_a_terminal(["/usr/bin/perl", "-e", TYPING])
    if b"typed 0" not in control:  # newer kernels refuse even this
        assert control.count(b"Z") > 0
    seen = in_a_terminal([sys.executable, "-c", TERMINAL, perl(TYPING)])
    assert b"typed 0" in seen and b"not a tty" in seen and b"Z" not in seen and b"X" not in seen


def test_escape_sequences_come_back_as_text_and_reach_no_terminal(sandbox, capfd):
    codes = "\x1b]0;title\x07\x1b[2J\x1b[6n\x1bc\x9b31m"
    result = sandbox.run(f"printf '%s' $'{codes!r}'".replace("''", "'"))
    assert result.stdout == codes.replace("\x9b", "\ufffd") or result.stdout == codes
    assert capfd.readouterr() == ("", "")


def test_this_machine_can_show_what_the_controls_need():
    assert subprocess.run(["perl", "-e", "print 1"], capture_output=True, check=True).stdout == b"1"
