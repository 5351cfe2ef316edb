"""What a training run's arguments must be to each other: refused here, before anything is placed or compiled."""

from __future__ import annotations

from collections.abc import Sequence

from subl_jax.distill.dilution import Dilution
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicy
from subl_jax.distill.step import check_vocabularies
from subl_jax.distill.teacher_cache import CacheReader, Model
from subl_jax.trajectory import Trajectory


def check_arguments(
    objective: Objective,
    student: Model,
    trajectories: Sequence[Trajectory],
    teacher: Model | None,
    cache: CacheReader | None,
    base: Model | None,
    logit_filter: LogitFilter | None,
    on_policy: OnPolicy | None,
    dilution: Dilution | None,
) -> None:
    """Refuses an objective whose teacher, base or filter is missing, and a cache or a dilution of something else.

    Raises:
      ValueError: names what is missing, given besides, or different.
    """
    if teacher is not None and cache is not None:
        raise ValueError("a teacher and a teacher cache are both given; leave one out")
    if objective.needs_teacher != (teacher is not None or cache is not None):
        missing = "missing" if objective.needs_teacher else "given"
        raise ValueError(f"objective {objective.loss} and a teacher {missing}")
    if (objective.logit_filter == "anchor") != (base is not None):
        raise ValueError(f"logit_filter={objective.logit_filter} and a base {'missing' if base is None else 'given'}")
    if (objective.logit_filter != "none") != (logit_filter is not None):
        raise ValueError(f"logit_filter={objective.logit_filter} does not fit the filter that was given")
    if on_policy is not None and (teacher is None or logit_filter is not None):
        raise ValueError("training on the student's own rollouts needs a live teacher, and knows no logit filter")
    if teacher is not None:
        check_vocabularies(student.config, teacher.config)
    if dilution is not None:
        _check_dilution(dilution, teacher, cache, on_policy)
    if cache is not None:
        _check_cache(cache, objective, student, trajectories)
    if dilution is not None and dilution.cache is not None:
        _check_cache(dilution.cache, objective, student, dilution.documents)


def _check_dilution(
    dilution: Dilution, teacher: Model | None, cache: CacheReader | None, on_policy: OnPolicy | None
) -> None:
    """Refuses a dilution whose steps would need a program of their own."""
    if on_policy is not None:
        raise ValueError("a student of its own rollouts cannot be diluted: leave the dilution or on_policy out")
    if (dilution.cache is None) != (cache is None) or (dilution.teacher is None) != (teacher is None):
        raise ValueError("a dilution needs a teacher where the run has one, and a teacher cache where the run has one")
    if teacher is not None and dilution.teacher is not None and dilution.teacher.config != teacher.config:
        raise ValueError("the teacher of a dilution is of another shape than the run's; both must run in one program")


def _check_cache(cache: CacheReader, objective: Objective, student: Model, trajectories: Sequence[Trajectory]) -> None:
    """Refuses a cache of something else."""
    if objective.logit_filter != "none":
        raise ValueError(f"logit_filter={objective.logit_filter} needs a live teacher, not a cache of its top k")
    own = {
        "temperature": (cache.temperature, objective.temperature),
        "shared_tokens": (cache.vocab, student.config.known_tokens),
        "documents": (len(cache), len(trajectories)),
        "loss_tokens": (int(cache.counts().sum()), sum(int(t.loss_mask.sum()) for t in trajectories)),
    }
    differing = [
        f"{name}: {theirs} in the cache, {ours} in this run" for name, (theirs, ours) in own.items() if theirs != ours
    ]
    if differing:
        raise ValueError(
            f"the teacher cache is of something else ({'; '.join(differing)}); write it again for this run"
        )
