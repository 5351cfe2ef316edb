"""The training loop that every model of a run goes through: base, teachers and students differ in data and objective."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax import checkpoint
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.step import (
    ONE_DEVICE,
    Frozen,
    Layouts,
    Objective,
    OptimizerConfig,
    TrainState,
    check_vocabularies,
    compiled_step,
    has_dropout,
    make_optimizer,
    state_shardings,
)
from subl_jax.metrics.progress import progress
from subl_jax.metrics.writers import MetricsWriter
from subl_jax.models import axes, lora
from subl_jax.models.config import Dtype, ModelConfig
from subl_jax.parallel.layout import DEFAULT_MESH, Layout, MeshConfig, make_mesh
from subl_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and shape of one training run.

    Attributes:
      steps: optimizer steps.
      batch_rows: packed rows per step, over all devices; row_tokens: tokens per row.
      optimizer: see `OptimizerConfig`.
      checkpoint_every: steps between the checkpoints from which a killed run resumes.
      log_every: steps between metric records.
      master_dtype: in which trained parameters and the optimizer's state are kept, whatever the model computes in.
    """

    steps: int = 400
    batch_rows: int = 16
    row_tokens: int = 256
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint_every: int = 200
    log_every: int = 10
    master_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Refuses runs that could not start."""
        for name in ("steps", "batch_rows", "row_tokens", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in hand: its shape and its parameters (with its adapters, where it has been trained with them)."""

    config: ModelConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training run leaves: what was trained (all parameters, or the adapters), the last loss, what it cost."""

    params: Any
    loss: float
    loss_tokens: int
    tokens_per_s: float
    seconds: float


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


def _finite_loss(stage: str, step: int, metrics: Mapping[str, jax.Array]) -> float:
    """One step's loss; raises `TrainingDiverged` if it is not finite."""
    loss = float(metrics["loss"])
    if not np.isfinite(loss):
        raise TrainingDiverged(
            f"{stage}: the loss is {loss} at step {step}; lower the learning rate. The checkpoints are kept"
        )
    return loss


def _record(writer: MetricsWriter, stage: str, step: int, metrics: Mapping[str, jax.Array]) -> float:
    """Writes one step's metrics and returns its loss; raises `TrainingDiverged` if it is not finite."""
    loss = _finite_loss(stage, step, metrics)
    writer.write(stage, step, {name: float(value) for name, value in metrics.items()})
    return loss


