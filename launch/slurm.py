"""Runs an experiment as a Slurm job that saves before its time limit, is requeued, and goes on where it was.

    python -m launch.slurm --nodes=2 --gpus_per_node=8 --partition=gpu --time=12:00:00 -- python -m ...
    python -m launch.slurm --dry_run ...         prints the script and submits nothing
    python -m launch.slurm --wait ...            follows the logs and exits with the job's code

One task is one process, and JAX finds the others through Slurm. Exit codes 143 (asked to stop) and 75 (lost another process)
and deaths by a signal requeue the job, at most --max_requeues times; every other failure ends it with its code.
"""

from __future__ import annotations

import sys

from absl import app, flags

from subl_jax.launching import slurm, slurm_follow
from subl_jax.launching.command import LaunchError, given


def main(argv: list[str]) -> None:
    """Submits the job; turns expected failures into one line and exit code 1."""
    try:
        job = slurm.from_flags(given(argv))
        if flags.FLAGS.dry_run:
            print(f"{slurm.script(job)}\n# submitted by: sbatch --parsable < this script")
            return
        number = slurm.submit(job)
        log = job.logs / f"{job.name}-{number}"
        print(
            f"job {number}\n  follow:  tail -F {log}.log {log}-0.log   (one log per task: {log}-TASK.log)\n"
            f"  state:   squeue --jobs={number}\n  save and requeue:  scancel --signal=TERM {number}\n"
            f"  cancel:  scancel {number}",
            flush=True,
        )
        if flags.FLAGS.wait:
            sys.exit(slurm_follow.follow(number, job.logs, job.name))
    except (LaunchError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nno longer following; the job goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    slurm.define_flags()
    app.run(main)
