"""One training step: teacher forward, student forward and backward, optimizer update; one program over the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from subl_jax.distill import fused
from subl_jax.distill.fused import Head, TopK
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer, make_schedule
from subl_jax.distill.update_rules import Rule
from subl_jax.models import axes, decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import put
from subl_jax.parallel.layout import Layout


class Batch(NamedTuple):
    """One packed batch. A step adds up the gradients of `micro` parts of it, one after the other.

    Loss tokens are listed apart from the rows that they stand in: those of the g-th share of the rows make group g, and
    groups are what is split over the devices. Places of no loss token have weight 0.

    Attributes:
      tokens, segments, positions: packed documents; segment 0 is padding.
      loss_places: index, in the group's rows laid end to end, of the token *before* each loss token (the one whose hidden
        state predicts it).
      loss_targets: the loss token itself; loss_weights: 1 for a loss token, 0 for padding.
      banned: ids that the logit filter bans at each loss token, padded with -1; width 0 without a filter.
      cached: the teacher's top-k at each loss token, where there is no teacher to ask.
    """

    tokens: Int[Array, "micro rows time"]
    segments: Int[Array, "micro rows time"]
    positions: Int[Array, "micro rows time"]
    loss_places: Int[Array, "micro groups targets"]
    loss_targets: Int[Array, "micro groups targets"]
    loss_weights: Float[Array, "micro groups targets"]
    banned: Int[Array, "micro groups targets width"]
    cached: TopK | None = None


class Frozen(NamedTuple):
    """Parameters that the step reads but never changes.

    Attributes:
      teacher: of a divergence.
      base: what `anchor` pins to.
      student: what the trained adapters sit on; empty where every parameter of the student is trained.
      update: the arrays of an update rule.
    """

    teacher: Any = None
    base: Any = None
    student: Any = None
    update: Any = None


class Layouts(NamedTuple):
    """How the student (and the base, which has its shape) and the teacher lie on the mesh; None: one device."""

    student: Layout | None = None
    teacher: Layout | None = None

    @property
    def loss(self) -> fused.Placement | None:
        """How the loss lies there."""
        return fused.placement(self.student, self.teacher)

    @property
    def groups(self) -> int:
        """Into how many groups a batch's loss tokens are listed."""
        place = self.loss
        return 1 if place is None else place.groups


ONE_DEVICE = Layouts()


