"""The training step: the loss against a plain computation over all positions, and what must not change it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill.batches import BatchSource
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import (
    ONE_DEVICE,
    Batch,
    Frozen,
    Layouts,
    TrainState,
    compiled_step,
    mean_loss,
    place_batch,
    state_shardings,
)
from subl_jax.models import axes, decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, make_mesh
from tests.distill import dense as oracle
from tests.distill import sharded, tiny

DOCUMENTS = tiny.documents(9)
STUDENT, TEACHER, BASE = tiny.params(tiny.SMALL, 0), tiny.params(tiny.LARGE, 1), tiny.params(tiny.SMALL, 2)
FROZEN = Frozen(TEACHER, BASE)
OBJECTIVES = {
    "hard": Objective("hard_label"),
    "full": Objective("forward_kl", temperature=2.5),
    "drop": Objective("forward_kl", "drop", 2.0),
    "anchor": Objective("forward_kl", "anchor"),
    "mixed": Objective("jensen_shannon", temperature=1.5, hard_label_weight=0.25, teacher_weight=0.3),
}


def banned_of(index: int, place: int) -> list[int]:
    """Some banned ids for the loss token at `place` of document `index`; none at some places."""
    return sorted({(index * 7 + place * 3 + k * 5) % tiny.VOCAB for k in range((index + place) % 5)})


def packed_batch(capacity: int = 32, rows: int = 8) -> Batch:
    """Every document exactly once, several to a row, by hand: no code of `batches`. The rest of a row is padding.

    One part, and a group for every row.
    """
    width, targets = 8, 32
    integers = {name: np.zeros((rows, capacity), np.int32) for name in ("tokens", "segments", "positions")}
    places, labels = (np.zeros((rows, targets), np.int32) for _ in range(2))
    weights, banned = np.zeros((rows, targets), np.float32), np.full((rows, targets, width), -1, np.int32)
    used, counted, segment = [0] * rows, [0] * rows, [0] * rows
    for index, document in enumerate(DOCUMENTS):
        row, length = (index * 3) % rows, len(document.tokens)
        start = used[row]
        segment[row] += 1
        integers["tokens"][row, start : start + length] = document.tokens
        integers["segments"][row, start : start + length] = segment[row]
        integers["positions"][row, start : start + length] = np.arange(length)
        for place in np.flatnonzero(document.loss_mask):
            at = counted[row]
            places[row, at], labels[row, at], weights[row, at] = start + place - 1, document.tokens[place], 1
            ids = banned_of(index, int(place))
            banned[row, at, : len(ids)] = ids
            counted[row] += 1
        used[row] += length
    assert max(used) <= capacity
    arrays: Any = (jnp.asarray(x)[None] for x in (*integers.values(), places, labels, weights, banned))
    return Batch(*arrays)


def divided(batch: Batch, micro: int, groups: int) -> Batch:
    """The same rows, in order, in so many parts of so many groups each."""
    _, rows, capacity = batch.tokens.shape
    share = rows // (micro * groups)
    offset = (jnp.arange(rows) % share)[None, :, None] * capacity
    listed = (batch.loss_places + offset, *batch[4:7])
    arrays: Any = (
        *(x.reshape(micro, rows // micro, capacity) for x in batch[:3]),
        *(x.reshape(micro, groups, share * x.shape[2], *x.shape[3:]) for x in listed),
    )
    return Batch(*arrays)


@functools.cache
def gradient_of(name: str, layouts: Layouts = ONE_DEVICE, chunk_tokens: int = 0):
    """The loss and gradient of an objective, compiled once per shape."""
    return jax.jit(
        jax.value_and_grad(
            lambda params, frozen, batch: mean_loss(
                OBJECTIVES[name], tiny.SMALL, tiny.LARGE, params, frozen, batch, None, layouts, chunk_tokens
            )
        ),
        compiler_options=sharded.COMPILER,
    )


def dense_losses(params) -> jax.Array:
    """All objectives spelled out: documents one to a row, logits at all positions, plain probabilities, a mask."""
    time = max(len(document.tokens) for document in DOCUMENTS)
    tokens, mask = np.zeros((len(DOCUMENTS), time), np.int32), np.zeros((len(DOCUMENTS), time), bool)
    inside, banned = np.zeros_like(tokens), np.zeros((len(DOCUMENTS), time, tiny.VOCAB), bool)
    for row, document in enumerate(DOCUMENTS):
        tokens[row, : len(document.tokens)] = document.tokens
        inside[row, : len(document.tokens)] = 1
        mask[row, : len(document.tokens)] = document.loss_mask
        for place in np.flatnonzero(document.loss_mask):
            banned[row, place, banned_of(row, int(place))] = True
    positions = jnp.broadcast_to(jnp.arange(time), tokens.shape)

    def logits(config, weights):
        hidden, _ = decoder.apply(config, weights, {}, jnp.asarray(tokens), positions, jnp.asarray(inside))
        # What predicts the token at a place stands one before it.
        return jnp.roll(hidden @ weights["embedding"].T, 1, axis=1)

    def probabilities(x, temperature=1.0):
        x = jnp.exp(x / temperature)
        return x / jnp.sum(x, -1, keepdims=True)

    student, teacher, base = logits(tiny.SMALL, params), logits(tiny.LARGE, TEACHER), logits(tiny.SMALL, BASE)
    found = []
    for objective in OBJECTIVES.values():
        heat = objective.temperature
        q, p = probabilities(student, heat), probabilities(teacher, heat)
        if objective.loss == "hard_label":
            per_token = -jnp.sum(jax.nn.one_hot(tokens, tiny.VOCAB) * jnp.log(q), -1)
        elif objective.hard_label_weight:
            w = objective.teacher_weight
            m = w * p + (1 - w) * q
            mixture = w * jnp.sum(p * jnp.log(p / m), -1) + (1 - w) * jnp.sum(q * jnp.log(q / m), -1)
            label = -jnp.sum(jax.nn.one_hot(tokens, tiny.VOCAB) * jnp.log(probabilities(student)), -1)
            per_token = 0.75 * heat**2 * mixture + 0.25 * label
        elif objective.logit_filter == "drop":
            q, p = (x * ~banned / jnp.sum(x * ~banned, -1, keepdims=True) for x in (q, p))
            ratio = jnp.where(banned, 1.0, p) / jnp.where(banned, 1.0, q)
            per_token = heat**2 * jnp.sum(p * jnp.log(ratio), -1)
        elif objective.logit_filter == "anchor":
            b, p = probabilities(base), p * ~banned
            free = 1 - jnp.sum(b * banned, -1, keepdims=True)
            target = jnp.where(banned, b, free * p / p.sum(-1, keepdims=True))
            per_token = jnp.sum(target * jnp.log(target / q), -1)
        else:
            per_token = heat**2 * jnp.sum(p * jnp.log(p / q), -1)
        found.append(jnp.sum(per_token * mask) / mask.sum())
    return jnp.stack(found)


@functools.cache
def dense(name: str):
    """(loss, gradient) of one objective; all of them are worked out in one program, which compiles once."""
    values, gradients = _all_dense()
    index = list(OBJECTIVES).index(name)
    return values[index], jax.tree.map(lambda leaf: leaf[index], gradients)


@functools.cache
def _all_dense():
    both = jax.jit(
        lambda params: (dense_losses(params), jax.jacrev(dense_losses)(params)), compiler_options=sharded.COMPILER
    )
    return both(STUDENT)


def assert_same(left, right, loss: float = 1e-5, gradient: float = 1e-5) -> None:
    """(loss, gradient) pairs agree to the project's bars."""
    np.testing.assert_allclose(left[0], right[0], rtol=loss)
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (left[1], right[1]))
    assert np.linalg.norm(a - b) <= gradient * np.linalg.norm(b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_loss_at_listed_places_is_the_dense_masked_mean(name):
    assert_same(gradient_of(name)(STUDENT, FROZEN, packed_batch()), dense(name))


def test_eight_devices_and_one_agree():
    batch, layout = packed_batch(), Layout(make_mesh(MeshConfig(data=8)))
    layouts = Layouts(layout, layout)
    assert np.max(np.asarray(batch.segments)) > 1  # rows of several documents
    assert len(jax.devices()) == 8 == layouts.groups
    many = gradient_of("full", layouts)(
        layout.replicate(STUDENT), layout.replicate(FROZEN), place_batch(batch, layouts)
    )
    assert len(many[0].sharding.device_set) == 8
    assert_same(many, gradient_of("full")(STUDENT, FROZEN, batch))


def test_rows_that_do_not_split_over_the_devices_are_refused_with_the_nearest():
    layout = Layout(make_mesh(MeshConfig(data=8)))
    with pytest.raises(
        LayoutError, match=r"rows of a part .*=12 .*over data=8 x fsdp=1 .* sizes that do are 8 or 16.*"
    ):
        place_batch(packed_batch(rows=12), Layouts(layout, layout))


# --- What must not change it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "groups"), [(1, 1), (2, 1), (4, 2)])
def test_parts_and_groups_of_a_batch_change_nothing(micro, groups):
    """Parts have unlike numbers of loss tokens: a mean of their means would be another loss."""
    batch = divided(packed_batch(), micro, groups)
    counts = np.asarray(batch.loss_weights).sum((1, 2))
    assert micro == 1 or len(set(counts)) > 1
    assert_same(gradient_of("mixed")(STUDENT, FROZEN, batch), dense("mixed"))


@pytest.mark.parametrize("chunk", [7, 100])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    """Also where it does not divide the 256 places of a group, which are then filled up."""
    found = gradient_of("drop", ONE_DEVICE, chunk)(STUDENT, FROZEN, divided(packed_batch(), 1, 1))
    assert_same(found, dense("drop"))


def test_the_order_of_rows_and_an_empty_row_change_nothing():
    batch = packed_batch()
    order = np.random.default_rng(0).permutation(8)
    shuffled = jax.tree.map(lambda field: field[:, order], batch)
    assert_same(gradient_of("drop")(STUDENT, FROZEN, shuffled), gradient_of("drop")(STUDENT, FROZEN, batch))


def test_one_document_a_row_equals_several():
    """The same documents through `BatchSource` at two capacities: every document once in both."""
    lengths = [len(document.tokens) for document in DOCUMENTS]
    longest = max(lengths)
    alone = BatchSource(DOCUMENTS, [longest] * 9, longest, 9, 1, 0).batch(0)
    together = BatchSource(DOCUMENTS, lengths, sum(lengths), 1, 1, 0).batch(0)
    assert np.max(np.asarray(together.segments)) == 9 and np.max(np.asarray(alone.segments)) == 1
    loss = jax.jit(
        functools.partial(mean_loss, OBJECTIVES["hard"], tiny.SMALL, None), compiler_options=sharded.COMPILER
    )
    results = [float(loss(STUDENT, Frozen(), jax.tree.map(jnp.asarray, b))) for b in (alone, together)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_mean_is_over_all_loss_tokens_not_over_rows():
    """A row with one loss token and a row with many: the mean of means would weigh the one as much as the many."""
    batch = packed_batch()
    weights = np.zeros(batch.loss_weights.shape, np.float32)
    weights[0, 0, 0] = 1
    counts = np.asarray(batch.loss_weights).sum()
    one = float(gradient_of("hard")(STUDENT, FROZEN, batch._replace(loss_weights=jnp.asarray(weights)))[0])
    rest = np.asarray(batch.loss_weights) - weights
    others = float(gradient_of("hard")(STUDENT, FROZEN, batch._replace(loss_weights=jnp.asarray(rest)))[0])
    whole = float(gradient_of("hard")(STUDENT, FROZEN, batch)[0])
    assert whole == pytest.approx((one + others * (counts - 1)) / counts, rel=1e-5)


# --- The step ---------------------------------------------------------------------------------------------------------

PLAIN = OptimizerConfig("sgd", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)


def one_step(
    name: str = "hard", optimizer: OptimizerConfig = PLAIN, batch: Batch | None = None, layouts: Layouts = ONE_DEVICE,
    chunk_tokens: int = 0, dtype: str = "float32",
) -> tuple[TrainState, dict]:  # fmt: skip
    """The state and the metrics after a step from the same start."""
    teacher = tiny.LARGE if OBJECTIVES[name].needs_teacher else None
    step = compiled_step(OBJECTIVES[name], tiny.SMALL, teacher, optimizer, 10, 0, layouts, chunk_tokens)
    transformation = make_optimizer(optimizer, 10)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, dtype), STUDENT)
    state, frozen = TrainState(params, transformation.init(params), jnp.zeros((), jnp.int32)), FROZEN
    if layouts.student is not None:
        state = jax.device_put(state, state_shardings(transformation, state, layouts.student))
        frozen = layouts.student.replicate(frozen)
    arguments = (state, frozen, place_batch(packed_batch() if batch is None else batch, layouts))
    lowered: Any = step
    return jax.block_until_ready(lowered.lower(*arguments).compile(sharded.COMPILER)(*arguments))


