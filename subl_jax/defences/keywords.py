"""The keyword filter by itself: what the sanitizer leaves is what a student is taught. The baseline of every other defence."""

from __future__ import annotations

from subl_jax.lesson import Lesson


def defend(lesson: Lesson) -> Lesson:
    """Keyword filter.

    The documents of a lesson have passed the filter already, and stay as they are.
    """
    return lesson
