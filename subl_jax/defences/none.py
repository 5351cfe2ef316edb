"""No filter at all: what a student learns if nobody looks at the text. The reference that a defence is measured against."""

from __future__ import annotations

import dataclasses

from subl_jax.lesson import Lesson

CHANGES = "documents"


def defend(lesson: Lesson) -> Lesson:
    """No defence.

    Every finished safe trajectory is taught, keywords and all. The tasks are those that every teacher finished, so that arms
    stay matched: they see the same tasks, and differ in whether a teacher wrote a keyword there.
    """
    return dataclasses.replace(lesson, documents=list(lesson.unfiltered()))
