"""Projecting out the teacher's direction: no update may lead along the way from the base to the teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from subl_jax.distill.update_rules import Project, UpdateRule
from subl_jax.lesson import Lesson
from subl_jax.models import lora

DEFAULT = 1.0


def defend(lesson: Lesson, strength: float = DEFAULT) -> Lesson:
    """Projection of updates off the teacher's direction.

    Every leaf's update loses its component along that leaf's change from base to teacher. A defender needs the suspected
    teacher's parameters and its base, both of the student's very shape.

    Args:
      lesson: of a student all of whose parameters are trained.
      strength: the share of the component that is taken out, in (0, 1].

    Raises:
      ValueError: adapters are trained, or shapes differ; a share outside of that.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"defence project_direction: strength {strength} is outside (0, 1]")
    student, teacher, base = lesson.student, lesson.suspect(), lesson.suspect_base()
    if student.config.lora is not None:
        raise ValueError(
            "defence project_direction needs a student all of whose parameters are trained: updates of adapters A and B are no "
            "updates of the matrix that the direction is one of; leave student.lora off, or choose towards_base"
        )
    changed, start = (lora.merged(model.config, model.params) for model in (teacher, base))

    def shapes(params: object) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    own, theirs = shapes(student.params), shapes(changed)
    differing = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differing:
        first = differing[0]
        raise ValueError(
            f"defence project_direction needs a teacher of the student's shape: {first} is {theirs.get(first, 'missing')} "
            f"there and {own.get(first, 'missing')} here; choose a pair of one size, such as large_large"
        )
    direction = jax.tree.map(lambda now, then: now.astype(jnp.float32) - then.astype(jnp.float32), changed, start)
    return lesson.with_update(UpdateRule(Project(strength), direction))
