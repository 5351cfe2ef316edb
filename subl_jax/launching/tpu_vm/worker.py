"""The part that runs on a TPU VM, started over ssh as a plain script: install, start, status, stop.

Needs nothing but the system's Python (3.8 or newer), since it is what installs the rest. A run is a process of its own
session, so that the end of an ssh connection is not its end; its log, its exit code and who it is lie in files under ~/subl:

    VERSION  src/  venv/  run.json (who runs)  run.log  exit.json (how it ended)

Every verb prints one line, `SUBL` and a JSON object, for the launcher to read. Exit codes: 3 another version is
installed, 4 a run is still there, 1 anything else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

OTHER_VERSION, BUSY = 3, 4
PYTHONS = ("python3.13", "python3.12", "python3.11", "python3")
FITS = "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))"
COORDINATOR_PORT = 8476


class Refused(Exception):
    """Cannot be done; the exit code says why to a program, the message to a person."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def write(path, text):
    """Writes a file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def read(path):
    """A JSON file's object; empty if there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def identity(pid):
    """State of a process and what tells it from a later one of the same number, also across a reboot; Nones without it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None, None
    return fields[0], f"{boot}:{fields[19]}"


def alive(run):
    """Whether the run of run.json is still there. A zombie has ended, only nobody has asked how."""
    state, who = identity(run.get("pid"))
    return bool(run) and who == run.get("identity") and state not in ("Z", "X", None)


def status(root):
    """What a worker says of itself; `state` is none, running, exited (with `code`) or lost (ended without a word)."""
    run, ended = read(root / "run.json"), read(root / "exit.json")
    version = (root / "VERSION").read_text().strip() if (root / "VERSION").exists() else ""
    told = {
        "host": socket.gethostname(),
        "version": version,
        "state": "none",
        "code": None,
        "attempt": run.get("attempt", 0),
    }
    if alive(run):
        told["state"] = "running"
    elif run and ended.get("pid") == run["pid"] and ended.get("identity") == run["identity"]:
        told.update(state="exited", code=ended["code"])
    elif run:
        told["state"] = "lost"
    return told


def own_place(hosts):
    """Which of the run's hosts this is: the one whose address is local, since only such a one can be bound."""
    for number, host in enumerate(hosts):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((host, 0))
            return number
        except OSError:
            continue
    raise Refused(
        1, f"none of {', '.join(hosts)} is an address of {socket.gethostname()}; pass the workers' inner addresses"
    )


