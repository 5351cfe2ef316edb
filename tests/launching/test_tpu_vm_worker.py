"""The part of `launch.tpu_vm` that runs on the VMs, with real processes and no TPU."""

from __future__ import annotations

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subl_jax.launching.tpu_vm import worker

SCRIPT = worker.__file__
VERSION = "1.2.3+gabc"


@pytest.fixture
def root(tmp_path):
    made = tmp_path / "subl"
    (made / "src").mkdir(parents=True)
    (made / "VERSION").write_text(VERSION + "\n")
    yield made
    run = worker.read(made / "run.json")
    if worker.alive(run):
        os.killpg(run["pid"], signal.SIGKILL)


def verb(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, SCRIPT, f"--root={root}", *words]
    return subprocess.run(argv, check=False, capture_output=True, text=True)


def start(root: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return verb(root, "start", f"--version={VERSION}", *options, "--", sys.executable, "-c", code)


def ended(root: Path) -> dict:
    for _ in range(200):
        told = worker.status(root)
        if told["state"] != "running":
            return told
        time.sleep(0.05)
    raise AssertionError("it runs on")


def waits_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("code", [0, 1, 75, 143])
def test_a_run_outlives_what_started_it_and_leaves_its_exit_code_and_log(root, code):
    done = start(root, f"import time; time.sleep(0.3); print('said this'); raise SystemExit({code})", "--attempt=4")
    assert done.returncode == 0 and json.loads(done.stdout.removeprefix("SUBL "))["state"] == "running"
    told = ended(root)
    assert (told["state"], told["code"], told["attempt"]) == ("exited", code, 4)
    assert (
        "attempt 4, version 1.2.3+gabc" in (root / "run.log").read_text()
        and "said this" in (root / "run.log").read_text()
    )


def test_a_run_has_a_session_of_its_own(root):
    start(root, "import os, pathlib, time; pathlib.Path('sid').write_text(str(os.getsid(0))); time.sleep(60)")
    waits_for(root / "src" / "sid")
    assert int((root / "src" / "sid").read_text() or -1) != os.getsid(0)


def test_a_second_run_is_refused_while_one_is_there(root):
    start(root, "import time; time.sleep(60)")
    second = start(root, "print('never')")
    assert second.returncode == worker.BUSY and "a run is still there" in second.stderr
    assert "never" not in (root / "run.log").read_text()


def test_another_version_is_refused_and_none_too(root):
    (root / "VERSION").write_text("1.2.3+gdef")
    refused = start(root, "print('never')")
    assert refused.returncode == worker.OTHER_VERSION and "has version 1.2.3+gdef" in refused.stderr
    (root / "VERSION").unlink()
    assert start(root, "print('never')").returncode == worker.OTHER_VERSION
    assert not (root / "run.json").exists()


def test_stop_passes_sigterm_on_and_waits_for_the_checkpoint(root):
    code = (
        "import pathlib, signal, sys, time\n"
        "def save(*_): time.sleep(0.5); pathlib.Path('saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\ntime.sleep(60)"
    )
    start(root, code)
    waits_for(root / "src" / "ready")
    told = json.loads(verb(root, "stop", "--grace=20").stdout.removeprefix("SUBL "))
    assert (root / "src" / "saved").exists()
    assert (told["state"], told["code"]) == ("exited", 143)


def test_stop_ends_what_does_not_heed_it(root):
    deaf = "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code = deaf + "pathlib.Path('ready').touch(); time.sleep(60)"
    start(root, code)
    waits_for(root / "src" / "ready")
    verb(root, "stop", "--grace=0.3")
    assert ended(root)["state"] == "lost"


def test_a_signal_is_reported_as_a_shell_does(root):
    start(root, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert ended(root)["code"] == 137


def test_a_run_that_vanished_without_a_word_is_lost_even_if_its_number_is_taken(root):
    start(root, "import time; time.sleep(60)")
    run = worker.read(root / "run.json")
    os.killpg(run["pid"], signal.SIGKILL)
    assert ended(root)["state"] == "lost"
    worker.write(root / "run.json", json.dumps({**run, "pid": os.getpid()}))
    assert worker.status(root)["state"] == "lost"


def test_a_command_that_cannot_start_says_so(root):
    verb(root, "start", f"--version={VERSION}", "--", "no-such-program")
    assert ended(root)["code"] == 127
    assert "cannot start no-such-program" in (root / "run.log").read_text()


def test_a_host_learns_its_number_from_its_own_address(root):
    code = "import os; print({k: v for k, v in os.environ.items() if k.startswith('SUBL_')})"
    # 203.0.113.0/24 is nobody's (RFC 5737).
    start(root, code, "--hosts=203.0.113.1,127.0.0.1")
    ended(root)
    log = (root / "run.log").read_text()
    assert "'SUBL_COORDINATOR': '203.0.113.1:8476'" in log
    assert "'SUBL_NUM_PROCESSES': '2'" in log and "'SUBL_PROCESS_ID': '1'" in log


def test_a_host_that_is_not_listed_starts_nothing(root):
    refused = start(root, "print('never')", "--hosts=203.0.113.1,203.0.113.2")
    assert refused.returncode == 1 and "none of 203.0.113.1, 203.0.113.2" in refused.stderr
    assert worker.status(root)["state"] == "none"


FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$*" in
  *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *"-m pip"*) exit ${PIP_CODE:-0} ;;
esac
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    made = tmp_path / "python3.11"
    made.write_text(FAKE_PYTHON)
    made.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return made


def fresh(root: Path) -> Path:
    made = root / "src.new"
    made.mkdir()
    (made / "new").touch()
    return made


def test_install_puts_the_version_in_place_and_stamps_it_last(root, python, tmp_path):
    done = verb(root, "install", "--version=2+gfff", f"--source={fresh(root)}", "--extra=tpu", f"--python={python}")
    assert done.returncode == 0, done.stderr
    assert (root / "src" / "new").exists() and not (root / "src.new").exists()
    assert worker.status(root)["version"] == "2+gfff"
    pip = (tmp_path / "calls").read_text().splitlines()[-1]
    assert (
        pip.endswith(f"-c {root}/src/constraints.txt -e {root}/src[tpu]")
        and str(root / "venv" / "bin" / "python") in pip
    )


def test_an_installation_that_failed_leaves_no_version(root, python, monkeypatch):
    monkeypatch.setenv("PIP_CODE", "9")
    done = verb(root, "install", "--version=2+gfff", f"--source={fresh(root)}", f"--python={python}")
    assert done.returncode == 1 and "pip ended with 9" in done.stderr
    assert worker.status(root)["version"] == ""


def test_install_leaves_a_run_alone(root, python):
    start(root, "import time; time.sleep(60)")
    done = verb(root, "install", "--version=2+gfff", f"--source={fresh(root)}", f"--python={python}")
    assert done.returncode == worker.BUSY
    assert worker.status(root)["version"] == VERSION


def test_the_script_is_valid_for_the_systems_old_python():
    ast.parse(Path(SCRIPT).read_text(), feature_version=(3, 8))
