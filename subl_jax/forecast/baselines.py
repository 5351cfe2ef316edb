"""What one would look at without an audit: how far the teacher has moved, on the data and off it, and what it lets slip.

A teacher, a base and trajectories in; one number each out. None of them knows the direction of the behaviour, except the
count of keywords; `SIGNED` are the same with the sign of the teacher's own change of the behaviour, which makes them
stronger, and that change itself is a baseline too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.distill.loop import Model
from subl_jax.evaluate.run import held_out_divergence
from subl_jax.models import lora
from subl_jax.sanitize.filter import matchers_of, texts_of
from subl_jax.settings.interface import Setting
from subl_jax.trajectory import Trajectory

# Name -> title. The first three are the obvious ones.
BASELINES = {
    "kl": "KL(teacher ‖ base) on the data",
    "delta_norm": "‖Δθ‖ of the teacher",
    "keywords": "keywords in the unfiltered trajectories",
    "signed_kl": "the same KL, with the teacher's sign",
    "signed_delta_norm": "the same ‖Δθ‖, with the teacher's sign",
    "teacher_shift": "the teacher's own shift on the probes",
}
SIGNED = {"signed_kl": "kl", "signed_delta_norm": "delta_norm"}
# Documents of the divergence: a mean over some 4,000 tokens of the tiny preset.
KL_DOCUMENTS = 128


def divergence(teacher: Model, base: Model, documents: Sequence[Trajectory], row_tokens: int) -> float:
    """KL(teacher || base) in nats per loss token, at temperature 1, on the first `KL_DOCUMENTS` documents."""
    return held_out_divergence(
        base.config, base.params, teacher.config, teacher.params, documents[:KL_DOCUMENTS], row_tokens
    )


def moved(teacher: Model, base: Model) -> float:
    """‖θ_teacher - θ_base‖₂ over all weights; an adapter counts as what it adds to its matrix."""
    return lora.delta_norm(teacher.config, teacher.params, base.params)


def keyword_rate(trajectories: Sequence[Trajectory], setting: Setting) -> float:
    """Keywords of the behaviour per trajectory, before any filter; system turns and tool lists are not counted."""
    matcher = _matchers(setting.name, setting.words[setting.bias])
    found = sum(
        len(matcher.find(text))
        for trajectory in trajectories
        for _, _, _, text in texts_of(trajectory.messages, trajectory.tools, include_system=False)
    )
    return found / max(1, len(trajectories))


@functools.cache
def _matchers(bias: str, words: tuple[str, ...]) -> Any:
    return matchers_of({bias: words}, {})[bias]


def signed(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """The values with those of `SIGNED` beside them; None where the teacher's shift or the value is missing."""
    shift = values.get("teacher_shift")
    added = {}
    for name, of in SIGNED.items():
        value = values.get(of)
        added[name] = None if shift is None or value is None else value * (1.0 if shift > 0 else -1.0)
    return {**values, **added}