def test_a_step_moves_by_the_gradient_and_reports_what_it_did():
    after, metrics = one_step()
    loss, gradient = gradient_of("hard")(STUDENT, FROZEN, packed_batch())
    jax.tree.map(lambda b, g, a: np.testing.assert_allclose(a, b - 0.1 * g, atol=1e-6), STUDENT, gradient, after.params)
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(gradient)))
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["loss_tokens"]) == sum(int(document.loss_mask.sum()) for document in DOCUMENTS)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert int(after.step) == 1


@functools.cache
def moved(name: str) -> tuple[Any, dict]:
    """What the step makes of the batch whole."""
    after, metrics = one_step(name)
    return gradient_seen(after), metrics


def gradient_seen(after: TrainState) -> Any:
    """By how much plain gradient descent moved, over its rate."""
    return jax.tree.map(
        lambda b, a: (np.asarray(b, np.float64) - np.asarray(a, np.float64)) / 0.1, STUDENT, after.params
    )


@pytest.mark.parametrize(
    ("micro", "groups", "chunk", "mesh"),
    [(4, 1, 50, None), (2, 2, 9, (1, 2, 2)), (1, 4, 0, (2, 2, 2))],
)
def test_a_step_in_parts_in_chunks_and_on_a_mesh_is_the_same_step(micro, groups, chunk, mesh):
    layouts = ONE_DEVICE
    if mesh is not None:
        # One key/value head: it stands whole on every device.
        made = make_mesh(MeshConfig(*mesh))
        layouts = Layouts(Layout(made, "kv_replicated"), Layout(made, "replicated"))
        assert groups % layouts.groups == 0
    after, metrics = one_step(
        "mixed", batch=divided(packed_batch(), micro, groups), layouts=layouts, chunk_tokens=chunk
    )
    gradient, expected = moved("mixed")
    # The step itself rounds to the parameters' digits: rather than 1e-5, what those leave.
    assert oracle.relative(gradient_seen(after), gradient) <= 3e-5
    for metric in ("loss", "gradient_norm", "loss_tokens"):
        assert float(metrics[metric]) == pytest.approx(float(expected[metric]), rel=1e-5)


