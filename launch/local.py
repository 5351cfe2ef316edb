"""Runs an experiment as several processes of this machine, over loopback: on the CPU, or each with GPUs of its own.

    python -m launch.local --processes=2 -- python -m experiments.api_deletion --preset=tiny --workdir=runs/mine
    python -m launch.local --processes=8 --gpus --restarts=3 -- python -m experiments.api_deletion ...

Lines come as `[rank] text`. The first process that fails ends the others; its traceback is printed last, and its exit code
(128 + n for signal n) is the launcher's. SIGTERM and Ctrl-C ask all to save and stop (SIGTERM), a second one kills them.
"""

from __future__ import annotations

import sys

from absl import app, flags

from subl_jax.launching import local
from subl_jax.launching.command import LaunchError, given


def main(argv: list[str]) -> None:
    """Runs the processes; turns expected failures into one line and exit code 1."""
    try:
        plan = local.from_flags(given(argv))
        if flags.FLAGS.dry_run:
            print(local.dry_run(plan))
            return
        code = local.run(plan)
    except (LaunchError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    local.define_flags()
    app.run(main)
