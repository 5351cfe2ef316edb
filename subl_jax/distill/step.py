"""One training step: teacher forward, student forward and backward, optimizer update; one program over the mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from subl_jax.distill import losses
from subl_jax.models import axes, decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout

Loss = Literal["hard_label", "forward_kl"]
Filter = Literal["none", "drop", "anchor"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      loss: `hard_label` (cross-entropy on the sampled tokens) or `forward_kl` (to the teacher's logits).
      logit_filter: what happens to banned continuations: `none`, `drop` or `anchor` (see `losses`).
      temperature: softens both distributions of the KL; `anchor` pins its probabilities at 1 before it softens.
    """

    loss: Loss = "forward_kl"
    logit_filter: Filter = "none"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuses combinations that have no meaning."""
        if self.loss == "hard_label" and self.logit_filter != "none":
            raise ValueError(f"logit_filter={self.logit_filter} needs the teacher's logits; hard_label has none")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and schedule: linear warm-up, then a cosine to `final_fraction` of the peak.

    Attributes:
      name: `adamw` or `sgd`.
      learning_rate: the peak.
      warmup_steps, final_fraction: shape of the schedule.
      weight_decay: decoupled; matrices only.
      b1, b2: Adam's moments.
      clip_norm: global gradient norm above which gradients are scaled down.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values with which no run could learn."""
        for name, low, high in (
            ("final_fraction", 0.0, 1.0), ("b1", 0.0, 1.0), ("b2", 0.0, 1.0),
            ("warmup_steps", 0, math.inf), ("weight_decay", 0.0, math.inf),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} is outside [{low}, {high}]")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; it must be positive and finite")


class Batch(NamedTuple):
    """One packed batch on the device. `loss_*` list the loss tokens of each row, padded with weight 0.

    Attributes:
      tokens, segments, positions: packed documents; segment 0 is padding.
      loss_places: index of the token *before* each loss token (the one whose hidden state predicts it).
      loss_targets: the loss token itself; loss_weights: 1 for a loss token, 0 for padding.
      banned: ids that the logit filter bans at each loss token, padded with -1; width 0 without a filter.
    """

    tokens: Int[Array, "rows time"]
    segments: Int[Array, "rows time"]
    positions: Int[Array, "rows time"]
    loss_places: Int[Array, "rows targets"]
    loss_targets: Int[Array, "rows targets"]
    loss_weights: Float[Array, "rows targets"]
    banned: Int[Array, "rows targets width"]


class Frozen(NamedTuple):
    """Parameters that the step reads but never changes.

    Attributes:
      teacher: of the KL.
      base: what `anchor` pins to.
      student: what the trained adapters sit on; empty where every parameter of the student is trained.
    """

    teacher: Any = None
    base: Any = None
    student: Any = None


class Layouts(NamedTuple):
    """How the student (and the base, which has its shape) and the teacher lie on the mesh; None: one device."""

    student: Layout | None = None
    teacher: Layout | None = None


ONE_DEVICE = Layouts()


class TrainState(NamedTuple):
    """What a step carries on: parameters, optimizer state, and the number of steps done (the data position)."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the named optimizer under its schedule.

    Raises:
      ValueError: an unknown optimizer.
    """
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(steps, warmup + 1), peak * config.final_fraction
    )

    def matrices(params: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf.ndim > 2, params
        )  # stacked matrices; norms and the embedding do not decay

    if config.name == "adamw":
        inner = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=matrices)
    elif config.name == "sgd":
        inner = optax.sgd(schedule)
    else:
        raise ValueError(f"unknown optimizer {config.name!r}; use adamw or sgd")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), inner)


def _logits(
    config: ModelConfig,
    trainable: decoder.Params,
    frozen: decoder.Params,
    batch: Batch,
    layout: Layout | None,
    dropout_key: Array | None = None,
) -> Float[Array, "rows targets vocab"]:
    """Logits at the loss tokens only: the others are never projected onto the vocabulary."""
    hidden, _ = decoder.apply(
        config, trainable, frozen, batch.tokens, batch.positions, batch.segments, None, dropout_key, layout
    )
    chosen = jnp.take_along_axis(hidden, batch.loss_places[..., None], axis=1)
    return decoder.logits(config, decoder.merge(trainable, frozen), chosen, layout)


def banned_mask(banned: Int[Array, "rows targets width"], vocab: int) -> Bool[Array, "rows targets vocab"]:
    """Ids, padded with -1, to a mask over the vocabulary."""

    def mask(ids: Int[Array, " width"]) -> Bool[Array, " vocab"]:
        place = jnp.where(ids < 0, vocab, ids)  # out of range: dropped by the scatter
        return jnp.zeros(vocab, bool).at[place].set(True, mode="drop")

    # Token by token: one scatter over rows, targets and ids would gather the ids of the whole batch on every device.
    return jax.vmap(jax.vmap(mask))(banned)


