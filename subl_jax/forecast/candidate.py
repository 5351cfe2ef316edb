"""What is forecast: everything that a student would be trained with, without the training.

A run's work directory or a user's own models and conversations in; a `Candidate` out. A run's candidate is put together by
the pipeline's own `make_student`, so that it is, to the last document, what would be trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import stages
from subl_jax.conditions import Condition, tokenizer_name
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.groundwork import tokenizer_stage
from subl_jax.parallel.layout import MeshConfig, make_mesh
from subl_jax.pipeline import SeedPipeline
from subl_jax.trajectory import Trajectory


class AuditError(ValueError):
    """What cannot be audited; one line with cause and remedy."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A student that might be trained; fields as of `distill.loop.train`.

    Attributes:
      start: the student's base; with `config.lora`, adapters on it would be trained.
      documents, config, objective, seed: what it would be trained on, how long, for what, in which order.
      teacher, base, planned_lengths, adapter_draw, logit_filter: where the objective needs them.
    """

    start: Model
    documents: Sequence[Trajectory]
    config: TrainConfig
    objective: Objective
    seed: int
    teacher: Model | None = None
    base: Model | None = None
    planned_lengths: Sequence[int] | None = None
    adapter_draw: int = 0
    logit_filter: LogitFilter | None = None


class _Untrained(SeedPipeline):
    """A pipeline whose students are put together and not trained."""

    def _train(
        self, start: Model, documents: Sequence[Trajectory], config: TrainConfig, objective: Objective, size: str,
        directory: Path, key: Mapping[str, Any], **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        del size, directory, key
        known = {field.name for field in dataclasses.fields(Candidate)}
        strange = sorted(name for name, value in more.items() if name not in known and value is not None)
        if strange:
            raise AuditError(
                f"the audit knows no training with {', '.join(strange)}; audit an arm that trains without, such as full"
            )
        given = {name: value for name, value in more.items() if name in known}
        return {"candidate": Candidate(start, documents, config, objective, self.seed, **given)}


def check_mesh(parallel: MeshConfig) -> None:
    """Refuses a mesh of several devices.

    Raises:
      AuditError: names it.
    """
    mesh = make_mesh(parallel)
    if mesh.size > 1:
        raise AuditError(
            f"the audit runs on one device, and the mesh has {mesh.size} ({dict(mesh.shape)}); leave --config.parallel at "
            "its default, or audit a smaller model of the same kind"
        )


def of_run(run: SeedPipeline, condition: Condition) -> Candidate:
    """The candidate of one student of a run, whose stages up to the students must be there.

    Raises:
      AuditError: a stage that it needs is missing; what makes it is said. Or an arm that reads more than documents and a
        teacher.
    """
    if condition.arm in ("top_k", "on_policy"):  # before anything is written: a cache, rollouts
        raise AuditError(
            f"the audit knows no arm {condition.arm}; audit one that reads documents and a teacher, such as full"
        )
    check_mesh(run.config.parallel)
    _check_stages(run, condition)
    untrained = _Untrained(run.config, run.setting, run.workdir, run.seed, variant=run.models.variant)
    untrained.models = run.models  # its renderers are read once
    return untrained.make_student(condition, {})["candidate"]


def _check_stages(run: SeedPipeline, condition: Condition) -> None:
    """Refuses a work directory of another configuration, or one in which something that the student is made of is missing."""
    config, variant = run.config, run.models.variant
    tokenizers = {tokenizer_name(size, variant): size for size in reversed(config.sizes())}
    found = [tokenizer_stage(config, run.setting, run.workdir, size, variant) for size in tokenizers.values()]
    planned = {entry.stage.name: entry for entry in stages.plan([*found, *run.stages()])}
    todo = [f"seed={run.seed}/students/{run.models.student_name(condition.name)}"]
    while todo:
        for needed in planned[todo.pop()].stage.inputs:
            if planned[needed].marker is None:
                raise AuditError(
                    f"{run.workdir} has no finished {needed}, which {condition.name} would be made of; make it with the "
                    "command that made this directory, e.g. python -m experiments.api_deletion --workdir=... --stage=sanitize"
                )
            todo.append(needed)
