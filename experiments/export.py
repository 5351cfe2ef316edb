"""A finished run in the formats of other tools: Inspect logs, a dataset for TRL and `datasets`, a model for transformers.

    python -m experiments.export --workdir=runs/demo --what=inspect,dataset,model --condition=student --out=exported
    python -m experiments.export --workdir=runs/demo --what=inspect --condition=all --out=logs      # every measured model
    python -m experiments.export --workdir=runs/demo --what=dataset --condition=teacher --out=data  # all that a teacher did
    python -m experiments.export --cells=docs/grid --setting=api --what=inspect --condition=all --out=logs

Dataset and model come with a card that is written from the run's artifacts alone. Nothing is trained or measured here.
"""

from __future__ import annotations

from absl import app

from subl_jax.exports import command


def main(argv: list[str]) -> None:
    """Writes the exports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    app.run(main)
