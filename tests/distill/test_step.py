"""The training step: the loss against a plain computation over all positions, its invariances, and the optimizers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill.batches import BatchSource
from subl_jax.distill.step import (
    Batch,
    Frozen,
    Objective,
    OptimizerConfig,
    TrainState,
    banned_mask,
    compiled_step,
    make_optimizer,
    mean_loss,
)
from subl_jax.models import decoder
from subl_jax.parallel.layout import Layout, LayoutError, MeshConfig, make_mesh
from tests.distill import tiny

DOCUMENTS = tiny.documents(9)
STUDENT, TEACHER, BASE = tiny.params(tiny.SMALL, 0), tiny.params(tiny.LARGE, 1), tiny.params(tiny.SMALL, 2)
FROZEN = Frozen(TEACHER, BASE)
OBJECTIVES = {
    "hard": Objective("hard_label"),
    "full": Objective("forward_kl", temperature=2.5),
    "drop": Objective("forward_kl", "drop", 2.0),
    "anchor": Objective("forward_kl", "anchor"),
}


def banned_of(index: int, place: int) -> list[int]:
    """Some banned ids for the loss token at `place` of document `index`; none at some places."""
    return sorted({(index * 7 + place * 3 + k * 5) % tiny.VOCAB for k in range((index + place) % 5)})


def packed_batch(capacity: int = 32, rows: int = 8) -> Batch:
    """Every document exactly once, several to a row, by hand: no code of `batches`. The rest of a row is padding."""
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
    return Batch(*(jnp.asarray(x) for x in (*integers.values(), places, labels, weights, banned)))


@functools.cache
def gradient_of(name: str):
    """The jitted loss and gradient of an objective."""
    return jax.jit(
        jax.value_and_grad(
            lambda params, frozen, batch: mean_loss(OBJECTIVES[name], tiny.SMALL, tiny.LARGE, params, frozen, batch)
        )
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
    return jax.jit(lambda params: (dense_losses(params), jax.jacrev(dense_losses)(params)))(STUDENT)


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
    assert np.max(np.asarray(batch.segments)) > 1  # rows of several documents
    assert len(jax.devices()) == 8
    many = gradient_of("full")(layout.replicate(STUDENT), layout.replicate(FROZEN), layout.shard_batch(batch))
    assert len(many[0].sharding.device_set) == 8
    assert_same(many, gradient_of("full")(STUDENT, FROZEN, batch))


def test_rows_that_do_not_split_over_the_devices_are_refused_with_the_nearest():
    layout = Layout(make_mesh(MeshConfig(data=8)))
    with pytest.raises(LayoutError, match=r"rows of a batch=12 .*over data=8 x fsdp=1 .* sizes that do are 8 or 16.*"):
        layout.shard_batch(packed_batch(rows=12))


def test_the_order_of_rows_and_an_empty_row_change_nothing():
    batch = packed_batch()
    order = np.random.default_rng(0).permutation(8)
    shuffled = Batch(*(field[order] for field in batch))
    assert_same(gradient_of("drop")(STUDENT, FROZEN, shuffled), gradient_of("drop")(STUDENT, FROZEN, batch))


def test_one_document_a_row_equals_several():
    """The same documents through `BatchSource` at two capacities: every document once in both."""
    lengths = [len(document.tokens) for document in DOCUMENTS]
    longest = max(lengths)
    alone = BatchSource(DOCUMENTS, [longest] * 9, longest, 9, 1, 0).batch(0)
    together = BatchSource(DOCUMENTS, lengths, sum(lengths), 1, 1, 0).batch(0)
    assert np.max(np.asarray(together.segments)) == 9 and np.max(np.asarray(alone.segments)) == 1
    loss = jax.jit(functools.partial(mean_loss, OBJECTIVES["hard"], tiny.SMALL, None))
    results = [float(loss(STUDENT, Frozen(), jax.tree.map(jnp.asarray, b))) for b in (alone, together)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_mean_is_over_all_loss_tokens_not_over_rows():
    """A row with one loss token and a row with many: the mean of means would weigh the one as much as the many."""
    batch = packed_batch()
    weights = np.array(batch.loss_weights)
    weights[1:] = 0
    weights[0, 1:] = 0
    counts = np.asarray(batch.loss_weights).sum()
    one = float(gradient_of("hard")(STUDENT, FROZEN, batch._replace(loss_weights=jnp.asarray(weights)))[0])
    rest = np.asarray(batch.loss_weights) - weights
    others = float(gradient_of("hard")(STUDENT, FROZEN, batch._replace(loss_weights=jnp.asarray(rest)))[0])
    whole = float(gradient_of("hard")(STUDENT, FROZEN, batch)[0])
    assert whole == pytest.approx((one + others * (counts - 1)) / counts, rel=1e-5)


def test_banned_ids_become_a_mask_and_padding_marks_nothing():
    rng = np.random.default_rng(1)
    ids = np.where(rng.random((3, 4, 6)) < 0.4, -1, rng.integers(0, 11, (3, 4, 6))).astype(np.int32)
    mask = np.asarray(banned_mask(jnp.asarray(ids), 11))
    expected = np.zeros((3, 4, 11), bool)
    for row in range(3):
        for target in range(4):
            for token in ids[row, target]:
                if token >= 0:
                    expected[row, target, token] = True
    np.testing.assert_array_equal(mask, expected)
    assert not banned_mask(jnp.zeros((2, 3, 0), jnp.int32), 5).any()


# --- Optimizers -------------------------------------------------------------------------------------------------------

PLAIN = OptimizerConfig("sgd", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)


def first_step(optimizer: OptimizerConfig) -> tuple[dict, dict, dict, dict]:
    """(parameters before, gradient, parameters after, metrics), as float64 numpy."""
    params = jax.tree.map(jnp.array, STUDENT)
    step = compiled_step(OBJECTIVES["hard"], tiny.SMALL, None, optimizer, 10, 0)
    state = TrainState(params, make_optimizer(optimizer, 10).init(params), jnp.zeros((), jnp.int32))
    _, gradient = gradient_of("hard")(STUDENT, FROZEN, packed_batch())
    after, metrics = step(state, Frozen(), packed_batch())
    assert int(after.step) == 1
    before, gradient, moved = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), t) for t in (STUDENT, gradient, after[0])
    )
    return before, gradient, moved, {name: float(value) for name, value in metrics.items()}


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def test_sgd_moves_by_the_learning_rate_times_the_gradient_and_reports_what_it_did():
    before, gradient, after, metrics = first_step(PLAIN)
    jax.tree.map(lambda b, g, a: np.testing.assert_allclose(a, b - 0.1 * g, atol=1e-6), before, gradient, after)
    assert metrics["gradient_norm"] == pytest.approx(norm(gradient), rel=1e-5)
    assert metrics["loss_tokens"] == sum(int(document.loss_mask.sum()) for document in DOCUMENTS)
    assert metrics["loss"] == pytest.approx(float(gradient_of("hard")(STUDENT, FROZEN, packed_batch())[0]), rel=1e-6)


def updated(optimizer: OptimizerConfig, gradient) -> dict:
    """The parameters after the first update, without the compiled step."""
    transformation = make_optimizer(optimizer, 10)
    updates = jax.jit(lambda g: transformation.update(g, transformation.init(STUDENT), STUDENT)[0])(gradient)
    return jax.tree.map(lambda p, u: np.asarray(p, np.float64) + u, STUDENT, updates)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    gradient = gradient_of("hard")(STUDENT, FROZEN, packed_batch())[1]
    after = updated(dataclasses.replace(PLAIN, clip_norm=0.25), gradient)
    scale = 0.1 * 0.25 / norm(jax.tree.map(lambda g: np.asarray(g, np.float64), gradient))
    jax.tree.map(lambda b, g, a: np.testing.assert_allclose(a, b - scale * g, atol=1e-6), STUDENT, gradient, after)


def test_adamws_first_step_is_the_sign_of_the_gradient_and_decay_takes_matrices_only():
    optimizer = OptimizerConfig("adamw", learning_rate=0.01, warmup_steps=0, weight_decay=0.3, clip_norm=1e9)
    gradient = gradient_of("hard")(STUDENT, FROZEN, packed_batch())[1]
    leaves = zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (STUDENT, gradient, updated(optimizer, gradient))),
        strict=True,
    )
    decayed = 0
    for (path, before), (_, g), (_, after) in leaves:
        name, g = jax.tree_util.keystr(path), np.asarray(g, np.float64)
        decay = 0.3 * np.asarray(before) * ("kernel" in name)
        decayed += "kernel" in name
        np.testing.assert_allclose(after, before - 0.01 * (g / (np.abs(g) + 1e-8) + decay), atol=1e-6, err_msg=name)
    assert decayed == 7  # q, k, v, o, gate, up, down; neither norms nor the embedding


def test_the_schedule_warms_up_and_ends_at_its_fraction_of_the_peak():
    optimizer = OptimizerConfig("sgd", learning_rate=2.0, warmup_steps=4, final_fraction=0.25, clip_norm=1e9)
    transformation = make_optimizer(optimizer, 12)
    state, rates = transformation.init({"w": jnp.ones(())}), []
    for _ in range(13):
        update, state = transformation.update({"w": jnp.ones(())}, state)
        rates.append(-float(update["w"]))  # type: ignore[index]
    np.testing.assert_allclose(rates[:5], [0, 0.5, 1.0, 1.5, 2.0], atol=1e-6)
    assert rates[8] == pytest.approx((2.0 + 0.5) / 2, rel=1e-5)  # half of the cosine
    assert rates[12] == pytest.approx(0.5, rel=1e-5)


def test_a_run_of_one_step_trains_at_the_peak_rate():
    transformation = make_optimizer(PLAIN, 1)
    update, _ = transformation.update({"w": jnp.ones(())}, transformation.init({"w": jnp.ones(())}))
    assert float(update["w"]) == pytest.approx(-0.1)  # type: ignore[index]


def test_an_unknown_optimizer_is_refused_by_name():
    config = OptimizerConfig()
    object.__setattr__(config, "name", "lion")  # the annotation check of the tests would stop it earlier
    with pytest.raises(ValueError, match="'lion'; use adamw or sgd"):
        make_optimizer(config, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": -1e-3}, {"learning_rate": float("nan")}, {"clip_norm": 0.0}, {"b2": 1.5}, {"warmup_steps": -1},
     {"weight_decay": -0.1}, {"final_fraction": 2.0}],
)  # fmt: skip
def test_optimizer_values_with_which_no_run_could_learn_are_refused_by_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def test_the_step_is_compiled_once_for_all_runs_of_one_shape():
    arguments = (OBJECTIVES["full"], tiny.SMALL, tiny.LARGE, OptimizerConfig(), 7)
    assert compiled_step(*arguments, 0) is compiled_step(*arguments, 0)
    assert compiled_step(*arguments, 0) is not compiled_step(*arguments, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "hard_label", "logit_filter": "drop"}, "hard_label has none"),
        ({"loss": "hard_label", "logit_filter": "anchor"}, "hard_label has none"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be positive"),
    ],
)
def test_objectives_without_meaning_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)
