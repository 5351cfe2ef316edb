"""Dilution as a defence: part of the training is on what a trusted model did on the same tasks."""

from __future__ import annotations

import dataclasses

from subl_jax.lesson import Lesson

CHANGES = "documents"
DEFAULT = 0.5


def defend(lesson: Lesson, strength: float = DEFAULT) -> Lesson:
    """Dilution with benign data.

    A seeded coin decides for each step between the teacher and the benign teacher, each with its own trajectories of the same
    tasks. The number of steps stays, so a strength of one half halves what is seen of the teacher.

    Args:
      lesson: without a dilution.
      strength: share of the steps on the benign teacher's trajectories.

    Raises:
      ValueError: the lesson is diluted already; a share that is none.
    """
    if lesson.dilution is not None:
        raise ValueError("student.dilution and defence dilution are both given; leave one out")
    return dataclasses.replace(lesson, dilution=lesson.diluting(strength))