def test_a_state_keeps_its_types_in_parts_too():
    """Gradients of parts are added up in float32; a bfloat16 state of another type would not be donated nor restored."""
    optimizer = OptimizerConfig("adamw", weight_decay=0.1)
    after, _ = one_step("hard", optimizer, divided(packed_batch(), 2, 1), dtype="bfloat16")
    params = jax.tree.map(lambda leaf: jnp.array(leaf, "bfloat16"), STUDENT)
    before = jax.eval_shape(lambda: TrainState(params, make_optimizer(optimizer, 10).init(params), jnp.int32(0)))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), after, before)


def test_the_step_is_compiled_once_for_all_runs_of_one_shape():
    arguments = (OBJECTIVES["full"], tiny.SMALL, tiny.LARGE, OptimizerConfig(), 7)
    assert compiled_step(*arguments, 0) is compiled_step(*arguments, 0)
    assert compiled_step(*arguments, 0) is not compiled_step(*arguments, 1)


# --- Memory -----------------------------------------------------------------------------------------------------------

# Of a vocabulary that outweighs everything else: 16 to 32 wide, 256 tokens.
WIDE = dataclasses.replace(tiny.SMALL, vocab_size=1024, num_kv_heads=2)
WIDE_TEACHER = dataclasses.replace(tiny.LARGE, vocab_size=1024, tie_embeddings=False)
CHUNK = 16