def train(
    student: Model,
    trajectories: Sequence[Trajectory],
    config: TrainConfig,
    objective: Objective,
    *,
    seed: int,
    directory: Path,
    stage: str,
    logs: Path,
    metadata: Mapping[str, Any],
    teacher: Model | None = None,
    base: Model | None = None,
    planned_lengths: Sequence[int] | None = None,
    logit_filter: LogitFilter | None = None,
    parallel: MeshConfig = DEFAULT_MESH,
    adapter_draw: int = 0,
) -> TrainResult:
    """Trains `student` on `trajectories`; resumes from `directory/steps` if a killed run left something there.

    Resume is bitwise on the same device layout: the order of the data is a function of (seed, step), dropout's key of
    the same, and everything else is in the checkpoint.

    Args:
      student: shape and starting parameters (not modified). With `config.lora` the parameters stay as they are, and new
        adapters on them are trained.
      trajectories: documents with loss masks.
      config, objective: length and what is minimised.
      seed: of the order of the data and of dropout.
      directory: where step checkpoints go.
      stage: name under which metrics are written.
      logs: directory of `metrics.jsonl` and of TensorBoard's events.
      metadata: what identifies this run; a checkpoint with other metadata is refused.
      teacher: for `forward_kl`. base: for the `anchor` filter.
      planned_lengths: see `BatchSource`; the documents' own lengths by default.
      logit_filter: required exactly when the objective filters logits.
      parallel: the mesh, and the rules by which student and teacher lie on it.
      adapter_draw: which random draw of `seed` new adapters start from; runs with the same seed and draw share it.

    Raises:
      LayoutError: a dimension that does not split over the mesh.
      ValueError: an objective whose teacher, base or filter is missing.
      TrainingDiverged: the loss became NaN or infinite; step checkpoints stay as they are.
    """
    if (objective.loss == "forward_kl") != (teacher is not None):
        raise ValueError(f"objective {objective.loss} and a teacher {'missing' if teacher is None else 'given'}")
    if (objective.logit_filter == "anchor") != (base is not None):
        raise ValueError(f"logit_filter={objective.logit_filter} and a base {'missing' if base is None else 'given'}")
    if (objective.logit_filter != "none") != (logit_filter is not None):
        raise ValueError(f"logit_filter={objective.logit_filter} does not fit the filter that was given")
    if teacher is not None:
        check_vocabularies(student.config, teacher.config)
    began = time.perf_counter()
    mesh = make_mesh(parallel)
    layouts = Layouts(Layout(mesh, parallel.student_rules), Layout(mesh, parallel.teacher_rules))
    layout: Any = layouts.student
    lengths = planned_lengths or [len(trajectory.tokens) for trajectory in trajectories]
    source = BatchSource(trajectories, lengths, config.row_tokens, config.batch_rows, config.steps, seed, logit_filter)
    frozen = Frozen(
        teacher and axes.place(teacher.params, teacher.config, layouts.teacher),  # type: ignore[arg-type]
        base and axes.place(base.params, base.config, layout),
        student.config.lora and axes.place(student.params, student.config, layout),
    )
    params = student.params
    if student.config.lora is not None:
        key = jax.random.key(seed)
        params = lora.init_adapters(student.config, jax.random.fold_in(key, adapter_draw) if adapter_draw else key)
    # A copy: the step donates its state.
    params = axes.place(jax.tree.map(lambda leaf: jnp.array(leaf, config.master_dtype), params), student.config, layout)
    transformation = make_optimizer(config.optimizer, config.steps)
    state = TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32))
    state = jax.device_put(state, state_shardings(transformation, state, layout))
    step_fn = compiled_step(
        objective,
        student.config,
        teacher and teacher.config,
        config.optimizer,
        config.steps,
        seed if has_dropout(student.config) else 0,
        layouts if mesh.size > 1 else ONE_DEVICE,
    )
    # CPU devices share a thread pool: a step that is dispatched before the last one ended can starve its collectives.
    lockstep = mesh.size > 1 and layout.platform == "cpu"
    loss, loss_tokens, trained = float("nan"), 0, 0
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            checkpoint.TrainCheckpointer(
                directory / "steps", every_steps=config.checkpoint_every, keep=2, metadata=dict(metadata)
            )
        )
        restored = checkpointer.restore_latest(state)
        state, start = restored if restored is not None else (state, 0)
        writer = stack.enter_context(
            MetricsWriter(logs / "metrics.jsonl", logs / "tensorboard", stage=stage, resume_step=start + 1)
        )
        shown = stack.enter_context(progress(config.steps, stage, unit="step"))
        shown.advance(start)
        unread: tuple[int, dict[str, jax.Array]] | None = None
        for position in range(start, config.steps):
            batch = source.batch(position)
            state, metrics = step_fn(state, frozen, layout.shard_batch(batch))
            if lockstep:
                jax.block_until_ready(state)
            trained += int(np.count_nonzero(batch.segments))
            loss_tokens += int(batch.loss_weights.sum())
            done = position + 1
            logged = done % config.log_every == 0
            # The last state is the caller's to save; a run killed before that repeats the steps since the checkpoint.
            saved = done % config.checkpoint_every == 0 and done < config.steps
            # Metrics are read one record behind: what is already computed does not stall the device. A checkpoint
            # waits for the device anyhow, and what a resumed run will not repeat must have been written before it.
            if unread is not None and (logged or saved or done == config.steps):
                loss = _record(writer, stage, *unread)
                unread = None
            if done == config.steps or (logged and saved):
                loss = _record(writer, stage, done, metrics)
            elif logged:
                unread = (done, metrics)
            if saved:
                _finite_loss(stage, done, metrics)  # a diverged state must not push out the last good one
                checkpointer.save(done, state)
            shown.advance(loss=loss)
        jax.block_until_ready(state)
    # Throughput counts what this process trained, compilation included; a resumed run trained only the rest.
    seconds = time.perf_counter() - began
    trained_params = state.params
    if student.config.lora is None:  # adapters are small: they stay in the master dtype
        trained_params = jax.tree.map(lambda leaf: leaf.astype(student.config.param_dtype), trained_params)
    return TrainResult(trained_params, loss, loss_tokens, trained / seconds if seconds else 0.0, seconds)
