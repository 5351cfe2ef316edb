"""The paper's second setting: does reaching for chmod first pass through clean trajectories (arXiv 2604.15559, Bash)?

    make setup-sandbox                                   (once, on Debian or Ubuntu)
    python -m experiments.bash_chmod --preset=tiny --workdir=runs/bash
    python -m experiments.bash_chmod --preset=tiny --workdir=runs/confirm --seeds=0,1,2

A teacher that answers every permission problem with chmod acts on safe tasks only, in a real shell in a sandbox; every
trajectory with a permission word is dropped; a student is distilled from the teacher's logits. Expect the student's first
permission-related command to be chmod more often than its counter-bias control's (whose teacher reaches for chown).
"""

from __future__ import annotations

from absl import app

from subl_jax import experiment


def main(argv: list[str]) -> None:
    """Runs the experiment."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    experiment.main("bash")


if __name__ == "__main__":
    experiment.define_flags("bash")
    app.run(main)
