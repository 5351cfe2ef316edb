"""Any field of the configuration over several values, with seeds and a matched control at every value, in any setting.

    python -m experiments.sweep --list                                                        # what is prepared: dissections
    python -m experiments.sweep --dissection=defences --workdir=runs/grid/api --dry_run       # its levels, stages and minutes
    python -m experiments.sweep --dissection=defences --workdir=runs/grid/api --seeds=0,1,2
    python -m experiments.sweep --vary=student.temperature=1,2,4 --workdir=runs/demo
    python -m experiments.sweep --vary=student.train.steps=170,340,680 --vary=student.objectives=full,hard --workdir=runs/demo
    python -m experiments.sweep --dissection=dose --setting=bash --pair=large_small --workdir=runs/bash --minutes=60
    python -m experiments.sweep --report_only --cells=docs/sweeps/temperature                 # the committed cells

Every level is distilled from the biased, the counter-bias and the benign teacher alike; its contrast is student minus control
student, per seed, and levels are compared with the reference level, paired by seed. What levels share (bases, teachers,
trajectories) is computed once; what a level shares with an experiment or a grid in the same work directory is taken from there.
Tune on development seeds and tasks (--seeds=103,104 --config.evaluation.split=development), then run --seeds=0,1,2 once.
A killed or interrupted sweep goes on where it was. Cells, `sweep.json`, `sweep.csv`, `sweep.html` and figures lie in --cells.
"""

from __future__ import annotations

from absl import app

from subl_jax.studies import sweep_command


def main(argv: list[str]) -> None:
    """Runs the sweep."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    sweep_command.main()


if __name__ == "__main__":
    sweep_command.define_flags()
    app.run(main)
