"""A Slurm job from submission to its end: its logs, its states, and the exit code that stands for it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from subl_jax.launching.command import LaunchError
from subl_jax.launching.output import Stream
from subl_jax.parallel import contract

# How often the controller is asked, in seconds: it serves the whole cluster.
INTERVAL_S = 5.0
# Exit codes of ends that are none of the command's own.
_CODES = {
    "CANCELLED": contract.REQUEUE,
    "TIMEOUT": 124,
    "OUT_OF_MEMORY": 137,
    "NODE_FAIL": contract.PEER_LOST,
    "BOOT_FAIL": contract.PEER_LOST,
    "PREEMPTED": contract.REQUEUE,
    "DEADLINE": 124,
}
# A controller that restarts is away for a while; a job that it has forgotten stays so.
_SILENT_ASKS = 12


def state(job_id: str) -> dict[str, str]:
    """What the controller says of a job: JobState, Reason, ExitCode, Restarts and so on; empty where it says nothing."""
    done = subprocess.run(["scontrol", "show", "job", "--oneliner", job_id], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def code_of(found: dict[str, str]) -> int | None:
    """The exit code that a job's state stands for; None: it has not ended."""
    word = found.get("JobState", "")
    if word == "COMPLETED":
        return 0
    if word == "FAILED":
        code, _, signal = found.get("ExitCode", "1:0").partition(":")
        return int(code) or (128 + int(signal or 0) if int(signal or 0) else 1)
    return _CODES.get(word)


class Tail:
    """What has been appended to a file since the last look."""

    def __init__(self, path: Path, out: Stream, prefix: str = "") -> None:
        self._path, self._out, self._prefix = path, out, prefix
        self._at = 0
        self._rest = ""

    def look(self, last: bool = False) -> None:
        """Prints the lines that are complete; at the end also what is not."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
            self._at += len(data)
            *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
            if last and self._rest:
                lines, self._rest = [*lines, self._rest], ""
            for line in lines:
                self._out.write(f"{self._prefix}{line}\n")
            self._out.flush()


def follow(
    job_id: str,
    logs: Path,
    name: str,
    *,
    out: Stream = sys.stdout,
    interval_s: float = INTERVAL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Prints the job's log and that of its first task until the job ends, requeues included; returns its exit code.

    Raises:
      LaunchError: the controller no longer knows the job.
    """
    tails = [Tail(logs / f"{name}-{job_id}.log", out), Tail(logs / f"{name}-{job_id}-0.log", out, "[0] ")]
    said, silent = "", 0
    while True:
        found = state(job_id)
        silent = 0 if found else silent + 1
        if silent >= _SILENT_ASKS:
            raise LaunchError(
                f"scontrol says nothing of job {job_id} any more; ask: sacct --jobs={job_id} --format=State,ExitCode"
            )
        code = code_of(found)
        for tail in tails:
            tail.look(last=code is not None)
        reason = found.get("Reason", "None")
        now = found.get("JobState", "") + (f" ({reason})" if reason not in ("None", "") else "")
        if now and now != said:
            said = now
            out.write(f"launch.slurm: job {job_id} is {now}\n")
            out.flush()
        if code is not None:
            return code
        sleep(interval_s)
