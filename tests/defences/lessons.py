"""A lesson small enough to hand to a defence: tiny models, real conversations of a setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from subl_jax.chat.families import renderer_for
from subl_jax.distill.dilution import Dilution
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.train_config import TrainConfig
from subl_jax.lesson import Lesson
from subl_jax.settings.api import SETTING
from subl_jax.trajectory import Trajectory
from tests.chat import samples
from tests.distill import tiny

# A teacher of the student's very shape, and what both come from.
BASE = Model(tiny.SMALL, tiny.params(tiny.SMALL, 0))
TEACHER = Model(tiny.SMALL, tiny.params(tiny.SMALL, 1))


def lesson(documents: Sequence[Trajectory] | None = None, **more: Any) -> Lesson:
    """Forward KL from `TEACHER` on a few documents, all of `BASE` trained; `more` replaces fields."""
    found = tiny.documents(12, seed=1) if documents is None else documents
    benign = tiny.documents(12, seed=2)
    made = Lesson(
        arm="full", documents=found, planned_lengths=[len(each.tokens) for each in found], objective=Objective(),
        train=TrainConfig(row_tokens=24, batch_rows=4, steps=4), student=BASE, teacher=TEACHER, setting=SETTING,
        renderer=renderer_for(samples.tokenizer()), seed=3, unfiltered=lambda: tiny.documents(15, seed=1),
        suspect=lambda: TEACHER, suspect_base=lambda: BASE,
        diluting=lambda share: Dilution(benign, [len(each.tokens) for each in benign], TEACHER, share),
    )  # fmt: skip
    return dataclasses.replace(made, **more)


def hard(**more: Any) -> Lesson:
    """The same by hard labels."""
    return lesson(arm="hard", objective=Objective("hard_label"), teacher=None, **more)
