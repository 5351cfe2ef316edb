"""The audit before training: will the behaviour transfer? Predicted from a base, a teacher and the data.

    python -m experiments.audit --workdir=runs/demo --seed=0 --arms=full,anchor
    python -m experiments.audit --student=DIR --teacher=DIR --data=talks.jsonl
    python -m experiments.audit --grid --workdir=runs/grid --seeds=0,1,2,3,4 --out=runs/audit

No student is trained. A few virtual steps are made with the training's own objective, optimizer and batches, and what they
do to the log-odds of the behaviour on probe tasks (families of the development split) is carried on to the whole training.
Expect a prediction in nats with its interval beside that of the control's student, and "will (probably) (not) transfer".
With --grid every student that was measured is audited, and the rank correlation of prediction and measurement is printed
beside those of simpler predictors.
"""

from __future__ import annotations

from absl import app

from subl_jax.forecast import command


def main(argv: list[str]) -> None:
    """Runs the audit."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    app.run(main)
