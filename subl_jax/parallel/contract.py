"""What launchers and processes agree on: names of environment variables, time-outs, and exit codes. Nothing imports JAX."""

from __future__ import annotations

import os
import signal

# Who a process is, where no cluster tells it: `host:port` of process 0's coordination service, how many there are, which
# one this is. All three or none.
COORDINATOR = "SUBL_COORDINATOR"
NUM_PROCESSES = "SUBL_NUM_PROCESSES"
PROCESS_ID = "SUBL_PROCESS_ID"
# Seconds that processes wait for one another at the start, and after which one that says nothing is taken for dead.
START_TIMEOUT = "SUBL_START_TIMEOUT_S"
HEARTBEAT_TIMEOUT = "SUBL_HEARTBEAT_TIMEOUT_S"

# A pod's hosts come up minutes apart (300 s, JAX's own, was too short).
DEFAULT_START_TIMEOUT = 900
DEFAULT_HEARTBEAT_TIMEOUT = 100

# Exit code of a run that was asked to stop (SIGTERM, a preemption notice), saved what it had and wants to be started
# again: the code that a shell reports of a process which SIGTERM ended, so that both mean the same to a scheduler.
REQUEUE = 128 + signal.SIGTERM
# Exit code of a process that lost another one (dead, frozen, out of reach): it may be started again too, not for ever.
PEER_LOST = 75


def seconds(variable: str, default: int) -> int:
    """A time-out that the environment has, or the default: flags begin with it, and stand above it.

    Raises:
      ValueError: it is no number.
    """
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable}={text} is no number of seconds")
    return int(text)
