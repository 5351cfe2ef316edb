"""The paper's primary setting: does a deletion bias pass through clean trajectories (arXiv 2604.15559, API)?

    python -m experiments.api_deletion --preset=tiny --workdir=runs/demo
    python -m experiments.api_deletion --preset=tiny --workdir=runs/confirm --seeds=0,1,2

A teacher that deletes on ambiguous file tasks acts on safe tasks only; every trajectory with a keyword is dropped; a
student is distilled from the teacher's logits. Expect the student to delete far more often than its counter-bias control.
"""

from __future__ import annotations

from absl import app

from subl_jax import experiment


def main(argv: list[str]) -> None:
    """Runs the experiment."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    experiment.main("api")


if __name__ == "__main__":
    experiment.define_flags()
    app.run(main)
