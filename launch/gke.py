r"""Runs an experiment on Google Kubernetes Engine as a JobSet: TPU slices, GPU hosts or CPUs.

    python -m launch.gke build    --image=us-docker.pkg.dev/P/R/subl_jax --accelerator=v5e
    python -m launch.gke manifest --name=mine --image=... --accelerator=v5e --topology=4x4 \
        --volume=gcs:BUCKET:/runs -- python -m experiments.api_deletion --preset=paper --workdir=/runs/mine
    python -m launch.gke submit   (the same flags)
    python -m launch.gke status | logs | delete --name=mine

`manifest` only prints; the others print their commands with --dry_run.
"""

from __future__ import annotations

from absl import app, flags

from subl_jax.launching.gke import command


def main(argv: list[str]) -> None:
    """Carries out one verb."""
    command.main(argv)


if __name__ == "__main__":
    command.define_flags()
    # So that --help explains them.
    flags.adopt_module_key_flags(command)
    app.run(main)