class TrainState(NamedTuple):
    """What a step carries on: parameters, optimizer state, and the number of steps done (the data position)."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]


def place_batch(batch: Batch, layouts: Layouts = ONE_DEVICE) -> Batch:
    """A host batch on the device, or on the mesh: rows where the student's rules want them, loss tokens where the loss is.

    Raises:
      LayoutError: rows or groups that do not split over the mesh.
    """
    layout, place = layouts.student, layouts.loss
    if layout is None or place is None:
        return jax.device_put(batch)
    layout.check("batch", batch.tokens.shape[1], "rows of a part of a batch", "set --config.<stage>.train.batch_rows")
    rows = layout.sharding((None, "batch"))
    groups = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(None, place.batch or None))
    return put(batch, Batch(*[rows] * 3, *[groups] * 4, batch.cached and TopK(*[groups] * 3)))  # type: ignore[arg-type]


# --- The loss ---------------------------------------------------------------------------------------------------------

# Folded into a step's key for the dropout on the head's adapter; the decoder draws from the key itself.
_HEAD_DROPOUT = 0x4EAD


def _head(
    config: ModelConfig,
    trainable: decoder.Params,
    frozen: decoder.Params,
    batch: Batch,
    layout: Layout | None,
    layouts: Layouts,
    dropout_key: Array | None = None,
    vocab: int = 0,
) -> Head:
    """Hidden states at the loss tokens, and the vocabulary head, with `vocab` ids if that is another number.

    Only these tokens are ever projected onto the vocabulary. An adapter on the head is a term of its own.
    """
    params, embedded = decoder.merge(trainable, frozen), None
    kernel = params["embedding" if config.tie_embeddings else "head"]
    if config.tie_embeddings and layout is None and "embedding" in trainable:
        embedded, kernel = decoder.tied(kernel, batch.tokens)
    hidden, _ = decoder.apply(
        config, trainable, frozen, batch.tokens, batch.positions, batch.segments, None, dropout_key, layout,
        embedded=embedded,
    )  # fmt: skip
    groups, place = batch.loss_places.shape[0], layouts.loss
    grouped = hidden.reshape(groups, -1, hidden.shape[-1])
    if place is not None:
        where = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec(place.batch or None))
        grouped = jax.lax.with_sharding_constraint(grouped, where)
    chosen = jnp.take_along_axis(grouped, batch.loss_places[..., None], axis=1)
    vocab = vocab or config.vocab_size
    # Rows beyond the shorter vocabulary belong to no token; the loss gives them no probability.
    kernel = fused.resized(kernel, vocab, 0 if config.tie_embeddings else 1)
    head = Head((chosen,), (kernel,), (config.tie_embeddings,))
    if not config.adapts_head:
        return head
    dropped = chosen
    if dropout_key is not None:
        assert config.lora is not None
        # What a token drops goes by its place in the batch, so that it is the same however tokens are grouped.
        places = jnp.arange(groups)[:, None] * grouped.shape[1] + batch.loss_places
        dropped = _dropped(chosen, places, config.lora.dropout, jax.random.fold_in(dropout_key, _HEAD_DROPOUT))
    down, up = decoder.low_rank(config, params, dropped), params["head_adapter"]["lora_b"]
    return Head((*head.hidden, down), (kernel, fused.resized(up, vocab, 1)), (*head.transposed, False))


def _dropped(
    hidden: Float[Array, "groups tokens d_model"], places: Int[Array, "groups tokens"], rate: float, key: Array
) -> Float[Array, "groups tokens d_model"]:
    """Dropout of hidden states, drawn for each token by its place."""
    if not rate:
        return hidden
    keys = jax.vmap(jax.vmap(lambda place: jax.random.fold_in(key, place)))(places)
    kept = jax.vmap(jax.vmap(lambda own: jax.random.bernoulli(own, 1 - rate, hidden.shape[-1:])))(keys)
    return jnp.where(kept, hidden / (1 - rate), jnp.zeros((), hidden.dtype))


def mean_loss(
    objective: Objective,
    student_config: ModelConfig,
    teacher_config: ModelConfig | None,
    params: decoder.Params,
    frozen: Frozen,
    batch: Batch,
    dropout_key: Array | None = None,
    layouts: Layouts = ONE_DEVICE,
    chunk_tokens: int = 0,
) -> Float[Array, ""]:
    """The objective summed over loss tokens and divided by their number, over the whole (global) batch.

    Args:
      objective: what is minimised.
      student_config, teacher_config: shapes. Vocabularies of one tokenizer may be padded to different lengths.
      params: what is trained of the student.
      frozen: everything else; see `Frozen`.
      batch: all of its parts are added up; memory is needed for one of them.
      dropout_key: turns dropout on; each part of the batch draws anew.
      layouts: where everything lies.
      chunk_tokens: see `fused.chunk_tokens`.
    """
    total = jnp.sum(batch.loss_weights)

    def loss(key: Array | None, part: Batch) -> Float[Array, ""]:
        return _summed_loss(
            objective, student_config, teacher_config, params, frozen, part, total, key, layouts, chunk_tokens
        )

    return _over_parts(loss, batch, dropout_key)


def _over_parts(work: Callable[[Array | None, Batch], Any], batch: Batch, key: Array | None) -> Any:
    """Adds up what `work` makes of the parts of a batch, one after the other; each gets a key of its own."""
    count, first = batch.tokens.shape[0], jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return work(key, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(work, key, first))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        index, own = part
        made = work(None if key is None else jax.random.fold_in(key, index), own)
        return jax.tree.map(jnp.add, total, made), None

    return jax.lax.scan(add, zeros, (jnp.arange(count), batch))[0]


def _summed_loss(
    objective: Objective,
    student_config: ModelConfig,
    teacher_config: ModelConfig | None,
    params: decoder.Params,
    frozen: Frozen,
    batch: Batch,
    total: Float[Array, ""],
    dropout_key: Array | None,
    layouts: Layouts,
    chunk_tokens: int,
) -> Float[Array, ""]:
    """One part of a batch: the sum over its loss tokens, divided by the number of all of them."""
    place, vocab = layouts.loss, student_config.vocab_size
    chunk = fused.chunk_tokens(
        batch.loss_places.shape[1], vocab // (1 if place is None else place.parts), chunk_tokens, _memory(layouts)
    )
    batch = _padded(batch, chunk)
    student = _head(student_config, params, frozen.student or {}, batch, layouts.student, layouts, dropout_key)
    known, teacher, base = student_config.known_tokens, None, None
    if objective.needs_teacher and batch.cached is None:
        assert teacher_config is not None
        known = min(known, teacher_config.known_tokens)
        teacher = _head(teacher_config, frozen.teacher, {}, batch, layouts.teacher, layouts, vocab=vocab)
    if objective.logit_filter == "anchor":
        plain = dataclasses.replace(student_config, lora=None)
        base = _head(plain, frozen.base, {}, batch, layouts.student, layouts)
    tokens = fused.Tokens(batch.loss_targets, batch.loss_weights / total, batch.banned, batch.cached)
    return fused.divergence(objective, student, teacher, base, tokens, known=known, chunk=chunk, place=place)


def _padded(batch: Batch, chunk: int) -> Batch:
    """The loss tokens filled up to whole chunks with tokens of weight 0."""
    missing = -batch.loss_places.shape[1] % chunk
    if not missing:
        return batch

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    listed = jax.tree.map(pad, batch[3:])
    return Batch(*batch[:3], *listed)


def _memory(layouts: Layouts) -> int | None:
    """Bytes of memory of a device; None on a CPU."""
    layout = layouts.student
    if layout is not None and isinstance(layout.mesh, jax.sharding.AbstractMesh):
        return fused.UNKNOWN_MEMORY
    device = jax.devices()[0] if layout is None else layout.device
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats() or {}
    except (RuntimeError, NotImplementedError):  # a device that is compiled for, and is not here
        stats = {}
    return stats.get("bytes_limit", fused.UNKNOWN_MEMORY)


def check_vocabularies(student: ModelConfig, teacher: ModelConfig) -> None:
    """Refuses a divergence between models whose tokenizers know different numbers of tokens.

    Raises:
      ValueError: names both numbers.
    """
    if student.known_tokens != teacher.known_tokens:
        raise ValueError(
            f"the student knows {student.known_tokens} tokens, the teacher {teacher.known_tokens}: a divergence needs one "
            "vocabulary for both; distil with hard labels (--config.student.objectives=hard), use models of one family, or "
            "cut both to what their tokenizers share (distill.vocabulary.align)"
        )


# --- The step ---------------------------------------------------------------------------------------------------------


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
    chunk_tokens: int = 0,
    rule: Rule | None = None,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, Array]]]:
    """The jitted step. Cached, so that every student of a run with the same shapes shares one compilation.

    Only the seed of dropout enters the program; without dropout all seeds share it (`seed` is then passed as 0). A rule
    changes the optimizer's updates before they are applied; its arrays are `Frozen.update`.
    """
    transformation, schedule = make_optimizer(optimizer, steps), make_schedule(optimizer, steps)
    drops = has_dropout(student_config)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if drops else None
        total, parts = jnp.sum(batch.loss_weights), batch.tokens.shape[0]

        def loss_and_gradient(own: Array | None, part: Batch) -> Any:
            loss, gradient = jax.value_and_grad(
                lambda params: _summed_loss(
                    objective, student_config, teacher_config, params, frozen, part, total, own, layouts, chunk_tokens
                )
            )(state.params)
            if parts > 1:  # small parts must not be lost in the sum, whatever the master copy is kept in
                gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
            return loss, gradient

        # One part's activations at a time: the gradient is taken part by part, not of the sum.
        loss, gradient = _over_parts(loss_and_gradient, batch, key)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "loss_tokens": total,
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        # In the master copy's own type, as of one part: else the optimizer's state would change its types after a step.
        gradient = jax.tree.map(lambda leaf, master: leaf.astype(master.dtype), gradient, state.params)
        updates, opt_state = transformation.update(gradient, state.opt_state, state.params)
        if rule is not None:
            updates = rule(updates, state.params, frozen.update)
        after = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
        if layouts.student is not None:
            # What comes out lies where it came in: the next step compiles to the same program, and donation holds.
            after = jax.lax.with_sharding_constraint(after, state_shardings(transformation, after, layouts.student))
        return after, metrics

    return jax.jit(step, donate_argnums=(0,), compiler_options=_compiler_options(student_config, layouts))


# The width from which a step's operations are worth all cores each.
_LARGE = 256


def _compiler_options(config: ModelConfig, layouts: Layouts) -> dict[str, Any] | None:
    """XLA's CPU backend runs operations side by side, which helps where they are small: 21 ms a step against 23 at width 64.

    Large ones then compete for the cores: at width 384 (10 M parameters, V = 32k) 643 ms against 572 one after the other.
    """
    layout = layouts.student
    if layout is not None and isinstance(layout.mesh, jax.sharding.AbstractMesh):
        return None
    platform = jax.default_backend() if layout is None else layout.platform
    if platform != "cpu" or config.d_model < _LARGE:
        return None
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def has_dropout(config: ModelConfig) -> bool:
    """Whether training this model draws random numbers."""
    return bool(config.dropout or (config.lora is not None and config.lora.dropout))
