"""Runs an experiment on a TPU of the Cloud TPU API, through gcloud.

    python -m launch.tpu_vm create  --name=mine --zone=us-east5-a --project=P --accelerator=v5p-128 [--spot]
    python -m launch.tpu_vm install --name=mine                    HEAD of this checkout, on every worker
    python -m launch.tpu_vm run     --name=mine -- python -m experiments.api_deletion --preset=paper --workdir=/mnt/runs/mine
    python -m launch.tpu_vm resume  --name=mine                    watches it; new machines after a preemption
    python -m launch.tpu_vm status | logs | stop | delete --name=mine
    python -m launch.tpu_vm up      ... -- python -m ...           create, install, run

Every one with --dry_run prints its commands instead. What was asked for is remembered by name, so that only `create`
(and the first use of a TPU that is there already, with --existing) needs the other flags.
"""

from __future__ import annotations

from absl import app, flags

from subl_jax.launching.tpu_vm import command


def main(argv: list[str]) -> None:
    """Carries out one verb."""
    command.main(argv)


if __name__ == "__main__":
    command.define_flags()
    # So that --help explains them.
    flags.adopt_module_key_flags(command)
    app.run(main)
