"""A small program of several processes for the launchers' tests: adds up numbers, and saves on SIGTERM as an experiment does.

    python tests/launching/counting.py FOLDER STEPS SECONDS_PER_STEP

Processes find each other by the environment of `launch.local`, or by JAX's own detection under Slurm. The first one writes
`result.json` at the end. Asked to stop, all of them leave behind the same step with code 143, and the same call goes on there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from subl_jax.parallel import contract


def main(folder: Path, steps: int, seconds: float) -> None:
    """Counts."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    jax.config.update("jax_enable_preemption_service", False)
    given = {}
    if contract.COORDINATOR in os.environ:
        given = {
            "coordinator_address": os.environ[contract.COORDINATOR],
            "num_processes": int(os.environ[contract.NUM_PROCESSES]),
            "process_id": int(os.environ[contract.PROCESS_ID]),
        }
    jax.distributed.initialize(**given)
    rank = jax.process_index()
    saved, result = folder / "saved.json", folder / "result.json"
    state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "total": 0.0}
    print(f"process {rank} of {jax.process_count()} begins at step {state['step']}", flush=True)
    for step in range(state["step"], steps):
        time.sleep(seconds)
        mine = jnp.asarray([jnp.sin(step * 1.7 + rank), float(bool(asked))])
        told = multihost_utils.process_allgather(mine)
        state = {"step": step + 1, "total": state["total"] + float(told[:, 0].sum())}
        if told[:, 1].any():
            if rank == 0:
                saved.write_text(json.dumps(state))
            print(f"process {rank} was asked {len(asked)} times, stops behind step {step + 1}", flush=True)
            sys.exit(contract.REQUEUE)
    if rank == 0:
        result.write_text(json.dumps({**state, "processes": jax.process_count()}))
    print(f"process {rank} is done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
