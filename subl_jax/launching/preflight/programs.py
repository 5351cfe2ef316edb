"""The programs of an experiment, lowered for devices that need not be here: no weights, only shapes and where they lie.

A `Case` and a topology's devices go in; programs that can be compiled come out. They are those that the run itself builds:
the training step, the rollout's programs and the readout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from subl_jax import metrics
from subl_jax.distill.accounting import shape_of
from subl_jax.distill.memory import AbstractModel, abstract_model, abstract_state
from subl_jax.distill.objective import Objective
from subl_jax.distill.step import Batch, Frozen, Layouts, check_vocabularies, compiled_step
from subl_jax.distill.train_config import TrainConfig
from subl_jax.evaluate import readout
from subl_jax.launching.preflight import expected
from subl_jax.launching.preflight.expected import Term
from subl_jax.models import axes
from subl_jax.models.backends import choose_backend
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, bytes_per_device, make_mesh
from subl_jax.rollout.sampling import SamplingConfig

# What stands in for a task's data: tokens of its opening, names that are scored and tokens of the longest.
_OPENING, _NAMES, _NAME_TOKENS = 1024, 12, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
      teacher, student: shapes, and how they are run. A student with `lora` trains its adapters alone.
      objective: of the distillation.
      train: rows, tokens per row and parts of a step.
      mesh: of the training step.
      sampling: of rollouts.
      groups: of slots on each replica.
      tensor: devices of a replica.
    """

    teacher: ModelConfig
    student: ModelConfig
    objective: Objective
    train: TrainConfig
    mesh: MeshConfig
    sampling: SamplingConfig
    groups: int = 1
    tensor: int = 1


class Program(NamedTuple):
    """One program, ready to be lowered.

    Attributes:
      name: as in the tables.
      mesh: the devices' shape, as text.
      devices: that run it.
      lower: makes `jax.stages.Lowered`; tracing happens here.
      held: bytes that one device holds by what they are: parameters, optimizer, teacher, batch, cache.
      flops: that the work requires, over all devices (MEASURING's formulas); 0 where nobody counts them.
      tokens: that it works on, over all devices.
      terms: the expected collectives, of one run of every loop whose length the program does not know.
      beside: bytes that a device holds besides while it runs, which are no argument of it.
      kernel_flops: of one device, inside kernels that the compiler's text does not show.
      required_bytes: that one device's memory must be read for, where loops of unknown length hide it.
      logits: (tokens, ids, d_model) of one device, of which no array [tokens, ids] may be held; None: that may be.
    """

    name: str
    mesh: str
    devices: int
    lower: Callable[[], Any]
    held: Mapping[str, int]
    flops: float
    tokens: int
    terms: Sequence[Term]
    beside: int = 0
    kernel_flops: float = 0
    required_bytes: float = 0
    logits: tuple[int, int, int] | None = None


def distill(case: Case, devices: Sequence[Device]) -> Program:
    """The training step over all devices.

    Raises:
      LayoutError: a mesh that is not these devices, or dimensions that do not split over it.
      ValueError: vocabularies that do not fit each other.
    """
    try:
        mesh = make_mesh(case.mesh, devices)
    except NotImplementedError as error:  # JAX lays no axis over a part of a dimension of the torus
        raise LayoutError(
            f"a mesh of {mesh_text(case.mesh, len(devices))} does not lie on this slice: each axis must fill whole dimensions "
            "of it; use other axes"
        ) from error
    layouts = Layouts(Layout(mesh, case.mesh.student_rules), Layout(mesh, case.mesh.teacher_rules))
    (layout, above), place = layouts, layouts.loss
    assert layout is not None and above is not None and place is not None
    train, (model, teacher) = case.train, models(case)
    if case.objective.needs_teacher:
        check_vocabularies(case.student, case.teacher)
    else:
        teacher = None
    for part, where in ((model, layout), (teacher, above)):
        if part is not None:
            axes.check_layout(part.config, where)
    layout.check(
        "batch", train.batch_rows // train.accumulate, "rows of a part of a batch", "set --batch or --accumulate"
    )
    adapted = case.student.lora is not None
    state = abstract_state(model.adapters if adapted else model.weights, train, layout)
    frozen = Frozen(
        teacher=None if teacher is None else axes.abstract(teacher.weights, above),
        student=axes.abstract(model.weights, layout) if adapted else None,
    )
    batch = _batch(train, layouts)
    step = compiled_step(
        case.objective,
        model.config,
        None if teacher is None else teacher.config,
        train.optimizer,
        train.steps,
        0,
        layouts,
        train.chunk_tokens,
    )
    tokens = train.batch_rows * train.row_tokens
    shape = shape_of(model.config, model.weights, model.adapters)
    other = None if teacher is None else shape_of(teacher.config, teacher.weights, teacher.adapters)
    return Program(
        name="distill",
        mesh=_shape(mesh),
        devices=mesh.size,
        lower=lambda: step.lower(state, frozen, batch),  # type: ignore[attr-defined]
        held={
            "student": bytes_per_device(state.params),
            "optimizer": bytes_per_device((state.opt_state, state.step)),
            "teacher": bytes_per_device(frozen.teacher),
            "frozen": bytes_per_device(frozen.student),
            "batch": bytes_per_device(batch),
        },
        flops=metrics.kd_step_flops(other, shape, tokens, tokens, [train.row_tokens] * train.batch_rows),
        tokens=tokens,
        terms=expected.distill_terms(
            model.config,
            None if teacher is None else teacher.config,
            layouts,
            train.batch_rows,
            train.row_tokens,
            tokens,
            train.accumulate,
            train.master_dtype,
        ),
        kernel_flops=sum(
            _kernel_flops(part.config, where, train, trained)
            for part, where, trained in ((model, layout, True), (teacher, above, False))
            if part is not None
        ),
        logits=(
            tokens // train.accumulate // place.groups,
            case.student.vocab_size // place.parts,
            case.student.d_model,
        ),
    )


