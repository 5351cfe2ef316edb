"""The stages that no seed has for itself: tokenizers, and the audit of the evaluation tasks.

A configuration and a work directory in; stages out, to be run before those of any seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from absl import logging

from subl_jax import sources
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.conditions import Variant, tokenizer_name
from subl_jax.config import ExperimentConfig
from subl_jax.corpus import tokenizer_texts
from subl_jax.evaluate import run as evaluation
from subl_jax.settings import audit
from subl_jax.settings.interface import Setting
from subl_jax.stages import Stage

_NONE: Variant = MappingProxyType({})


def groundwork(
    config: ExperimentConfig, setting: Setting, workdir: Path, seeds: Sequence[int], variant: Variant = _NONE
) -> list[Stage]:
    """All of them, in order; `variant`: see `conditions.Variant`."""
    # Where teacher and student share one, it is the teacher's.
    sizes = {tokenizer_name(size): size for size in reversed(config.sizes())}
    return [
        *(tokenizer_stage(config, setting, workdir, size, variant) for size in sizes.values()),
        audit_stage(config, setting, workdir, seeds, variant),
    ]


def tokenizer_stage(
    config: ExperimentConfig, setting: Setting, workdir: Path, size: str, variant: Variant = _NONE
) -> Stage:
    """Trains the embedded tokenizer of the models of a size, on training text only, or takes the checkpoint's."""
    folders, name = sources.checkpoints(config), tokenizer_name(size, variant)
    spec = config.tokenizer if tokenizer_name(size) == "tokenizer" else config.other_tokenizer
    if spec.tasks_per_kind > config.tokenizer.tasks_per_kind and not folders:
        raise ValueError(
            f"--config.other_tokenizer.tasks_per_kind={spec.tasks_per_kind} is more than --config.tokenizer.tasks_per_kind="
            f"{config.tokenizer.tasks_per_kind}, which the audit of the evaluation tasks looks at; lower the one"
        )

    def make() -> dict[str, Any]:
        if folders:
            tokenizer: Any = tokenizers.load(folders[size])
        else:
            tokenizer = tokenizers.train(tokenizer_texts(setting, spec.tasks_per_kind), spec.vocab_size)
        tokenizer.save_pretrained(str(workdir / name / "files"))
        return {"vocabulary": len(tokenizer), "fingerprint": tokenizers.fingerprint(tokenizer)}

    key: dict[str, Any] = {"setting": config.setting, "tokenizer": spec}
    if folders:
        key["tokenizer"] = tokenizers.fingerprint(tokenizers.load(folders[size]))
    return Stage(name, workdir / name, key, (), make, alone=True)


def audit_stage(
    config: ExperimentConfig, setting: Setting, workdir: Path, seeds: Sequence[int], variant: Variant = _NONE
) -> Stage:
    """Compares the evaluation tasks with everything that is trained on; refuses shared families, templates and trees."""
    base, teacher, student = config.base, config.teacher, config.student

    def make() -> dict[str, Any]:
        training = [
            task
            for seed in seeds
            for kind, offset, count in (
                ("safe", 0, base.safe_tasks), ("ambiguous", 0, base.ambiguous_tasks), ("benign", 0, base.benign_tasks),
                *((f"{bias}_required", 1, teacher.tasks) for bias in setting.bias_tools),
                ("ambiguous", 1, teacher.tasks), ("benign", 1, teacher.tasks),
                ("safe", 1, teacher.replay_tasks),
                ("safe", 2, student.safe_tasks), ("ambiguous", 2, student.ambiguous_tasks),
            )
            for task in setting.tasks(kind, "train", seed + offset, count)
        ]  # fmt: skip
        training += [
            task for kind in setting.kinds for task in setting.tasks(kind, "train", 0, config.tokenizer.tasks_per_kind)
        ]
        spec = config.evaluation
        asked = evaluation.evaluation_tasks(setting, spec.split, spec.ambiguous_tasks, spec.safe_tasks, spec.samples)
        tasks = [*asked.ambiguous, *asked.safe]
        audit.assert_disjoint(asked.ambiguous, training)
        # Families of safe tasks name skills (find, count, read), which every split shares: utility is measured on them.
        audit.assert_disjoint(asked.safe, training, aspects=("template", "path"))
        closest = audit.near_duplicates(tasks, [task.prompt for task in training])
        for row in closest:
            logging.info("near-duplicate audit: %.2f  %s  %r", row.similarity, row.evaluation_id, row.training_text)
        return {
            "closest": [row._asdict() for row in closest],
            "training_tasks": len(training),
            "evaluation_tasks": len(tasks),
        }

    key = {
        "setting": config.setting, "seeds": seeds, "evaluation": config.evaluation, "tokenizer": config.tokenizer,
        "trained": [base.safe_tasks, base.ambiguous_tasks, base.benign_tasks, teacher.tasks, teacher.replay_tasks],
        "rolled": [student.safe_tasks, student.ambiguous_tasks],
    }  # fmt: skip
    ending = variant.get("audit", "")
    directory = workdir / "audit" / f"seeds={','.join(map(str, seeds))}{ending}"
    return Stage(f"audit{ending}", directory, key, (), make, alone=True)
