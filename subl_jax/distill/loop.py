"""The training loop that every model of a run goes through: base, teachers and students differ in data and objective."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subl_jax import checkpoint
from subl_jax.distill import run_identity
from subl_jax.distill.accounting import Ledger, Meter, Work, shape_of
from subl_jax.distill.arguments import check_arguments
from subl_jax.distill.batches import BatchFacts, BatchSource, Source
from subl_jax.distill.dilution import DilutedSource, Dilution
from subl_jax.distill.logit_filter import LogitFilter
from subl_jax.distill.objective import Objective
from subl_jax.distill.on_policy import OnPolicy, OnPolicySource
from subl_jax.distill.optimizers import make_optimizer
from subl_jax.distill.preemption import Preempted, StopRequests
from subl_jax.distill.prefetch import prefetched
from subl_jax.distill.records import Records, TrainingDiverged
from subl_jax.distill.step import (
    ONE_DEVICE,
    Batch,
    Frozen,
    Layouts,
    TrainState,
    compiled_step,
    has_dropout,
    place_batch,
    state_shardings,
)
from subl_jax.distill.teacher_cache import CacheReader
from subl_jax.distill.train_config import TrainConfig
from subl_jax.distill.update_rules import UpdateRule, check_arrays
from subl_jax.metrics.progress import progress
from subl_jax.metrics.trace import Trace
from subl_jax.metrics.writers import MetricsWriter
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import ModelConfig
from subl_jax.parallel import processes
from subl_jax.parallel.devices import put
from subl_jax.parallel.layout import DEFAULT_MESH, Layout, MeshConfig, make_mesh
from subl_jax.trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in hand: its shape and its parameters (with its adapters, where it has been trained with them)."""

    config: ModelConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training run leaves, and what it cost in this process; a resumed one did only the rest.

    Attributes:
      params: what was trained: all parameters, or the adapters.
      loss: of the last step; loss_tokens: of all steps.
      tokens_per_s, loss_tokens_per_s, seconds: over the whole wall time, compilation included.
      mfu, goodput, packing, compile_s, flops, peak_bytes: see `accounting.Costs`.
    """

    params: Any
    loss: float
    loss_tokens: int
    tokens_per_s: float
    seconds: float
    loss_tokens_per_s: float = 0.0
    mfu: float | None = None
    goodput: float = 0.0
    packing: float = 0.0
    compile_s: float = 0.0
    flops: int = 0
    peak_bytes: int | None = None


class _Ready(NamedTuple):
    """A batch on the devices, and what it holds."""

    position: int
    batch: Batch
    facts: BatchFacts


def trained_at_first(student: Model, seed: int, adapter_draw: int = 0) -> Any:
    """What is trained of a student, before the first step: all of its parameters, or new adapters on them.

    Args:
      student, seed, adapter_draw: as of `train`.
    """
    if student.config.lora is None:
        return student.params
    key = jax.random.key(seed)
    return lora.init_adapters(student.config, jax.random.fold_in(key, adapter_draw) if adapter_draw else key)


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
    teacher_cache: CacheReader | None = None,
    shared_tokens: int = 0,
    on_policy: OnPolicy | None = None,
    dilution: Dilution | None = None,
    update: UpdateRule | None = None,
    profile: Path | None = None,
) -> TrainResult:
    """Trains `student` on `trajectories`; resumes from `directory/steps` if a killed run left something there.

    Resume is bitwise on the same device layout: the order of the data is a function of (seed, step), dropout's key of
    the same, and everything else is in the checkpoint. On another mesh it goes on to rounding.

    SIGTERM ends the run behind the step that is being dispatched, with a checkpoint and exit code 143 (`Preempted`). Of
    several processes all call this alike, and stop behind the same step whichever of them is asked.

    Args:
      student: shape and starting parameters (not modified). With `config.lora` the parameters stay as they are, and new
        adapters on them are trained.
      trajectories: documents with loss masks.
      config, objective: length and what is minimised.
      seed: of the order of the data and of dropout.
      directory: where step checkpoints go.
      stage: name under which metrics are written.
      logs: directory of `metrics.jsonl` and of TensorBoard's events.
      metadata: what identifies this run; a checkpoint with other metadata is refused, and so is one of other data,
        models, objective or options (`run_identity`).
      teacher: for divergences. base: for the `anchor` filter.
      planned_lengths: see `BatchSource`; the documents' own lengths by default.
      logit_filter: required exactly when the objective filters logits.
      parallel: the mesh, and the rules by which student and teacher lie on it.
      adapter_draw: which random draw of `seed` new adapters start from; runs with the same seed and draw share it.
      teacher_cache: of exactly these trajectories, in place of the teacher.
      shared_tokens: ids from here on have no probability in either model; 0: both know the same number of tokens.
      on_policy: the share of the steps that train on the student's own rollouts, and how it is rolled out.
      dilution: documents, with their teacher, that a share of the steps trains on instead.
      update: a rule that changes the optimizer's updates.
      profile: directory that a trace of a few steps is written to, for TensorBoard or Perfetto.

    Raises:
      LayoutError: a dimension that does not split over the mesh.
      ValueError: an objective whose teacher, base or filter is missing; a cache of something else.
      CheckpointMismatch: `directory` holds checkpoints of another run; what differs is named.
      TrainingDiverged: the loss became NaN or infinite, or jumped (`TrainConfig.spike`); step checkpoints stay as they
        are, and the batch is written beside them.
      Preempted: SIGTERM came.
    """
    ledger = Ledger()
    with ledger.spent_on("setup"):
        if shared_tokens:
            student, teacher = _sharing(student, shared_tokens), teacher and _sharing(teacher, shared_tokens)
        check_arguments(
            objective, student, trajectories, teacher, teacher_cache, base, logit_filter, on_policy, dilution
        )
        mesh = make_mesh(parallel)
        layouts = Layouts(Layout(mesh, parallel.student_rules), Layout(mesh, parallel.teacher_rules))
        layout: Any = layouts.student
        frozen = Frozen(
            teacher and axes.place(teacher.params, teacher.config, layouts.teacher),  # type: ignore[arg-type]
            base and axes.place(base.params, base.config, layout),
            student.config.lora and axes.place(student.params, student.config, layout),
        )
        params = trained_at_first(student, seed, adapter_draw)
        # A copy: the step donates its state.
        params = axes.place(
            jax.tree.map(lambda leaf: jnp.array(leaf, config.master_dtype), params), student.config, layout
        )
        if update is not None:
            check_arrays(update.arrays, params)
            frozen = frozen._replace(update=axes.place(update.arrays, student.config, layout))
        diluting = frozen
        if dilution is not None and dilution.teacher is not None:
            placed = axes.place(dilution.teacher.params, dilution.teacher.config, layouts.teacher)  # type: ignore[arg-type]
            diluting = frozen._replace(teacher=placed)
        transformation = make_optimizer(config.optimizer, config.steps)
        state = TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32))
        state = put(state, state_shardings(transformation, state, layout))
        places = layouts if mesh.size > 1 else ONE_DEVICE
        layout.check(
            "batch", config.batch_rows // config.accumulate,
            f"rows of {'a batch' if config.accumulate == 1 else 'each part of a batch'}",
            "set --config.<stage>.train.batch_rows",
        )  # fmt: skip
        lengths = planned_lengths or [len(trajectory.tokens) for trajectory in trajectories]
        shape = config.row_tokens, config.batch_rows, config.steps, seed
        parts = {"micro": config.accumulate, "groups": places.groups}
        source: Source = BatchSource(trajectories, lengths, *shape, logit_filter, cached=teacher_cache, **parts)
        mixed = None
        if on_policy is not None:
            source = OnPolicySource(source, on_policy, student.config, *shape, **parts)
        elif dilution is not None:
            other = BatchSource(
                dilution.documents, dilution.planned_lengths, *shape, logit_filter, cached=dilution.cache, **parts
            )
            source = mixed = DilutedSource(source, other, dilution.share, config.steps, seed)
        identity = run_identity.bound(
            metadata,
            {
                "train": config.identity(),
                "objective": objective,
                "seed": seed,
                "adapter_draw": adapter_draw,
                "data": run_identity.data_identity(trajectories, lengths),
                "student": run_identity.model_identity(student.config, frozen.student),
                "teacher": teacher and run_identity.model_identity(teacher.config, frozen.teacher),
                "base": base and run_identity.model_identity(base.config, frozen.base),
                "banned_words": logit_filter and logit_filter.words,
                "teacher_cache": teacher_cache and teacher_cache.identity,
                "on_policy": on_policy and on_policy.config,
                "dilution": dilution and run_identity.dilution_identity(dilution, diluting.teacher),
                "update": update and {**update.identity(), "arrays": run_identity.fingerprint(frozen.update)},
            },
        )
        step_fn = compiled_step(
            objective,
            student.config,
            teacher and teacher.config,
            config.optimizer,
            config.steps,
            seed if has_dropout(student.config) else 0,
            places,
            config.chunk_tokens,
            update and update.fn,
        )
        work = Work(
            shape_of(student.config, student.params, params if student.config.lora else None),
            teacher and shape_of(teacher.config, teacher.params),
            base and shape_of(base.config, base.params),
        )
    # CPU devices share a thread pool: a step that is dispatched before the last one ended can starve its collectives.
    lockstep = mesh.size > 1 and layout.platform == "cpu"

    def student_now() -> Any:
        """The student as it is: what is rolled out, and what is left at the end."""
        if student.config.lora is not None:
            return decoder.merge(state.params, frozen.student)
        return _in_dtype(state.params, student.config.param_dtype)

    with contextlib.ExitStack() as stack:
        with ledger.spent_on("setup"):
            stop = stack.enter_context(StopRequests())
            checkpointer = stack.enter_context(
                checkpoint.TrainCheckpointer(
                    directory / "steps", config.checkpoint_every, config.keep, identity,
                    keep_every=config.keep_every, every_minutes=config.checkpoint_minutes,
                )
            )  # fmt: skip
            restored = checkpointer.restore_latest(state)
            state, start = restored if restored is not None else (state, 0)
            writer = None
            if processes.is_first():
                writer = stack.enter_context(
                    MetricsWriter(logs / "metrics.jsonl", logs / "tensorboard", stage=stage, resume_step=start + 1)
                )
            shown = stack.enter_context(progress(config.steps, stage, unit="step"))
            shown.advance(start)
            meter = stack.enter_context(Meter(work, ledger, mesh.devices.flat))
            records = Records(writer, meter, stage, config.spike)
            stack.enter_context(_batch_kept(directory, source))
            trace = stack.enter_context(Trace(profile, start, config.steps))
            ready = stack.enter_context(
                contextlib.closing(_batches(source, places, start, config, student_now, ahead=not lockstep))
            )
        compiled: set[Any] = set()
        for position, batch, facts in ledger.waiting_for("input", ready):
            trace.begin(position, state)
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            with ledger.spent_on("compile") if shapes not in compiled else contextlib.nullcontext():
                held = diluting if mixed is not None and mixed.diluted(position) else frozen
                state, metrics = step_fn(state, held, batch)
            if not compiled:
                meter.start()
            compiled.add(shapes)
            if lockstep:
                jax.block_until_ready(state)
            meter.count(facts)
            done = position + 1
            trace.end(done, state)
            logged, last, stopping = done % config.log_every == 0, done == config.steps, stop.asked(done)
            # The last state is the caller's to save; a run killed before that repeats the steps since the checkpoint.
            saved = not last and not stop.alone and (stopping or checkpointer.due(done, timed=logged))
            # Metrics are read one record behind: what is already computed does not stall the device. A checkpoint
            # waits for the device anyhow, and what a resumed run will not repeat must have been written before it.
            if logged or last or saved:
                records.read()
            if logged or last:
                records.add(done, metrics)
            if last or (logged and saved):
                records.read()
            if saved:
                records.check(done, float(metrics["loss"]))  # a diverged state must not push out the last good one
                with ledger.spent_on("checkpoint"):
                    checkpointer.save(done, state, force=True)
            shown.advance(1, **records.shown)
            if stopping:
                if not stop.alone:
                    checkpointer.wait()
                shown.close(failed=True)
                kept = max(checkpointer.steps(), default=0)
                print(
                    f"{stage}: stopped by SIGTERM at step {done} of {config.steps}; the same command continues from step "
                    f"{kept}, which is kept in {checkpointer.directory}",
                    file=sys.stderr,
                    flush=True,
                )
                raise Preempted(stage, kept)
        jax.block_until_ready(state)
        with ledger.spent_on("checkpoint"):
            checkpointer.wait()
        costs = meter.costs()
    trained = state.params if student.config.lora is not None else student_now()  # adapters stay in the master dtype
    return TrainResult(trained, records.loss, meter.loss_tokens, **dataclasses.asdict(costs))


def _sharing(model: Model, shared_tokens: int) -> Model:
    """The model with all ids from `shared_tokens` on taken for padding.

    Raises:
      ValueError: it knows fewer.
    """
    if model.config.known_tokens < shared_tokens:
        raise ValueError(f"shared_tokens={shared_tokens} and a model that knows {model.config.known_tokens} tokens")
    return Model(dataclasses.replace(model.config, num_tokens=shared_tokens), model.params)


@contextlib.contextmanager
def _batch_kept(directory: Path, source: Source) -> Iterator[None]:
    """Writes the batch of a step that diverged into the block's directory, for whoever looks for the cause."""
    try:
        yield
    except TrainingDiverged as error:  # in every process at the same step
        path, kept = directory / f"diverged-{error.step:08d}.npz", "is"
        if processes.is_first():
            try:
                batch = source.batch(error.step - 1)
                named = {name: value for name, value in batch._asdict().items() if isinstance(value, np.ndarray)}
                np.savez_compressed(path, allow_pickle=False, **named)
            except (OSError, ValueError, LookupError) as cause:  # must not hide that the run diverged
                kept = f"could not be written ({cause})"
        kept = processes.told_by_first("the batch of a step that diverged", kept)
        raise TrainingDiverged(f"{error}; the step's batch {kept} in {path}", error.step) from error


def _in_dtype(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _batches(
    source: Source, places: Layouts, start: int, config: TrainConfig, student: Callable[[], Any], *, ahead: bool
) -> Generator[_Ready, None, None]:
    """The batches from a position on, on the devices.

    Args:
      source: of the batches. It is told the student where it wants to know it; nothing is fetched beyond that.
      places: where batches go.
      start: the first position.
      config: of the run.
      student: gives the parameters as they are by then.
      ahead: whether they may be sent ahead of their step.
    """

    def placed(ready: _Ready) -> _Ready:
        return ready._replace(batch=place_batch(ready.batch, places))

    def make(position: int) -> _Ready:
        ready = _Ready(position, source.batch(position), source.facts(position))
        return placed(ready) if ahead else ready

    position = start
    while position < config.steps:
        until = min(source.prepare(position, student), config.steps)
        with contextlib.closing(prefetched(make, range(position, until), config.prefetch)) as found:
            yield from found if ahead else map(placed, found)
        position = until
