"""The preflight: the whole of it on this machine, and each cause for which another cannot run the sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from subl_jax.settings.bash.sandbox import Host, SandboxUnavailable, client, preflight, seccomp, stand_ins
from tests.settings.bash.attacks import descendants, within

SETUP = "make setup-sandbox"


def test_it_passes_here_soon_and_once(sandbox_ready):
    start = time.monotonic()
    report = preflight()
    assert preflight() is report and time.monotonic() - start < 0.1
    before = descendants()
    fresh = preflight(Host())
    assert fresh.seconds < 10
    assert within(5, lambda: descendants() <= before)


def test_it_passes_without_a_writable_cgroup(sandbox_ready):
    report = preflight(Host(cgroups=False))
    assert not report.memory_is_held


# Causes that are seen before anything is started.


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pieces of another machine, on which nothing at all may be started."""

    def started(*arguments: object, **_: object) -> None:
        raise AssertionError(f"started {arguments}")

    for name in ("Popen", "run"):
        monkeypatch.setattr(subprocess, name, started)
    monkeypatch.setattr(os, "fork", started)
    settings = tmp_path / "proc/sys"
    for name, text in {"user/max_user_namespaces": "1000", "kernel/cap_last_cap": "40"}.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(text)
    (tmp_path / "proc/self").mkdir()
    for kind in ("uid", "gid"):
        (tmp_path / f"proc/self/{kind}_map").write_text("0 0 4294967295\n")
    (tmp_path / "etc").mkdir()
    for kind in ("uid", "gid"):
        (tmp_path / f"etc/sub{kind}").write_text("somebody:100000:65536\n")
    (tmp_path / "bin").mkdir()
    return tmp_path


def host(other: Path, without: str = "", **fields: object) -> Host:
    """An ordinary user's machine, whole but for a program and `fields`."""
    for program in ("bwrap", "setfacl", "newuidmap", "newgidmap"):
        link = other / "bin" / program
        if program != without and not link.is_symlink():
            link.symlink_to(shutil.which(program) or "/usr/bin/true")
    usual = {"user": 4321, "name": "somebody", "path": f"{other}/bin", "proc": other / "proc", "etc": other / "etc"}
    return Host(**{**usual, **fields})  # type: ignore[arg-type]  # a test's own fields


def refusal(machine: Host) -> str:
    """The one message."""
    with pytest.raises(SandboxUnavailable) as raised:
        preflight(machine)
    said = str(raised.value)
    assert said.startswith("the Bash sandbox is not available: ") and said.count("to remedy it: ") == 1
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("program", "package"),
    [("bwrap", "bubblewrap"), ("setfacl", "acl"), ("newuidmap", "uidmap"), ("newgidmap", "uidmap")],
)
def test_a_missing_program_is_named_with_its_package(program, package, other):
    said = refusal(host(other, without=program))
    assert f"{program} not found" in said and SETUP in said and f"apt-get install {package}" in said


def test_all_missing_programs_are_named_at_once(other):
    said = refusal(host(other, path=str(other / "nowhere")))
    assert "bwrap, setfacl, newuidmap, newgidmap not found" in said
    assert said.endswith("apt-get install bubblewrap acl uidmap")


def test_a_bubblewrap_from_elsewhere_is_refused(other):
    machine = host(other, without="bwrap")
    fake = other / "bin/bwrap"
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    assert f"{fake} is not the system's bubblewrap" in refusal(machine)


@pytest.mark.parametrize("kind", ["uid", "gid"])
@pytest.mark.parametrize(
    "lent", ["", "other:100000:65536\n", "somebody:100000:1000\n", "somebody:x\n", None], ids=lambda text: repr(text)
)
def test_missing_sub_ids_are_told(kind, lent, other):
    path = other / f"etc/sub{kind}"
    path.unlink()
    if lent is not None:
        path.write_text(lent)
    said = refusal(host(other))
    assert f"user somebody has no 65536 subordinate {kind}s" in said
    assert SETUP in said and "usermod --add-subuids" in said


def test_a_root_without_enough_users_is_told(other):
    (other / "proc/self/uid_map").write_text("0 100000 1000\n")
    assert "root is itself in a user namespace" in refusal(host(other, user=0))


@pytest.mark.parametrize(
    ("setting", "value", "user"),
    [
        ("user/max_user_namespaces", "0", 0),
        ("user/max_user_namespaces", "0", 4321),
        ("kernel/unprivileged_userns_clone", "0", 4321),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", 4321),
    ],
)
def test_forbidden_user_namespaces_are_told_with_their_setting(setting, value, user, other):
    (other / "proc/sys" / setting).write_text(value)
    said = refusal(host(other, user=user))
    assert "user namespaces" in said and setting.replace("/", ".") in said and "sysctl -w" in said


