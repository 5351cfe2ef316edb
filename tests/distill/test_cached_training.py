"""Distilling from a teacher's cached top-k beside distilling from the teacher itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill import teacher_cache
from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import Model
from subl_jax.distill.objective import Objective
from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer
from subl_jax.distill.step import Frozen, TrainState, compiled_step, mean_loss, place_batch
from tests.distill import tiny

DOCUMENTS = tiny.documents(24)
LENGTHS = [len(document.tokens) for document in DOCUMENTS]
TEACHER = Model(tiny.LARGE, tiny.params(tiny.LARGE, 1))
STEPS, HEAT, RATE = 12, 1.5, 1e-2


@functools.cache
def reader(directory: Any, k: int) -> teacher_cache.CacheReader:
    """A cache of the documents, written by the teacher; its figures are against the student's own start."""
    identity = teacher_cache.identity(TEACHER, "tokenizer", DOCUMENTS, HEAT, k, tiny.VOCAB)
    start = Model(tiny.SMALL, tiny.params(tiny.SMALL, 0))
    teacher_cache.write(
        directory,
        DOCUMENTS,
        TEACHER,
        k=k,
        temperature=HEAT,
        shared_tokens=tiny.VOCAB,
        identity=identity,
        reference=start,
    )
    return teacher_cache.CacheReader(directory, identity)


def distilled(cached: teacher_cache.CacheReader | None, loss: str) -> tuple[dict, list[float]]:
    """The student after some steps, and its losses."""
    source = BatchSource(DOCUMENTS, LENGTHS, 32, 8, STEPS, 0, cached=cached)
    optimizer = OptimizerConfig(learning_rate=RATE, warmup_steps=0)
    teacher = None if cached is not None else tiny.LARGE
    objective = Objective(loss, temperature=HEAT)  # type: ignore[arg-type]
    step = compiled_step(objective, tiny.SMALL, teacher, optimizer, STEPS, 0)
    params = jax.tree.map(jnp.array, tiny.params(tiny.SMALL, 0))
    state = TrainState(params, make_optimizer(optimizer, STEPS).init(params), jnp.zeros((), jnp.int32))
    losses = []
    for position in range(STEPS):
        frozen = Frozen(None if cached is not None else TEACHER.params)
        state, metrics = step(state, frozen, place_batch(source.batch(position)))
        losses.append(float(metrics["loss"]))
    return state.params, losses


# One program instead of an operation at a time, each of which is compiled by itself.
_MEAN_LOSS = jax.jit(functools.partial(mean_loss, Objective(temperature=HEAT), tiny.SMALL, tiny.LARGE))


def held_out(params: dict) -> float:
    """The full KL to the live teacher, on all documents."""
    batch = place_batch(BatchSource(DOCUMENTS, [32] * 24, 32, 24, 1, 0).batch(0))
    return float(_MEAN_LOSS(params, Frozen(TEACHER.params), batch))


@functools.cache
def live_student(loss: str) -> tuple[dict, list[float]]:
    """The student of the live teacher, which several tests compare theirs with."""
    return distilled(None, loss)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_a_cache_of_the_whole_vocabulary_is_the_teacher(tmp_path, loss):
    (live, losses), (cached, same) = live_student(loss), distilled(reader(tmp_path / "cache", tiny.VOCAB), loss)
    np.testing.assert_allclose(same, losses, rtol=2e-4)  # log-probabilities are stored in 16 bits
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), live, cached)
    assert max(jax.tree.leaves(moved)) < RATE  # within one step of Adam, whose first ones know signs only


def test_a_student_of_the_top_k_matches_a_live_one_within_the_reported_error(tmp_path):
    cached = reader(tmp_path / "cache", 12)
    error = cached.figures["added_error"] * HEAT**2  # the objective is times temperature²
    (live, losses), (fed, bounded) = live_student("forward_kl"), distilled(cached, "forward_kl")
    assert 0 < losses[0] - bounded[0]  # one bucket for the tail never sees more than there is
    assert losses[0] - bounded[0] == pytest.approx(error, rel=0.5)  # of one batch; the report is of all documents
    assert held_out(fed) < 0.8 * held_out(tiny.params(tiny.SMALL, 0))  # it did learn
    assert abs(held_out(fed) - held_out(live)) < error
