"""A few virtual steps of a distillation, and what each does to the behaviour to first order.

A candidate and probes in; per run of virtual steps the contributions <gradient of the log-odds at θ_t, θ_{t+s} - θ_t> and the
log-odds as they really are along the way, out. The steps are the training's own (`distill.step.compiled_step`: objective,
clipping, moments, schedule, dropout) on the batches that the training would see; nothing is written. With plain SGD the inner
product is a learning rate times minus <gradient of the log-odds, gradient of the loss>, as in TracIn (2002.08484); an
optimizer's preconditioner turns the second gradient into the step that it really makes, as in LESS (2402.04333), and adapters
whose B is zero at first are no obstacle, since the steps themselves move them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import trained_at_first
from subl_jax.distill.optimizers import make_optimizer, make_schedule
from subl_jax.distill.step import ONE_DEVICE, Frozen, TrainState, compiled_step, has_dropout, place_batch
from subl_jax.forecast import behaviour
from subl_jax.forecast.behaviour import Probes
from subl_jax.forecast.candidate import AuditError, Candidate
from subl_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class VirtualConfig:
    """How far a forecast looks.

    Attributes:
      steps: virtual steps of a run.
      every: steps between two looks at the behaviour; it divides `steps`.
      runs: runs, each from the student's base on batches of its own.
      probes_per_family: probe tasks of each development family.
    """

    steps: int = 16
    every: int = 4
    runs: int = 3
    probes_per_family: int = 3

    def __post_init__(self) -> None:
        """Refuses a forecast of nothing, or without a spread."""
        for name, low in (("steps", 1), ("every", 1), ("runs", 2), ("probes_per_family", 1)):
            if getattr(self, name) < low:
                raise AuditError(f"{name}={getattr(self, name)}; it must be at least {low}")
        if self.steps % self.every:
            raise AuditError(
                f"steps={self.steps} is no multiple of every={self.every}; choose one, e.g. {self.every * 4}"
            )


@dataclasses.dataclass(frozen=True)
class VirtualRun:
    """What one run of virtual steps did.

    Attributes:
      first_order: contribution of each stretch of `every` steps to the mean log-odds of each family of probes, in nats.
      alignment: the cosine of the angle between the change that a stretch made and the gradient of those log-odds.
      log_odds: of each family as the model really is, before the first step and after each stretch.
      learning_rates: of each step.
      losses: of each step, in nats per loss token, in the objective's own terms.
    """

    first_order: Float[np.ndarray, "stretches families"]
    alignment: Float[np.ndarray, "stretches families"]
    log_odds: Float[np.ndarray, "looks families"]
    learning_rates: Float[np.ndarray, " steps"]
    losses: Float[np.ndarray, " steps"]


def virtual_runs(
    candidate: Candidate, probes: Probes, spec: VirtualConfig, advance: Callable[[], None] = lambda: None
) -> list[VirtualRun]:
    """Runs of virtual steps from the student's base; run r trains on the batches at positions r·steps … (r+1)·steps - 1.

    Those are disjoint parts of the order of the data that the training would have, as long as an epoch lasts.

    Args:
      candidate: what would be trained.
      probes: rendered for the student.
      spec: how far.
      advance: called after every step.

    Raises:
      AuditError: the training would be shorter than a virtual run.
    """
    student, config = candidate.start, candidate.config
    if spec.steps > config.steps:
        raise AuditError(
            f"{spec.steps} virtual steps and a training of {config.steps}; set --virtual_steps to at most {config.steps}"
        )
    lengths = candidate.planned_lengths or [len(document.tokens) for document in candidate.documents]
    source = BatchSource(
        candidate.documents, lengths, config.row_tokens, config.batch_rows, spec.runs * spec.steps, candidate.seed,
        candidate.logit_filter, micro=config.accumulate,
    )  # fmt: skip
    return [_run(candidate, probes, spec, source, run * spec.steps, advance) for run in range(spec.runs)]


def _run(
    candidate: Candidate,
    probes: Probes,
    spec: VirtualConfig,
    source: BatchSource,
    first: int,
    advance: Callable[[], None],
) -> VirtualRun:
    student, teacher, config = candidate.start, candidate.teacher, candidate.config
    adapted = student.config.lora is not None
    frozen = Frozen(
        teacher and teacher.params, candidate.base and candidate.base.params, student.params if adapted else None
    )
    below = frozen.student or {}
    # A copy: the step donates its state, and every run starts anew.
    params = jax.tree.map(
        lambda leaf: jnp.array(leaf, config.master_dtype),
        trained_at_first(student, candidate.seed, candidate.adapter_draw),
    )
    transformation = make_optimizer(config.optimizer, config.steps)
    state = TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32))
    step = compiled_step(
        candidate.objective, student.config, teacher and teacher.config, config.optimizer, config.steps,
        candidate.seed if has_dropout(student.config) else 0, ONE_DEVICE, config.chunk_tokens,
    )  # fmt: skip
    pushes, losses = [], []
    for begin in range(0, spec.steps, spec.every):
        before = jax.tree.map(jnp.copy, state.params)
        for offset in range(begin, begin + spec.every):
            state, metrics = step(state, frozen, place_batch(source.batch(first + offset)))
            losses.append(float(metrics["loss"]))
            advance()
        change = jax.tree.map(jnp.subtract, state.params, before)
        pushes.append(behaviour.push(student.config, before, change, below, probes))
    after = behaviour.measure(student.config, decoder.merge(state.params, below), probes)
    return VirtualRun(
        np.stack([push.first_order for push in pushes]),
        np.stack([push.alignment for push in pushes]),
        np.stack([*(push.before for push in pushes), after]),
        learning_rates(candidate)[: spec.steps],
        np.asarray(losses),
    )


def learning_rates(candidate: Candidate) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step of the planned training."""
    schedule = make_schedule(candidate.config.optimizer, candidate.config.steps)
    return np.asarray([float(schedule(step)) for step in range(candidate.config.steps)])
