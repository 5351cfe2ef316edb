"""A machine without the sandbox: the experiment says what is missing and how to get it, and does nothing at all."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TOOLS = ("bwrap", "newuidmap", "newgidmap", "setfacl", "bash", "sh")
# Executed by anything that runs a model's text without the sandbox.
TRAP = '#!/bin/sh\necho "$0 $*" >>{marker}\nexit 127\n'


def experiment(tmp_path: Path, programs: Path, before: str = "") -> tuple[int, str, bool]:
    """Exit code, standard error, and whether a work directory came to be; programs are found in the one directory."""
    workdir = tmp_path / "runs"
    python = [sys.executable, "-m", "experiments.bash_chmod", "--preset=micro", f"--workdir={workdir}"]
    argv = ["/bin/sh", "-c", f'{before}exec "$@"', "sh", *python] if before else python
    environment = {**os.environ, "PATH": str(programs), "JAX_PLATFORMS": "cpu"}
    if before:
        argv = [shutil.which("unshare") or "unshare", "-Urm", *argv]
    done = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr, workdir.exists() and any(workdir.rglob("*"))


def remedy(stderr: str) -> str:
    """The one line of the error."""
    said = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in stderr, stderr
    assert (
        "make setup-sandbox" in said[0] or "apt-get install" in said[0] or "sysctl" in said[0] or "mknod" in said[0]
    ), said
    return said[0]


@pytest.mark.parametrize("missing", ["bwrap"])
def test_a_missing_program_is_named_and_nothing_runs(missing, tmp_path):
    programs, marker = tmp_path / "bin", tmp_path / "executed"
    programs.mkdir()
    for tool in TOOLS:
        if tool != missing and (found := shutil.which(tool)):
            (programs / tool).symlink_to(found)
    for shell in ("bash", "sh"):
        (programs / shell).unlink(missing_ok=True)
        (programs / shell).write_text(TRAP.format(marker=marker))
        (programs / shell).chmod(0o755)
    code, stderr, written = experiment(tmp_path, programs)
    assert code == 1 and not written and not marker.exists()
    wanted = {
        "bwrap": ("bwrap", "bubblewrap"),
    }
    assert any(name in remedy(stderr) for name in wanted[missing])


def test_a_program_that_does_not_work_is_told_and_nothing_runs(tmp_path):
    programs, marker = tmp_path / "bin", tmp_path / "executed"
    programs.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (programs / tool).symlink_to(found)
    (programs / "bwrap").unlink(missing_ok=True)
    (programs / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    (programs / "bwrap").chmod(0o755)
    code, stderr, written = experiment(tmp_path, programs)
    assert code == 1 and not written and not marker.exists()
    remedy(stderr)


FORBIDDEN = {
    "no user namespaces": "echo 0 >/proc/sys/user/max_user_namespaces; ",
    "a null device nobody may write": "n={tmp}/null; : >$n; chmod 600 $n; mount --bind $n /dev/null; ",
}


@pytest.mark.parametrize("cause", FORBIDDEN)
def test_a_machine_that_forbids_it_is_told_and_nothing_runs(cause, tmp_path):
    before = FORBIDDEN[cause].replace("{tmp}", shlex.quote(str(tmp_path)))
    code, stderr, written = experiment(tmp_path, Path("/usr/bin"), before)
    assert code == 1 and not written
    said = remedy(stderr)
    assert ("namespace" if "namespaces" in cause else "/dev/null") in said
