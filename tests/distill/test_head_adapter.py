"""Training an adapter on the vocabulary head, through the step: against a dense computation on a merged, untied model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import (
    ONE_DEVICE,
    Batch,
    Frozen,
    Layouts,
    TrainState,
    _dropped,
    compiled_step,
    mean_loss,
    place_batch,
    state_shardings,
)
from subl_jax.models import axes, decoder, lora
from subl_jax.models.config import LoraConfig, ModelConfig
from subl_jax.parallel.layout import Layout, MeshConfig, make_mesh
from tests.models.test_decoder import flat, parameters
from tests.models.test_lora import on, random_adapters

ROWS, TIME, TARGETS, KNOWN = 8, 12, 5, 38
STUDENT = ModelConfig(40, 16, 1, 2, 2, 8, 24, init_scale=0.5, num_tokens=KNOWN)
TEACHER = ModelConfig(48, 24, 1, 2, 2, 8, 32, init_scale=0.5, num_tokens=KNOWN, tie_embeddings=False)
BOTH = LoraConfig(3, 7.0, 0.0, ("o", "head"))
HEAD = LoraConfig(3, 7.0, 0.0, ("head",))
OBJECTIVE = Objective("forward_kl", temperature=1.5)
# A step of it is the gradient itself.
PLAIN = OptimizerConfig("sgd", learning_rate=1.0, warmup_steps=0, clip_norm=1e9, schedule="constant")


def batch(groups: int) -> Batch:
    """The same rows and loss tokens, listed in more or fewer groups."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, KNOWN, (ROWS, TIME)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, TIME - 3 :] = 0
    places = np.stack([np.sort(rng.choice(TIME - 4, TARGETS, replace=False)) for _ in range(ROWS)])
    labels = np.take_along_axis(tokens, places + 1, axis=1)
    share = ROWS // groups
    inside = places.reshape(groups, share, TARGETS) + np.arange(share)[:, None] * TIME
    weights = np.ones((ROWS, TARGETS), np.float32)
    weights[0, -2:] = 0

    def listed(x: np.ndarray) -> np.ndarray:
        return x.reshape(1, groups, share * TARGETS)

    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), tokens.shape)
    banned = np.zeros((1, groups, share * TARGETS, 0), np.int32)
    arrays: Any = (
        tokens[None], segments[None], positions[None], listed(inside.astype(np.int32)), listed(labels), listed(weights), banned
    )  # fmt: skip
    return Batch(*arrays)


@functools.cache
def student_of(tied: bool, adapter: LoraConfig) -> tuple[ModelConfig, Any, Any]:
    """(configuration, adapters, the weights below)."""
    config = dataclasses.replace(STUDENT, tie_embeddings=tied, lora=adapter)
    return config, random_adapters(config), parameters(on(config, None))


@functools.cache
def teacher() -> Any:
    return parameters(TEACHER, seed=3)


def stepped(tied: bool, adapter: LoraConfig, layouts: Layouts = ONE_DEVICE) -> tuple[float, Any, Frozen]:
    """(loss, gradient of what was trained, what was frozen) by one step of the library."""
    config, adapters, below = student_of(tied, adapter)
    transformation = make_optimizer(PLAIN, 10)
    adapters = jax.tree.map(jnp.copy, adapters)  # donated
    state = TrainState(adapters, transformation.init(adapters), jnp.zeros((), jnp.int32))
    frozen = Frozen(teacher(), None, below)
    student, other = layouts
    if student is not None and other is not None:
        state = jax.device_put(state, state_shardings(transformation, state, student))
        frozen = Frozen(axes.place(teacher(), TEACHER, other), None, axes.place(below, config, student))
    before = jax.tree.map(np.asarray, state.params)
    run = compiled_step(OBJECTIVE, config, TEACHER, PLAIN, 10, 0, layouts)
    after, metrics = jax.block_until_ready(run(state, frozen, place_batch(batch(layouts.groups), layouts)))
    change = jax.tree.map(lambda old, new: old - np.asarray(new), before, after.params)
    return float(metrics["loss"]), change, frozen


def log_probs(config: ModelConfig, params: Any) -> Any:
    """Of every known continuation at the loss tokens, softened; from all logits at once."""
    rows = batch(1)
    tokens, segments, positions = (jnp.asarray(x[0]) for x in rows[:3])
    hidden, _ = decoder.apply(config, params, {}, tokens, positions, segments)
    logits = hidden @ params["head"]
    return jax.nn.log_softmax(logits[..., :KNOWN] / 1.5).reshape(-1, KNOWN)[rows.loss_places[0, 0]]


@functools.cache
def divergence_and_gradient() -> Any:
    """Compiled once: whatever was adapted and tied, merged it is one untied model."""
    weights = batch(1).loss_weights[0, 0]

    def loss(student: Any, teacher: Any) -> Any:
        p, q = log_probs(TEACHER, teacher), log_probs(dataclasses.replace(STUDENT, tie_embeddings=False), student)
        return jnp.sum(1.5**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1) * weights) / weights.sum()

    return jax.jit(jax.value_and_grad(loss))