def _kernel_flops(config: ModelConfig, layout: Layout, train: TrainConfig, trained: bool) -> float:
    """Operations of the splash kernel on one device in a step, causal-halved; 0 where XLA's own products attend.

    Two products in the forward pass, which is run again under remat (its results are not kept by `dots` either); seven in the
    two kernels of the backward pass, which make the scores anew.
    """
    if choose_backend(config, train.row_tokens, layout) != "splash":
        return 0
    one = train.batch_rows * train.row_tokens**2 * config.num_layers * config.num_heads * config.head_dim
    return one * (2 + trained * (7 + 2 * (config.remat != "none"))) / layout.mesh.size


def models(case: Case) -> tuple[AbstractModel, AbstractModel]:
    """(student, teacher) without values."""
    return abstract_model(case.student), abstract_model(dataclasses.replace(case.teacher, lora=None))


def rows_unit(case: Case, devices: Sequence[Device]) -> int:
    """What the rows of a step must be a multiple of."""
    mesh = make_mesh(case.mesh, devices)
    return case.train.accumulate * max(
        Layout(mesh, rules).split("batch") for rules in (case.mesh.student_rules, case.mesh.teacher_rules)
    )


def _shape(mesh: Mesh) -> str:
    """A mesh as text: `1x64x1`."""
    return "x".join(str(size) for size in mesh.devices.shape)


def _batch(train: TrainConfig, layouts: Layouts) -> Batch:
    """One batch without values, every token of which carries a loss."""
    layout, place = layouts.student, layouts.loss
    assert layout is not None and place is not None
    rows, listed = layout.sharding((None, "batch")), NamedSharding(layout.mesh, P(None, place.batch or None))
    shape = (train.accumulate, train.batch_rows // train.accumulate, train.row_tokens)
    groups = (train.accumulate, place.groups, shape[1] * shape[2] // place.groups)
    laid = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)] * 3
    of_loss = [jax.ShapeDtypeStruct(groups, kind, sharding=listed) for kind in (jnp.int32, jnp.int32, jnp.float32)]
    banned = jax.ShapeDtypeStruct((*groups, 0), jnp.int32, sharding=listed)
    return Batch(*laid, *of_loss, banned)  # type: ignore[arg-type]


def evaluate(case: Case, devices: Sequence[Device], role: str = "student") -> Program:
    """The readout's scorer, on one device as a run has it: a block of task openings, and the names that are scored."""
    config = dataclasses.replace({"teacher": case.teacher, "student": case.student}[role], lora=None)
    model, where = abstract_model(config), SingleDeviceSharding(devices[0])
    opening = min(_OPENING, case.sampling.context - _NAME_TOKENS)
    tasks = readout._block_size(config, _NAMES, opening + _NAME_TOKENS)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), model.weights)
    given = (params, array(tasks, opening), array(tasks), array(_NAMES, _NAME_TOKENS), array(_NAMES))
    tokens = tasks * (opening + _NAMES * _NAME_TOKENS)
    shape = shape_of(model.config, model.weights, model.adapters)
    scored = tasks * _NAMES * _NAME_TOKENS
    return Program(
        name=f"evaluate {role}",
        mesh="1x1x1",
        devices=1,
        lower=lambda: readout._scorer(config).lower(*given),
        held={"weights": bytes_per_device(params)},
        flops=metrics.forward_flops(shape, tokens, scored, [opening] * tasks),
        tokens=tokens,
        terms=(),
    )


def mesh_text(mesh: MeshConfig, devices: int) -> str:
    """`data x fsdp x tensor` of a mesh over so many devices, as the tables show it."""
    data = mesh.data or devices // (mesh.fsdp * mesh.tensor)
    return f"{data}x{mesh.fsdp}x{mesh.tensor}"
