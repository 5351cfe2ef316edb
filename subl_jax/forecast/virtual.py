"""A few virtual steps of a distillation, and what each does to the behaviour to first order.

A candidate and probes in; per run of virtual steps the contributions <gradient of the log-odds, θ_{t+s} - θ_t> of every
stretch of s steps, with the mean of the gradients at its two ends, and the log-odds as they really are along the way, out.
The steps are the training's own (`distill.step.compiled_step`: objective, clipping, moments, schedule, dropout) on batches
that the training would see; nothing is written. With plain SGD the inner product is a learning rate times minus <gradient of
the log-odds, gradient of the loss>, as in TracIn (2002.08484); an optimizer's preconditioner turns the second gradient into
the step that it really makes, as in LESS (2402.04333). Adapters whose B is zero at first are no obstacle, since the steps
themselves move them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import trained_at_first
from subl_jax.distill.optimizers import make_optimizer, make_schedule
from subl_jax.distill.step import ONE_DEVICE, Frozen, TrainState, compiled_step, has_dropout, place_batch
from subl_jax.distill.train_config import TrainConfig
from subl_jax.forecast import behaviour
from subl_jax.forecast.behaviour import Probes
from subl_jax.forecast.candidate import AuditError, Candidate


@dataclasses.dataclass(frozen=True)
class VirtualConfig:
    """How far a forecast looks.

    Attributes:
      steps: virtual steps of a run beyond the warm-up of the learning rate, whose steps are made too.
      stretches: into which a run is cut; the gradient of the behaviour is taken at their ends.
      runs: runs, each from the student's base on batches of its own.
      probes_per_family: probe tasks of each development family.
    """

    steps: int = 12
    stretches: int = 4
    runs: int = 2
    probes_per_family: int = 6

    def __post_init__(self) -> None:
        """Refuses a forecast of nothing, or without a spread."""
        for name, low in (("steps", 1), ("stretches", 1), ("runs", 2), ("probes_per_family", 1)):
            if getattr(self, name) < low:
                raise AuditError(f"{name}={getattr(self, name)}; it must be at least {low}")
        if self.stretches > self.steps:
            raise AuditError(f"stretches={self.stretches} is more than steps={self.steps}; each holds a step at least")

    def length(self, config: TrainConfig) -> int:
        """Virtual steps of a run: those of the warm-up and `steps` more, but no more than the training has."""
        return min(config.optimizer.warmup_steps + self.steps, config.steps)

    def ends(self, config: TrainConfig) -> list[int]:
        """After how many steps each stretch ends; they are of about one length."""
        return [int(end) for end in np.linspace(0, self.length(config), self.stretches + 1).round()[1:]]


@dataclasses.dataclass(frozen=True)
class VirtualRun:
    """What one run of virtual steps did.

    Attributes:
      first_order: contribution of each stretch of steps to the mean log-odds of each family of probes, in nats.
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
    """Runs of n virtual steps from the student's base; run r trains on the batches at positions r n … (r+1) n - 1.

    Those are disjoint parts of the order of the data that the training would have, as long as an epoch lasts.

    Args:
      candidate: what would be trained.
      probes: rendered for the student.
      spec: how far.
      advance: called after every step.

    Raises:
      AuditError: a training shorter than the stretches that are looked at.
    """
    config, length = candidate.config, spec.length(candidate.config)
    if length < spec.stretches:
        raise AuditError(
            f"a training of {config.steps} steps, and {spec.stretches} stretches of virtual steps; set --stretches to at most "
            f"{length}"
        )
    lengths = candidate.planned_lengths or [len(document.tokens) for document in candidate.documents]
    source = BatchSource(
        candidate.documents, lengths, config.row_tokens, config.batch_rows, spec.runs * length, candidate.seed,
        candidate.logit_filter, micro=config.accumulate,
    )  # fmt: skip
    return [_run(candidate, probes, spec, source, run * length, advance) for run in range(spec.runs)]


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
    here = jax.tree.map(jnp.copy, state.params)
    before = jax.tree.map(jnp.zeros_like, here)  # the change that led here: none at first
    looks: list[
        behaviour.Push
    ] = []  # at every end of a stretch: the effect of the change before it and of the one behind
    losses: list[float] = []
    for end in spec.ends(config):
        while len(losses) < end:
            state, metrics = step(state, frozen, place_batch(source.batch(first + len(losses))))
            losses.append(float(metrics["loss"]))
            advance()
        behind = jax.tree.map(jnp.subtract, state.params, here)
        looks.append(behaviour.push(student.config, here, [before, behind], frozen.student or {}, probes))
        here, before = jax.tree.map(jnp.copy, state.params), behind
    nothing = jax.tree.map(jnp.zeros_like, here)
    looks.append(behaviour.push(student.config, here, [before, nothing], frozen.student or {}, probes))
    stretches = list(itertools.pairwise(looks))
    return VirtualRun(
        np.stack([(one.first_order[1] + other.first_order[0]) / 2 for one, other in stretches]),
        np.stack([(one.alignment[1] + other.alignment[0]) / 2 for one, other in stretches]),
        np.stack([look.log_odds for look in looks]),
        learning_rates(candidate)[: len(losses)],
        np.asarray(losses),
    )


def learning_rates(candidate: Candidate) -> Float[np.ndarray, " steps"]:
    """The learning rate of every step of the planned training."""
    schedule = make_schedule(candidate.config.optimizer, candidate.config.steps)
    return np.asarray([schedule(step) for step in range(candidate.config.steps)], np.float64)
