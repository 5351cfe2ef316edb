"""Where a bias sits: on which tokens the teachers differ, and how far students move along their teacher's direction.

    python -m experiments.locate --workdir=runs/demo --seeds=0,1,2 --out=runs/demo-located
    python -m experiments.locate --workdir=runs/grid/api --pair=large_large,small_small --arms=full,hard --out=DIR

The work directory is only read: nothing is trained, and no seed has to be complete beyond the students that are looked at.
About a minute a seed and pair on two CPU cores.
"""

from __future__ import annotations

from absl import app

from subl_jax.locate import command


def main(argv: list[str]) -> None:
    """Looks into a work directory."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    app.run(main)