def mean_loss(
    objective: Objective,
    student_config: ModelConfig,
    teacher_config: ModelConfig | None,
    params: decoder.Params,
    frozen: Frozen,
    batch: Batch,
    dropout_key: Array | None = None,
    layouts: Layouts = ONE_DEVICE,
) -> Float[Array, ""]:
    """The objective summed over loss tokens and divided by their number, over the whole (global) batch.

    Vocabularies of one tokenizer that are padded to different lengths are cut to the shorter one: what is cut are
    padding rows, which `decoder.logits` has given no probability.
    """
    student = _logits(student_config, params, frozen.student or {}, batch, layouts.student, dropout_key)
    if objective.loss == "hard_label":
        per_token = losses.hard_label(student, batch.loss_targets)
    else:
        assert teacher_config is not None
        teacher = jax.lax.stop_gradient(_logits(teacher_config, frozen.teacher, {}, batch, layouts.teacher))
        student, teacher = _cut_to_common(student, teacher)
        if objective.logit_filter == "anchor":
            plain = dataclasses.replace(student_config, lora=None)
            base = jax.lax.stop_gradient(_logits(plain, frozen.base, {}, batch, layouts.student))
            base, _ = _cut_to_common(base, teacher)
            per_token = losses.anchored_kl(
                student, teacher, base, banned_mask(batch.banned, student.shape[-1]), temperature=objective.temperature
            )
        else:
            dropped = banned_mask(batch.banned, student.shape[-1]) if objective.logit_filter == "drop" else None
            per_token = losses.forward_kl(student, teacher, temperature=objective.temperature, dropped=dropped)
    return jnp.sum(per_token * batch.loss_weights) / jnp.sum(batch.loss_weights)


def _cut_to_common(
    left: Float[Array, "rows targets left"], right: Float[Array, "rows targets right"]
) -> tuple[Float[Array, "rows targets vocab"], Float[Array, "rows targets vocab"]]:
    width = min(left.shape[-1], right.shape[-1])
    return left[..., :width], right[..., :width]


def check_vocabularies(student: ModelConfig, teacher: ModelConfig) -> None:
    """Refuses a KL between models whose tokenizers know different numbers of tokens.

    Raises:
      ValueError: names both numbers.
    """
    if student.known_tokens != teacher.known_tokens:
        raise ValueError(
            f"the student knows {student.known_tokens} tokens, the teacher {teacher.known_tokens}: a KL needs one "
            "tokenizer for both; distil with hard labels (--config.student.objectives=hard), or use models of one family"
        )


def state_shardings(transformation: optax.GradientTransformation, state: TrainState, layout: Layout) -> TrainState:
    """Where each array of a training state lies: moments beside the parameters that they belong to, counters everywhere.

    Args:
      transformation: the optimizer.
      state: arrays or abstract arrays.
      layout: of the student.
    """
    everywhere = layout.sharding(())
    where = axes.shardings(state.params, layout)
    moments = optax.tree_utils.tree_map_params(
        transformation, lambda _, there: there, state.opt_state, where, transform_non_params=lambda _: everywhere
    )
    return TrainState(where, moments, everywhere)  # type: ignore[arg-type]


@functools.cache
def compiled_step(
    objective: Objective,
    student_config: ModelConfig,
    teacher_config: ModelConfig | None,
    optimizer: OptimizerConfig,
    steps: int,
    seed: int,
    layouts: Layouts = ONE_DEVICE,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted step. Cached, so that every student of a run with the same shapes shares one compilation.

    Only the seed of dropout enters the program; without dropout all seeds share it (`seed` is then passed as 0).
    """
    transformation = make_optimizer(optimizer, steps)
    drops = has_dropout(student_config)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if drops else None
        loss, gradient = jax.value_and_grad(
            lambda params: mean_loss(objective, student_config, teacher_config, params, frozen, batch, key, layouts)
        )(state.params)
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "loss_tokens": jnp.sum(batch.loss_weights),
        }
        after = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        if layouts.student is not None:
            # What comes out lies where it came in: the next step compiles to the same program, and donation holds.
            after = jax.lax.with_sharding_constraint(after, state_shardings(transformation, after, layouts.student))
        return after, metrics

    return jax.jit(step, donate_argnums=(0,))


def has_dropout(config: ModelConfig) -> bool:
    """Whether training this model draws random numbers."""
    return bool(config.dropout or (config.lora is not None and config.lora.dropout))
