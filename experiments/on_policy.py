"""On-policy against off-policy distillation at equal student tokens, in the API setting (GKD, arXiv 2306.13649).

    python -m experiments.on_policy --preset=tiny --workdir=runs/on_policy --seeds=0,1,2
    python -m experiments.on_policy --preset=tiny --workdir=runs/confirm --seeds=0,1,2 --loss=jensen_shannon

Per seed three students of one base and one teacher: on the teacher's trajectories, on their own rollouts on the same tasks,
on both by halves. Their reverse KL from the teacher is measured along the way on held-out tasks, on the student's and on the
teacher's states; `on_policy.html` shows both. Expect about five minutes a seed on two CPU cores, most of them for the base; a
work directory of experiments.api_deletion has that already.
"""

from __future__ import annotations

from absl import app

from subl_jax.studies import on_policy_command


def main(argv: list[str]) -> None:
    """Runs the study."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    on_policy_command.main()


if __name__ == "__main__":
    on_policy_command.define_flags()
    app.run(main)
