"""The step over eight fake devices: what it computes is what one device computes, and it sends what the rules imply.

What the devices send each other, as compiled here (jax 0.10, CPU; one in a loop over layers counts once, per layer):

    mesh (data x fsdp x tensor)      8x1x1   1x8x1       1x1x8   1x2x4, 1x4x2      2x2x2
    student layer, forward           -       7 AG        2 AR    7 AG, 2 AR        7 AG, 2 AR
    student layer, backward          -       7 AG        5 AR    7 AG, 5 AR        7 AG, 5 AR
      gradients (7 matrices, norms)  1 AR    1 AR        -       1 AR              3 AR
    teacher layer                    -       7 AG        2 AR    7 AG, 2 AR        7 AG, 2 AR
    look-up, both models             -       3 A2A       2 AR    3 A2A, 2 AR       3 A2A, 2 AR
    heads, both models               -       2 AG        1 AR    2 AG, 1 AR        2 AG, 1 AR
      gradient of the student's      1 AR    1 RS        -       1 RS              1 RS, 1 AR

AG gathers a matrix over fsdp, A2A sends rows of embeddings home, AR sums activations over tensor (in the backward pass
q, k, v, gate and up make one each, sent together by two operations) or gradients over data and fsdp (together), RS sums
and leaves to each device the part that it keeps. The heads' AR over tensor is the gradient of the hidden states at the loss
tokens, once for all chunks. Besides: the gradient of the embedding, the ids of the look-up (AG over fsdp), and over tensor,
per chunk of the loss, five numbers a token; and collective-permutes of the teacher's head where the two vocabularies are
padded differently: its rows are cut or filled up to the student's, which shifts the parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from subl_jax.distill.step import Layouts, has_dropout, mean_loss
from subl_jax.models.config import ModelConfig
from tests.distill import sharded
from tests.distill.sharded import ADAPTED, FEW_HEADS, GROUPS, QWEN, ROWS, STUDENT, TARGETS, TEACHER, TIME, Case

# (data, fsdp, tensor)
CUBE = (2, 2, 2)
ALL_MESHES = {"x".join(map(str, m)): m for m in [CUBE, (1, 2, 4), (1, 4, 2), (1, 8, 1), (1, 1, 8), (8, 1, 1)]}
# One of them among the fast tests, all of them among the slow ones.
MESHES = [pytest.param(m, id=name, marks=[pytest.mark.slow] * (m != CUBE)) for name, m in ALL_MESHES.items()]

# One device, all activations kept, a loop over the layers: what the others are compared with.
PLAIN = {"remat": "none", "scan_unroll": 1, "compute_dtype": "float32"}


def assert_like_one_device(case: Case) -> None:
    """Loss, gradient (by its norm and Adam's moment) and updated parameters, to the project's bars."""
    loss, gradient = sharded.alone(case.objective, dataclasses.replace(case.student, **PLAIN), case.teacher)
    trained, _ = sharded.parts(case)
    done = sharded.stepped(case)
    assert done.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradient)])
    assert done.metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > sharded.OPTIMIZER.clip_norm
    kept = 1 - sharded.OPTIMIZER.b1
    expected = jax.tree.map(lambda leaf: kept * leaf, sharded.clipped(gradient))
    assert sharded.distance(sharded.first_moment(done.state), expected) <= 1e-5
    assert sharded.distance(done.state.params, sharded.updated(trained, gradient)) <= 1e-5
    assert done.metrics["loss_tokens"] == float(np.sum(sharded.packed().loss_weights))
    assert int(done.state.step) == 1


@pytest.mark.parametrize("mesh", MESHES)
def test_loss_gradients_and_the_updated_parameters_equal_those_of_one_device(mesh):
    assert_like_one_device(Case(mesh))


VARIANTS = {
    "hard labels; tied, biases, norms on heads": Case((1, 4, 2), objective="hard", student=QWEN),
    "anchor": Case(CUBE, objective="anchor"),
    "drop; two key/value heads on eight devices": Case(
        (1, 1, 8), "kv_replicated", "default", "drop", dataclasses.replace(FEW_HEADS, tie_embeddings=True)
    ),
    "whole student beside a split teacher; layers recomputed": Case(
        CUBE, "replicated", "default", student=dataclasses.replace(STUDENT, remat="full")
    ),
    "matrices gathered whole; all but products recomputed": Case(
        (1, 2, 4), "fsdp", "fsdp", student=dataclasses.replace(STUDENT, remat="dots")
    ),
    "split student beside a gathered teacher; layers unrolled": Case(
        (1, 2, 4), "default", "fsdp", student=dataclasses.replace(STUDENT, scan_unroll=2)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_other_objectives_models_rules_and_ways_to_run_equal_one_device_too(name):
    assert_like_one_device(VARIANTS[name])


# --- Adapters ---------------------------------------------------------------------------------------------------------

LORA = Case((1, 2, 4), student=ADAPTED)


@pytest.mark.slow
def test_adapters_learn_as_on_one_device_with_the_same_dropout_and_their_base_stays_as_it_was():
    """Dropout too: which activations drop is a function of the seed and the step, not of the mesh."""
    assert has_dropout(ADAPTED)
    assert_like_one_device(LORA)
    done, (trained, frozen) = sharded.stepped(LORA), sharded.parts(LORA)
    state = [path for tree in (done.state.params, sharded.first_moment(done.state)) for path in flatten_dict(tree)]
    assert {path[-1] for path in state} == {"lora_a", "lora_b"} and len(state) == 2 * 2 * 5
    jax.tree.map(np.testing.assert_array_equal, done.frozen.student, frozen.student)
    moved = jax.tree.map(lambda after, before: bool(np.any(np.asarray(after) != before)), done.state.params, trained)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_no_gradient_of_a_frozen_weight_is_worked_out_or_sent():
    text = sharded.text_of(LORA)
    frozen = {tuple(sorted(shape)) for shape in sharded.matrices(ADAPTED, 4).values()}
    sent = {tuple(sorted(shape)) for op in sharded.collectives(text) if op.kind == "all-reduce" for shape in op.shapes}
    assert not sent & frozen
    assert (3, 20) in sent  # that of an adapter is: its rank, a device's half of d_model


# --- Precision and recomputation --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same_and_masters_stay_float32():
    half = {"compute_dtype": "bfloat16"}
    case = Case((1, 2, 4), student=dataclasses.replace(STUDENT, **half), teacher=dataclasses.replace(TEACHER, **half))
    loss, gradient = sharded.alone("full", STUDENT, TEACHER)
    done = sharded.stepped(case)
    assert done.metrics["loss"] == pytest.approx(loss, rel=0.02)
    moment = jax.tree.map(lambda leaf: leaf * (1 - sharded.OPTIMIZER.b1), sharded.clipped(gradient))
    assert 1e-4 < sharded.distance(sharded.first_moment(done.state), moment) < 0.1  # it did round, and not too much
    floats = [leaf for leaf in jax.tree.leaves((done.state.params, done.state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in floats} == {np.dtype("float32")}


def test_recomputation_is_asked_for_in_the_order_of_its_cost():
    """Counted in the program before XLA sees it, which would merge what is computed twice on a CPU."""
    trained, frozen = sharded.parts(Case((1, 1, 1)))

    def flops(remat: str) -> float:
        config = dataclasses.replace(STUDENT, remat=remat)

        def loss(params, frozen, batch):
            return mean_loss(sharded.OBJECTIVES["hard"], config, None, params, frozen, batch)

        arguments = (trained, frozen._replace(teacher=None), sharded.packed())
        cost: Any = jax.jit(jax.grad(loss)).lower(*arguments).cost_analysis()
        return cost["flops"]

    none, dots, full = map(flops, ("none", "dots", "full"))
    assert none < dots < full
    # A layer's products once more, but for the last, whose result no derivative needs. (A loop's body is counted once.)
    again = sum(
        math.prod(shape) for name, shape in sharded.matrices(STUDENT, 1).items() if name not in ("down", "head")
    )
    assert full - dots == pytest.approx(2 * ROWS * TIME * again, rel=0.05)


# --- What is sent -----------------------------------------------------------------------------------------------------


def gathered_parts(config: ModelConfig, tensor: int) -> Mapping[str, tuple[int, ...]]:
    """What a device gathers of each matrix: what it computes with. The teacher's head comes as it is kept, tied and so
    transposed, and has the student's ids by then.
    """
    head = (STUDENT.vocab_size // tensor, config.d_model)
    return {**sharded.matrices(config, tensor), "head": head if config.tie_embeddings else head[::-1]}


def flat(shapes) -> set[tuple[int, ...]]:
    """Shapes up to a transposition, which XLA is free to make."""
    return {tuple(sorted(shape)) for shape in shapes}


# What `tensor` splits, in both models; the teacher has as many key/value heads as query heads.
WHOLE = {
    size
    for config in (STUDENT, TEACHER)
    for size in (
        config.vocab_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
        config.d_ff,
    )
}


@pytest.mark.parametrize("mesh", MESHES)
def test_matrices_are_gathered_over_fsdp_only_and_only_the_part_that_a_device_computes_with(mesh):
    _, fsdp, tensor = mesh
    gathers = Counter(
        shape
        for op in sharded.collectives(sharded.text_of(Case(mesh)))
        for shape in op.shapes
        if op.kind == "all-gather" and op.dtype != "s32"  # the ids of the look-up
    )
    expected: Counter[tuple[int, ...]] = Counter()
    for config, passes in ((STUDENT, 2), (TEACHER, 1)):  # a student's matrices are needed again on the way back
        for name, shape in gathered_parts(config, tensor).items():
            expected[shape] += 1 if name == "head" else passes
    if fsdp == 1:
        assert not gathers
    else:
        assert set(gathers) == set(expected) and gathers <= expected


@pytest.mark.parametrize("mesh", MESHES)
def test_no_device_ever_holds_a_whole_dimension_that_is_split_over_tensor(mesh):
    """Neither of a weight nor of an activation: every size of every array in the program is looked at."""
    seen = sharded.sizes(sharded.text_of(Case(mesh)))
    assert seen & WHOLE == (set() if mesh[2] > 1 else WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hard labels; tied, biases, norms on heads", "anchor"])
def test_logit_filters_and_labels_need_no_whole_vocabulary_and_no_foreign_rows(name):
    case = VARIANTS[name]
    text = sharded.text_of(case)
    assert case.mesh[2] > 1 and not sharded.sizes(text) & WHOLE
    # The ids of the look-up, among the devices that hold other columns of the table; no banned ids, no labels.
    integers = {op.shapes for op in sharded.collectives(text) if op.dtype == "s32"}
    assert integers == {((ROWS // case.mesh[0], TIME),)}


@pytest.mark.parametrize("mesh", MESHES)
def test_what_else_is_sent_is_activations_over_tensor_gradients_of_the_student_and_rows_of_embeddings(mesh):
    data, fsdp, tensor = mesh
    rows = ROWS // (data * fsdp)
    found = sharded.collectives(sharded.text_of(Case(mesh)))
    kinds = {"all-reduce"} | ({"all-gather", "all-to-all", "reduce-scatter"} if fsdp > 1 else set())
    # The vocabularies are padded to 88 and 136 rows: what is cut off shifts the parts of the teacher's head.
    kinds |= {"collective-permute"} if tensor > 1 else set()
    assert {op.kind for op in found} == kinds

    sums = {shape for op in found if op.kind in ("all-reduce", "reduce-scatter") for shape in op.shapes}
    for width in (STUDENT.d_model, TEACHER.d_model):
        assert ((rows, TIME, width) in sums) == (tensor > 1)
    # Of the loss: five numbers a token of a chunk (here a group), 20 bytes, and the hidden states' gradient once.
    counted = Counter(shape for op in found for shape in op.shapes if op.kind == "all-reduce")
    assert counted[TARGETS, 1] == (5 if tensor > 1 else 0)
    assert counted[GROUPS // (data * fsdp), TARGETS, STUDENT.d_model] == (1 if tensor > 1 else 0)
    # Gradients: of what a device computed with, or of its part of that. None of the teacher, which learns nothing.
    used = list(sharded.matrices(STUDENT, tensor).values())
    parts = [tuple(size // fsdp if size == STUDENT.d_model else size for size in shape) for shape in used]
    summed = flat(shape for shape in sums if len(shape) == 2) - {(1, TARGETS)}
    assert summed <= flat(used) | flat(parts)
    if data * fsdp > 1:
        assert all(flat([a]) & summed or flat([b]) & summed for a, b in zip(used, parts, strict=True))
    else:
        assert not summed

    for op in found:
        if op.kind == "all-to-all":  # rows of the batch, with the columns of the embedding that a device holds
            assert {shape[:-1] for shape in op.shapes} == {(rows, TIME)}, op
            assert {shape[-1] for shape in op.shapes} <= {STUDENT.d_model // fsdp, TEACHER.d_model // fsdp}, op
        if op.kind == "collective-permute":  # rows of the teacher's head, with the columns that a device holds
            assert {shape[1] for shape in op.shapes} == {TEACHER.d_model // fsdp}, op
            assert all(shape[0] <= TEACHER.vocab_size // tensor for shape in op.shapes), op
        if op.kind == "reduce-scatter":  # the gradient of the head, for the part of it that a device keeps
            assert op.shapes == ((STUDENT.d_model // fsdp, STUDENT.vocab_size // tensor),), op


def test_a_program_of_one_device_sends_nothing_and_asks_for_nothing():
    case = Case((1, 1, 1))
    assert case.layouts == Layouts()
    assert not sharded.collectives(sharded.text_of(case))
    assert_like_one_device(case)


@pytest.mark.slow
def test_rules_that_gather_matrices_whole_send_no_activations_and_whole_models_are_not_gathered():
    def gathered(config: ModelConfig, tensor: int) -> set[tuple[int, ...]]:
        return set(gathered_parts(config, tensor).values())

    case = VARIANTS["matrices gathered whole; all but products recomputed"]
    found = sharded.collectives(sharded.text_of(case))
    gathers = {shape for op in found for shape in op.shapes if op.kind == "all-gather" and op.dtype != "s32"}
    assert gathers == gathered(STUDENT, 1) | gathered(TEACHER, 1)
    sums = {shape for op in found if op.kind == "all-reduce" for shape in op.shapes}
    assert not [shape for shape in sums if len(shape) == 3]

    case = VARIANTS["whole student beside a split teacher; layers recomputed"]
    found = sharded.collectives(sharded.text_of(case))
    gathers = {shape for op in found for shape in op.shapes if op.kind == "all-gather" and op.dtype != "s32"}
    assert gathered(TEACHER, case.mesh[2]) <= gathers
    # Over `tensor`, which splits the teacher's vocabulary, the student's head is cut where it stands; the parts of its
    # gradient are put together again. Nothing else of the student is gathered.
    head = (STUDENT.d_model, STUDENT.vocab_size)
    assert gathers & gathered(STUDENT, 1) == {head}


EVERY_CASE = {**{name: Case(mesh) for name, mesh in ALL_MESHES.items()}, **VARIANTS, "adapters": LORA}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_CASE)
def test_a_state_comes_out_where_it_went_in_so_that_the_next_step_is_the_same_program(name):
    case = EVERY_CASE[name]
    compiled = sharded.program(case)
    (state, _, batch), _ = compiled.input_shardings
    after, _ = compiled.output_shardings
    before, _, tokens = sharded.placed(case)
    leaves = [jax.tree.leaves(tree) for tree in (state, after, before)]
    for come, gone, array in zip(*leaves, strict=True):
        assert come.is_equivalent_to(gone, array.ndim) and come.is_equivalent_to(array.sharding, array.ndim)
    assert case.layouts.student is not None
    rows, groups = ROWS // case.layouts.student.split("batch"), GROUPS // case.layouts.groups
    for where, array, share in zip(batch[:7], tokens[:7], (rows,) * 3 + (groups,) * 4, strict=True):
        if where is not None:  # what the objective does not read is no argument of the program
            assert where.shard_shape(array.shape) == (1, share, *array.shape[2:])


def test_the_models_and_the_batch_have_no_size_twice():
    """What makes shapes tell in the tests above: else a gathered matrix might pass for another array."""
    assert len(WHOLE) == 7 and len(WHOLE | {STUDENT.d_model, TEACHER.d_model, ROWS, TIME, TARGETS}) == 12
