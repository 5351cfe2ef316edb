"""The audit of a user's own models and conversations, as `experiments.distill` takes them; nothing is written.

Folders and files in; a candidate, probes in its own format, and the teacher's shift out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from subl_jax.distill import vocabulary
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.loop import Model
from subl_jax.distillation import documents
from subl_jax.distillation.config import Spec
from subl_jax.distillation.run import Distillation
from subl_jax.forecast import baselines, behaviour
from subl_jax.forecast.audit import audited
from subl_jax.forecast.candidate import AuditError, Candidate, check_mesh
from subl_jax.forecast.virtual import VirtualConfig
from subl_jax.settings.interface import Setting


def candidate_of(run: Distillation) -> Candidate:
    """What the student of a distillation would be trained with, held-out conversations left out.

    Raises:
      AuditError: a distillation from prompts, whose answers are not there before it has begun.
    """
    if run.spec.prompts is not None or run.spec.data is None:
        raise AuditError(
            "the audit needs the conversations that are trained on, and --prompts are answered by the distillation alone; give "
            "--data=FILE.jsonl or a trajectory dataset"
        )
    check_mesh(run.config.parallel)
    config, objective, seed = run.config, run.config.objective, run.spec.seeds[0]
    found = run.load_data()
    if run.alignment is not None:
        vocabulary.check_documents(found.trajectories, run.shared_tokens, run.student.tokenizer)
    items = documents.split(found.trajectories, config.holdout, found.dropped).train
    start, filtered = run.start(), objective.logit_filter != "none"
    return Candidate(
        Model(dataclasses.replace(start.config, lora=config.adapters), start.params),
        items,
        dataclasses.replace(config.train, steps=run.steps_of(items, seed)),
        objective,
        seed,
        teacher=run.aligned_teacher() if objective.needs_teacher else None,
        base=start if objective.logit_filter == "anchor" else None,
        logit_filter=LogitFilter(run.student.renderer, config.banned_words) if filtered else None,
    )


def record(
    spec: Spec, setting: Setting, virtual: VirtualConfig, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The audit of one student of one's own: the prediction, and the baselines that can be had.

    Args:
      spec: what `experiments.distill` would run; its work directory is not touched.
      setting: whose behaviour is predicted.
      virtual, advance: see `virtual.virtual_runs`.
    """
    run = Distillation(spec)
    candidate = candidate_of(run)
    probes = behaviour.make_probes(setting, run.student.renderer, virtual.probes_per_family)
    base = dataclasses.replace(candidate.start, config=dataclasses.replace(candidate.start.config, lora=None))
    shift = kl = moved = None
    if run.teacher is not None:
        teacher = run.load_teacher()
        own = behaviour.make_probes(setting, run.teacher.renderer, virtual.probes_per_family)
        values = [
            behaviour.measure(model.config, model.params, seen) for model, seen in ((teacher, own), (base, probes))
        ]
        shift = float(values[0].mean() - values[1].mean())
        if run.alignment is not None:
            longest = -(-max(len(item.tokens) for item in candidate.documents) // 128) * 128
            kl = baselines.divergence(run.aligned_teacher(), base, candidate.documents, longest)
        if teacher.config.architecture() == base.config.architecture():
            moved = baselines.moved(teacher, base)
    found = audited(candidate, probes, virtual, shift, advance)
    values = {
        "kl": kl,
        "delta_norm": moved,
        "keywords": baselines.keyword_rate(candidate.documents, setting),
        "teacher_shift": shift,
    }
    return {
        "setting": setting.name, "condition": "student", "arm": spec.config.objective.loss,
        **found, "baselines": baselines.signed(values),
    }  # fmt: skip