def start(root, version, attempt, hosts, argv):
    """Starts the run in a session of its own."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = status(root)
        if told["version"] != version:
            raise Refused(
                OTHER_VERSION,
                f"{told['host']} has version {told['version'] or 'none'}, this launcher {version}; install",
            )
        if told["state"] == "running":
            raise Refused(BUSY, f"a run is still there on {told['host']} (attempt {told['attempt']}); stop it first")
        environment = dict(os.environ)
        environment["PATH"] = f"{root / 'venv' / 'bin'}:{environment.get('PATH', '')}"
        if hosts:
            # Hosts of a TPU VM learn of one another from nobody else: their environment holds no word of it.
            environment["SUBL_COORDINATOR"] = f"{hosts[0]}:{COORDINATOR_PORT}"
            environment["SUBL_NUM_PROCESSES"] = str(len(hosts))
            environment["SUBL_PROCESS_ID"] = str(own_place(hosts))
        with open(root / "run.log", "a") as log:
            log.write(
                f"=== attempt {attempt}, version {version}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n"
            )
            log.flush()
            # The supervisor holds no lock and no terminal; it alone knows the exit code.
            supervisor = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), f"--root={root}", "supervise", "--", *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip
        who = {"pid": supervisor.pid, "identity": identity(supervisor.pid)[1], "attempt": attempt, "argv": argv}
        write(root / "run.json", json.dumps(who))


def supervise(root, argv):
    """Runs the command, passes SIGTERM on, and writes down how it ended."""
    command, asked = None, []

    def passed_on(number, _frame):
        asked.append(number)
        if command is not None:
            command.send_signal(number)

    signal.signal(signal.SIGTERM, passed_on)
    me = {"pid": os.getpid(), "identity": identity(os.getpid())[1]}
    try:
        command = subprocess.Popen(argv, cwd=str(root / "src") if (root / "src").exists() else None)
        if asked:
            command.send_signal(signal.SIGTERM)
        code = command.wait()
    except OSError as error:
        print(f"cannot start {argv[0]}: {error}", flush=True)
        code = 127
    # A shell's way of saying which signal ended it.
    write(root / "exit.json", json.dumps(dict(me, code=128 - code if code < 0 else code)))


def stop(root, grace):
    """Asks the run to stop, and after the grace ends it with all that it started."""
    run = read(root / "run.json")
    if not alive(run):
        return
    os.kill(run["pid"], signal.SIGTERM)
    until = time.monotonic() + grace
    while alive(run) and time.monotonic() < until:
        time.sleep(0.2)
    if alive(run):
        os.killpg(run["pid"], signal.SIGKILL)


def fitting_python(wanted):
    """A Python that the package can be installed with; Ubuntu 22.04, which TPU VMs run, has 3.10 and offers 3.11."""
    names = [wanted] if wanted else PYTHONS

    def found():
        for name in names:
            if shutil.which(name) and subprocess.run([name, "-c", FITS], stderr=subprocess.DEVNULL).returncode == 0:
                return shutil.which(name)
        return None

    if found() is None and not wanted and shutil.which("apt-get"):
        # A fresh VM updates itself in the background and holds the lock for minutes.
        apt = ["sudo", "-n", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600"]
        subprocess.run([*apt, "update"], stdout=sys.stderr)
        subprocess.run([*apt, "install", "-y", "python3.11", "python3.11-venv"], stdout=sys.stderr)
    interpreter = found()
    if interpreter is None:
        raise Refused(1, f"no Python 3.11 with venv among {', '.join(names)}; install one and name it with --python")
    return interpreter


def install(root, source, version, extra, python):
    """Puts an unpacked version in place: its stamp goes first and comes last, so that half an installation has none."""
    if status(root)["state"] == "running":
        raise Refused(BUSY, "a run is still there; stop it first")
    interpreter = fitting_python(python)
    (root / "VERSION").unlink(missing_ok=True)
    shutil.rmtree(root / "src", ignore_errors=True)
    os.replace(source, root / "src")
    own = root / "venv" / "bin" / "python"
    if not own.exists():
        subprocess.run([interpreter, "-m", "venv", str(root / "venv")], check=True, stdout=sys.stderr)
    # The pins were tested on 3.11; see the Makefile.
    pinned = subprocess.run([str(own), "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 11))"]).returncode == 0
    pins = ["-c", str(root / "src" / "constraints.txt")] if pinned else []
    pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins]
    done = subprocess.run([*pip, "-e", f"{root / 'src'}[{extra}]"], stdout=sys.stderr)
    if done.returncode:
        raise Refused(1, f"pip ended with {done.returncode}; its last words stand above")
    write(root / "VERSION", version + "\n")


def main(arguments=None):
    """Carries out one verb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.home() / "subl")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("install", "start", "supervise", "status", "stop"):
        verb = verbs.add_parser(name)
        if name in ("install", "start"):
            verb.add_argument("--version", required=True)
        if name == "install":
            verb.add_argument("--source", type=Path, required=True)
            verb.add_argument("--extra", default="tpu")
            verb.add_argument("--python", default="")
        if name == "start":
            verb.add_argument("--attempt", type=int, default=1)
            verb.add_argument("--hosts", default="")
        if name == "stop":
            verb.add_argument("--grace", type=float, default=300)
        if name in ("start", "supervise"):
            verb.add_argument("argv", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    given.root = Path(os.path.abspath(given.root))
    argv = given.argv[1:] if getattr(given, "argv", [])[:1] == ["--"] else getattr(given, "argv", [])
    try:
        if given.verb == "supervise":
            return supervise(given.root, argv)
        if given.verb == "start":
            start(given.root, given.version, given.attempt, [host for host in given.hosts.split(",") if host], argv)
        elif given.verb == "install":
            install(given.root, given.source, given.version, given.extra, given.python)
        elif given.verb == "stop":
            stop(given.root, given.grace)
    except (Refused, subprocess.CalledProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 1)
    # One write, so that lines of workers which answer at once do not mix.
    sys.stdout.write("SUBL " + json.dumps(status(given.root)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
