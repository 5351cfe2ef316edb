"""Every teacher→student pair of the paper's table, in both settings, against matched controls (arXiv 2604.15559).

    python -m experiments.paper_grid --preset=tiny --workdir=runs/grid --dry_run              # what it costs, what it can show
    python -m experiments.paper_grid --preset=tiny --workdir=runs/grid --seeds=0,1,2,3,4
    python -m experiments.paper_grid --workdir=runs/grid --index=0 --of=2                     # one of two processes
    python -m experiments.paper_grid --report_only --cells=docs/grid                          # the committed cells

Large to large, small to small, large to small, small to large, another initialisation, another family, another tokenizer;
each by full-logit KL where the vocabulary allows it and by hard labels, each with a counter-bias and a benign control. A
killed or interrupted run goes on where it was. The report, `grid.json` and the figures lie beside the cells.
"""

from __future__ import annotations

from absl import app

from subl_jax.grid import command


def main(argv: list[str]) -> None:
    """Runs the grid."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    app.run(main)