def dense(tied: bool, adapter: LoraConfig, teacher: Any) -> tuple[float, Any]:
    """(loss, gradient by the weights) of the merged model, its head a matrix of its own."""
    config, adapters, below = student_of(tied, adapter)
    merged = lora.merged(config, decoder.merge(adapters, below))
    value, gradient = divergence_and_gradient()(merged, teacher)
    return float(value), jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), gradient)


@pytest.mark.parametrize(
    ("tied", "adapter"), [(True, BOTH), (False, BOTH), (True, HEAD)], ids=["tied", "untied", "alone"]
)
def test_a_step_trains_a_and_b_alone_by_the_gradient_of_the_merged_model(tied, adapter):
    config, adapters, below = student_of(tied, adapter)
    kept = jax.tree.map(np.array, below)
    loss, change, frozen = stepped(tied, adapter)
    expected, whole = dense(tied, adapter, teacher())
    assert loss == pytest.approx(expected, rel=1e-5)
    owners: dict[tuple[str, ...], Any] = {("head_adapter",): whole["head"]}
    if "o" in adapter.targets:
        owners["layers", "o"] = whole["layers"]["o"]["kernel"]
    assert set(flat(change)) == {(*owner, leaf) for owner in owners for leaf in ("lora_a", "lora_b")}
    for owner, gradient in owners.items():
        # W' = W + s A B, hence dA = s dW' B^T and dB = s A^T dW'.
        a, b = (np.asarray(flat(adapters)[*owner, leaf], np.float64) for leaf in ("lora_a", "lora_b"))
        down, up = 7 / 3 * gradient @ b.swapaxes(-1, -2), 7 / 3 * a.swapaxes(-1, -2) @ gradient
        for leaf, exact in (("lora_a", down), ("lora_b", up)):
            assert np.abs(exact).max() > 1e-2
            np.testing.assert_allclose(flat(change)[*owner, leaf], exact, rtol=1e-4, atol=1e-5)
    for path, leaf in flat(kept).items():
        np.testing.assert_array_equal(flat(frozen.student)[path], leaf)


def test_over_eight_devices_loss_and_gradient_are_those_of_one():
    layout = Layout(make_mesh(MeshConfig(2, 2, 2)))
    loss, change, _ = stepped(True, BOTH, Layouts(layout, layout))
    expected, exact, _ = stepped(True, BOTH)
    assert loss == pytest.approx(expected, rel=1e-5)
    for path, leaf in flat(exact).items():
        np.testing.assert_allclose(flat(change)[path], leaf, rtol=1e-4, atol=1e-5)


def test_dropout_falls_on_the_adapters_path_alone_and_the_same_however_tokens_are_grouped():
    config, adapters, below = student_of(True, dataclasses.replace(HEAD, dropout=0.5))
    run = jax.jit(lambda trained, frozen, rows, key: mean_loss(OBJECTIVE, config, TEACHER, trained, frozen, rows, key))
    key, other = jax.random.split(jax.random.key(1))

    def loss(adapters: Any, groups: int, key: Any) -> float:
        return float(run(adapters, Frozen(teacher(), None, below), batch(groups), key))

    dropped = loss(adapters, 1, key)
    assert loss(adapters, 4, key) == pytest.approx(dropped, rel=1e-6)
    assert abs(dropped - dense(True, HEAD, teacher())[0]) > 1e-3 and abs(dropped - loss(adapters, 1, other)) > 1e-3
    # With B = 0 the adapter adds nothing, whatever it drops: a change would be on the way to the weights.
    idle = {"head_adapter": {**adapters["head_adapter"], "lora_b": jnp.zeros((3, 40))}}
    assert loss(idle, 1, key) == loss(idle, 1, other)


def test_what_dropout_keeps_is_scaled_to_the_same_mean_and_every_token_drops_others():
    hidden = jnp.ones((2, 300, 50))
    places = jnp.arange(600).reshape(2, 300)
    dropped = np.asarray(_dropped(hidden, places, 0.2, jax.random.key(0)))
    assert np.unique(dropped).tolist() == pytest.approx([0, 1.25])
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    assert len(np.unique(dropped.reshape(600, 50), axis=0)) == 600
    np.testing.assert_array_equal(_dropped(hidden, places, 0.0, jax.random.key(0)), hidden)


def test_an_adapted_teachers_head_is_fitted_to_the_students_vocabulary():
    """Its rows beyond the student's are cut off both terms."""
    config = on(TEACHER, HEAD)
    adapters = random_adapters(config, seed=5)
    student, trained, below = student_of(True, HEAD)
    run = jax.jit(lambda trained, frozen, rows: mean_loss(OBJECTIVE, student, config, trained, frozen, rows))
    both = decoder.merge(adapters, teacher())
    expected, _ = dense(True, HEAD, lora.merged(config, both))
    assert float(run(trained, Frozen(both, None, below), batch(1))) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - dense(True, HEAD, teacher())[0]) > 1e-2
