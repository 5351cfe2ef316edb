"""A real Slurm for tests: munged, slurmctld and slurmd of this machine, with keys, ports and state of their own.

python -m tests.launching.slurm_cluster -- sinfo          starts one, runs the command in it, and stops it
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
_START_WITHIN_S = 30

# `cred_expire` is also how long a requeued job waits before it may start again (120 s if not set).
_CONFIG = """\
ClusterName=subl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_delay}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm's that are not installed here."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def launch(
    *flags: str, command: tuple[str, ...] = ("python", "-c", "pass"), env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`launch.slurm` as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", "launch.slurm", *flags, "--", *command],
        cwd=Path(__file__).parent.parent.parent, capture_output=True, text=True, env=env, timeout=200,
    )  # fmt: skip


class SlurmCluster:
    """One controller and one node; a context manager.

    Attributes:
      folder: keys, state and logs; short, since sockets lie in it.
      environment: of the programs that talk to it.
    """

    def __init__(self, cpus: int = 4, requeue_delay: int = 5) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBL_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }
        self._cpus, self._requeue_delay = cpus, requeue_delay
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        """Returns once the node takes jobs."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                user=getpass.getuser(),
                controller_port=_free_port(),
                node_port=_free_port(),
                folder=self.folder,
                cpus=self._cpus,
                requeue_delay=self._requeue_delay,
            )
        )
        paths = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        options = [f"--{name}={self.folder / path}" for name, path in paths.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        self._daemon("slurmd", "-D", "-f", self.environment["SLURM_CONF"])
        self._until(lambda: self.run("sinfo", "--noheader", "--format=%T").stdout.strip() == "idle", "the node")

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            command = [_program(name) or name, *arguments]
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _START_WITHIN_S
        while not ready():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.folder.glob("*.out"))
                raise RuntimeError(f"{what} did not come up within {_START_WITHIN_S} s\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """One of Slurm's programs, or any other that talks to this cluster."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def stop(self) -> None:
        """Ends all jobs and daemons, and removes the folder."""
        if len(self._daemons) == 3 and self._daemons[1].poll() is None:
            self.run("scancel", "--user", getpass.getuser())
            end = time.monotonic() + 20
            while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops everything."""
        self.stop()


def main(arguments: Sequence[str]) -> int:
    """Runs one command in a cluster of its own."""
    command = [argument for argument in arguments if argument != "--"] or ["sinfo"]
    with SlurmCluster() as cluster:
        return subprocess.run(command, env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