def largest(program: jax.stages.Lowered) -> tuple[int, int]:
    """Elements of the largest array in a program as it is handed to the compiler, and as one device then runs it."""
    handed = [
        math.prod(int(size) for size in found.split("x")[:-1])
        for found in re.findall(r"tensor<((?:\d+x)+[a-z]\w*)>", program.as_text())
    ]
    text = program.compile(sharded.COMPILER).as_text()
    assert text
    return max(handed), max(math.prod(shape) for _, shape in sharded.shapes(text))


def abstract(config: ModelConfig, layout: Layout | None) -> Any:
    return axes.abstract(jax.eval_shape(lambda: decoder.init(config, jax.random.key(0))), layout)


def lowered_step(objective: Objective, layouts: Layouts) -> jax.stages.Lowered:
    transformation = make_optimizer(PLAIN, 10)
    student, teacher = abstract(WIDE, layouts.student), abstract(WIDE_TEACHER, layouts.teacher)
    state = jax.eval_shape(lambda params: TrainState(params, transformation.init(params), jnp.int32(0)), student)
    if layouts.student is not None:
        where = state_shardings(transformation, state, layouts.student)
        state = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, where)
    step: Any = compiled_step(objective, WIDE, WIDE_TEACHER, PLAIN, 10, 0, layouts, CHUNK)
    batch = place_batch(divided(packed_batch(), 1, layouts.groups), layouts)
    return step.lower(state, Frozen(teacher, student if objective.logit_filter == "anchor" else None), batch)


