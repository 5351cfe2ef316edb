"""How fast this is, beside its peers on the same machine: a table of times and ratios (docs/BENCHMARKS.md holds them).

    python -m experiments.throughput --workload=rollout
    python -m experiments.throughput --workload=rollout --against=transformers,transformers_compile --out=rollout.json
    python -m experiments.throughput --workload=rollout --against=tunix --tunix_python=DIR/bin/python --cases=small_*
    python -m experiments.throughput --workload=distill --against=torch,torch_compile,trl
    python -m experiments.throughput --workload=pipeline --preset=micro --out=pipeline.json

Peers need `make setup EXTRAS=oracles`, TRL `EXTRAS=parity`. All programs are held to the same cores and timed in turns.
Rounds in which other processes compute are repeated, and told where they cannot be avoided: libraries suffer unlike from
company. Expect the rollout with both peers of transformers to take about a quarter of an hour on two idle cores, the small
cases five minutes.
"""

from __future__ import annotations

from absl import app, flags

from subl_jax.benchmark import command


def main(argv: list[str]) -> None:
    """Runs the measurement."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    flags.adopt_module_key_flags(command)  # so that --help shows them
    app.run(main)
