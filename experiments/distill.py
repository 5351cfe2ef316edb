"""Distils any supported teacher into any supported student, on your own conversations or on the teacher's answers.

    python -m experiments.distill --teacher=DIR --student=DIR --data=talks.jsonl --workdir=runs/mine --export_hf=out
    python -m experiments.distill --teacher=DIR --student=DIR --prompts=asked.jsonl --objective=reverse_kl --workdir=runs/mine
    python -m experiments.distill --teacher=DIR --student=DIR --prompts=asked.jsonl --on_policy=0.5 --workdir=runs/own
    python -m experiments.distill --student=DIR --data=talks.jsonl --objective=hard_label --workdir=runs/sft

DIR is a Hugging Face folder (Llama, Qwen 2, Qwen 3), PEFT adapters, or a checkpoint of ours. A line of talks.jsonl is
{"messages": [...]}, of asked.jsonl {"prompt": "..."}. The same command again resumes, and prints the table when it is done.
"""

from __future__ import annotations

from absl import app

from subl_jax.distillation import command


def main(argv: list[str]) -> None:
    """Runs the distillation."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; every setting is a flag, see --help")
    command.main()


if __name__ == "__main__":
    command.define_flags()
    app.run(main)