def test_a_kernel_without_user_namespaces_is_told(other):
    (other / "proc/sys/user/max_user_namespaces").unlink()
    assert "no user namespaces" in refusal(host(other))


@pytest.mark.parametrize("null", ["file", "device for root only", "nothing"])
def test_an_odd_null_device_is_told(null, other):
    path = other / "null"
    if null == "file":
        path.touch(0o666)
    elif null == "device for root only":
        path = next(
            (each for each in Path("/dev").iterdir() if each.is_char_device() and not each.stat().st_mode & 6), path
        )
    said = refusal(host(other, null=path))
    assert f"{path} is not the device" in said and "mknod -m 666" in said


@pytest.mark.parametrize("release", ["4.19.0-27-amd64", "5.7.0", "3.10.0-1160.el7.x86_64"])
def test_an_old_kernel_is_told(release, other):
    assert f"Linux {release} is too old" in refusal(host(other, kernel=release))


def test_a_kernel_that_counts_processes_for_all_sandboxes_needs_a_cgroup(other):
    assert "no cgroup is writable" in refusal(host(other, kernel="5.10.0", cgroups=False))


def test_a_machine_without_a_filter_is_told(other):
    assert "no system call filter for riscv64" in refusal(host(other, machine="riscv64"))


# Causes that only a start shows.


def test_a_command_that_does_nothing_is_told(sandbox_ready, monkeypatch):
    whole = stand_ins.stand_ins()
    for name in ("chmod", "chown", "chgrp", "setfacl"):
        broken = whole[name].replace(f'exec {name} "$@"', "exit 0")
        assert broken != whole[name]
        monkeypatch.setattr(stand_ins, "stand_ins", lambda name=name, broken=broken: {**whole, name: broken})
        said = refusal(Host())
        assert f"{name} does not work inside" in said and SETUP in said


def test_a_chown_that_fails_is_told_with_its_words(sandbox_ready, monkeypatch):
    whole = stand_ins.stand_ins()
    broken = "#!/bin/sh\necho 'chown: Invalid argument' >&2\nexit 1\n"
    monkeypatch.setattr(stand_ins, "stand_ins", lambda: {**whole, "chown": broken})
    said = refusal(Host())
    assert "chown does not work inside (chown: Invalid argument)" in said and "sub-uids" in said


def test_a_command_that_is_not_recorded_is_told(sandbox_ready, monkeypatch):
    whole = stand_ins.stand_ins()
    silent = whole["setfacl"].replace("> /run/channel", "> /dev/null")
    monkeypatch.setattr(stand_ins, "stand_ins", lambda: {**whole, "setfacl": silent})
    assert "calls of setfacl are not recorded" in refusal(Host())


# One instruction that allows everything, so that the process is still under a filter.
ALL_ALLOWED = b"\x06\0\0\0\0\0\xff\x7f"


def test_a_filter_that_does_not_filter_is_told(sandbox_ready, monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine: ALL_ALLOWED)
    assert "it does not hold: there is a network inside" in refusal(Host())


@pytest.mark.parametrize("program", [b"", b"\0" * 8], ids=["empty", "invalid"])
def test_a_filter_that_cannot_be_installed_starts_nothing(program, sandbox_ready, monkeypatch):
    monkeypatch.setattr(seccomp, "program", lambda machine: program)
    assert "no sandbox can be started" in refusal(Host())


@pytest.mark.parametrize(
    ("step", "words"),
    [("unshare", "sysctl user.max_user_namespaces"), ("map", SETUP), ("root", "allow mounts"), ("start", SETUP)],
)
def test_a_keeper_that_is_refused_tells_the_step(step, words, sandbox_ready, monkeypatch):
    code = (
        "import socket, sys; channel = socket.socket(fileno=int(sys.argv[2])); channel.recv(1 << 20);"
        f'channel.send(b\'{{"step": "{step}", "error": "Operation not permitted"}}\')'
    )
    monkeypatch.setattr(client, "_START", code)
    said = refusal(Host())
    assert "Operation not permitted" in said and words in said


@pytest.mark.parametrize("code", ["pass", "import os; os.kill(os.getpid(), 9)"])
def test_a_keeper_that_dies_is_told(code, sandbox_ready, monkeypatch):
    monkeypatch.setattr(client, "_START", code)
    assert "its keeper did not start" in refusal(Host())


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_filters_are_whole_and_their_jumps_stay_inside(machine):
    program = seccomp.program(machine)
    lines = [program[start : start + 8] for start in range(0, len(program), 8)]
    assert len(program) % 8 == 0 and 50 < len(lines) < 4096
    assert lines[-1][0] == 0x06
    for place, line in enumerate(lines):
        if line[0] & 7 == 5:
            assert place + 1 + max(line[2], line[3]) < len(lines)