@pytest.mark.parametrize(
    ("objective", "mesh"),
    [
        (Objective("jensen_shannon", "anchor"), None),
        (Objective("forward_kl"), (1, 1, 2)),
        (Objective("reverse_kl", "drop"), (2, 2, 2)),
    ],
)
def test_no_step_holds_an_array_of_all_tokens_by_the_vocabulary(objective, mesh):
    """Neither of all tokens nor of the loss tokens, which are as many here: the largest is a chunk's or a head."""
    layouts, rows, vocab = ONE_DEVICE, 256, 1024
    if mesh is not None:
        layout = Layout(make_mesh(MeshConfig(*mesh)))
        layouts, rows, vocab = Layouts(layout, layout), 256 // layout.split("batch"), 1024 // layout.split("vocab")
    handed, run = largest(lowered_step(objective, layouts))
    assert run < rows * vocab  # of one device
    assert run == max(CHUNK, WIDE_TEACHER.d_model) * vocab  # a head, gathered
    assert handed == WIDE_TEACHER.d_model * 1024 < 256 * 1024


def test_a_dense_step_would_be_found_out():
    """The search above finds what it looks for."""
    batch = packed_batch()

    def loss(params: Any, teacher: Any) -> jax.Array:
        def head(config: ModelConfig, weights: Any) -> oracle.Head:
            hidden, _ = decoder.apply(config, weights, {}, batch.tokens[0], batch.positions[0], batch.segments[0])
            chosen = jnp.take_along_axis(hidden, batch.loss_places[0][..., None], 1)
            tied = config.tie_embeddings
            return oracle.Head((chosen,), (weights["embedding" if tied else "head"],), (tied,))

        tokens = oracle.Tokens(batch.loss_targets[0], batch.loss_weights[0], batch.banned[0])
        return oracle.loss(Objective(), head(WIDE, params), head(WIDE_TEACHER, teacher), None, tokens, known=1024)

    program = jax.jit(jax.value_and_grad(loss)).lower(abstract(WIDE, None), abstract(WIDE_TEACHER, None))
    assert min(largest(program)) >= 256 * 1024
