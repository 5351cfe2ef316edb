r"""Compiles an experiment's programs for a TPU slice that is not here: does it fit, what does it move, how fast could it be.

    python -m launch.preflight --topology=v5p:4x4x4 --preset=paper
    python -m launch.preflight --topology=v5e:8x8 --teacher_shape=llama-3.1-8b --student_shape=llama-3.2-3b \
        --config.student.lora=false --batch=256 --seq=4096 --accumulate=2 --mesh=auto --programs=distill --out=preflight.json
    python -m launch.preflight --topology=v5e:4x4 --programs=rollout --config.engine.tensor=8
    python -m launch.preflight --topology=local --preset=tiny

No weights are loaded, and no TPU is needed: libtpu (`pip install -e .[tpu]`) holds the compiler. A training step of the paper's
models takes minutes to compile. Exit code 3: a program does not fit. docs/PREFLIGHT.md explains the tables.
"""

from __future__ import annotations

import sys

from absl import app, flags

from subl_jax.launching.preflight import environment

# Before anything imports JAX, which asks for TPUs when it is imported.
environment.prepare(sys.argv)

from subl_jax.launching.preflight import command  # noqa: E402


def main(argv: list[str]) -> None:
    """Runs the preflight."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    flags.adopt_module_key_flags(command)  # --help shows them; --helpfull has those of the configuration
    app.run(main)
