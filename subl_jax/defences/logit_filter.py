"""The logit filter as a defence: the keywords leave the teacher's distribution too, not only its text."""

from __future__ import annotations

import dataclasses

from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.lesson import Lesson, words_of
from subl_jax.models.config import ModelConfig

NEEDS = "logits"
CHANGES = "logits"


def defend(lesson: Lesson) -> Lesson:
    """Logit filter (anchored to the base).

    Continuations that would spell a keyword get the base's probability instead of the teacher's: see
    `distill.divergences.anchored`. What the teacher thinks of everything else is learned as before.

    Raises:
      ValueError: an objective without logits, or with a filter of its own.
    """
    if not lesson.objective.needs_teacher or lesson.objective.logit_filter != "none":
        raise ValueError(
            f"defence logit_filter needs an objective that reads all of the teacher's logits, and {lesson.arm} does not"
        )
    plain: ModelConfig = dataclasses.replace(lesson.student.config, lora=None)
    return dataclasses.replace(
        lesson,
        objective=dataclasses.replace(lesson.objective, logit_filter="anchor"),
        base=dataclasses.replace(lesson.student, config=plain),
        logit_filter=LogitFilter(lesson.renderer, words_of(lesson.setting)),
    )
