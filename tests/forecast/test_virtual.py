"""Virtual steps against the training itself, and their first-order contributions against gradients taken another way."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill.batches import BatchSource
from subl_jax.distill.loop import Model, train
from subl_jax.distill.objective import Loss, Objective
from subl_jax.distill.optimizers import OptimizerConfig
from subl_jax.distill.train_config import TrainConfig
from subl_jax.forecast import behaviour, virtual
from subl_jax.forecast.candidate import AuditError, Candidate
from subl_jax.forecast.virtual import VirtualConfig
from subl_jax.models import decoder
from subl_jax.models.config import LoraConfig
from tests.distill import tiny
from tests.forecast.probing import exact_by_family, probes

ADAM = OptimizerConfig(learning_rate=2e-3, warmup_steps=2)


def candidate(optimizer=ADAM, steps=6, loss: Loss = "forward_kl", config=tiny.SMALL, seed=5):
    teacher = Model(tiny.LARGE, tiny.params(tiny.LARGE, 1)) if loss != "hard_label" else None
    return Candidate(
        Model(config, tiny.params(tiny.SMALL)), tiny.documents(60),
        TrainConfig(steps, 4, 16, optimizer, checkpoint_every=100), Objective(loss, temperature=1.0), seed, teacher,
    )  # fmt: skip


def trained(given: Candidate, directory):
    result = train(
        given.start, given.documents, given.config, given.objective, seed=given.seed, directory=directory / "student",
        stage="student", logs=directory, metadata={}, teacher=given.teacher,
    )  # fmt: skip
    below = given.start.params if given.start.config.lora else {}
    return decoder.merge(result.params, below)


@pytest.mark.parametrize("adapters", [None, LoraConfig(rank=2, alpha=4.0, dropout=0.1)], ids=["whole", "lora"])
def test_as_many_virtual_steps_as_the_training_has_end_where_it_ends(tmp_path, adapters):
    given = candidate(config=dataclasses.replace(tiny.SMALL, lora=adapters))
    found = virtual.virtual_runs(given, probes(), VirtualConfig(steps=6, stretches=3, runs=2, probes_per_family=1))
    after = behaviour.measure(given.start.config, trained(given, tmp_path), probes())
    np.testing.assert_allclose(found[0].log_odds[-1], after, atol=1e-5)
    assert np.abs(found[0].log_odds[-1] - found[0].log_odds[0]).min() > 1e-4
    # The other run has batches of its own.
    assert np.abs(found[1].log_odds[-1] - found[0].log_odds[-1]).max() > 1e-5
    assert np.all(np.isfinite(found[1].first_order))


def test_contributions_add_up_to_the_real_change_in_float64():
    given = candidate()
    (run, _) = virtual.virtual_runs(given, probes(), VirtualConfig(steps=6, stretches=6, runs=2, probes_per_family=1))
    np.testing.assert_allclose(run.log_odds[0], exact_by_family(tiny.SMALL, given.start.params, probes()), atol=1e-5)
    change = run.log_odds[-1] - run.log_odds[0]
    np.testing.assert_allclose(run.first_order.sum(0), change, rtol=0.02, atol=1e-4)
    assert np.abs(change).max() > 0.01


def test_one_step_of_sgd_contributes_minus_its_rate_times_the_inner_product_of_the_gradients():
    """TracIn's form, from a loss written out over the whole vocabulary."""
    rate = 1e-3
    given = candidate(OptimizerConfig("sgd", rate, 0, clip_norm=1e6, schedule="constant"), steps=1, loss="hard_label")
    spec = VirtualConfig(steps=1, stretches=1, runs=2, probes_per_family=1)
    (run, _) = virtual.virtual_runs(given, probes(), spec)
    lengths = [len(document.tokens) for document in given.documents]
    batch = BatchSource(given.documents, lengths, 16, 4, 2, given.seed).batch(0)

    def loss(params):
        tokens, positions, segments = (
            jnp.asarray(field[0]) for field in (batch.tokens, batch.positions, batch.segments)
        )
        hidden, _ = decoder.apply(tiny.SMALL, params, {}, tokens, positions, segments)
        logits = hidden.reshape(-1, hidden.shape[-1]) @ params["embedding"].T
        log_probs = jax.nn.log_softmax(logits)[batch.loss_places[0, 0], batch.loss_targets[0, 0]]
        return -jnp.sum(log_probs * batch.loss_weights[0, 0]) / jnp.sum(batch.loss_weights)

    slope = jax.grad(loss)(given.start.params)
    step = jax.tree.map(lambda leaf: -rate * leaf, slope)
    at_start = behaviour.push(tiny.SMALL, given.start.params, [step], {}, probes()).first_order[0]
    ends = jax.tree.map(jnp.add, given.start.params, step)
    at_end = behaviour.push(tiny.SMALL, ends, [step], {}, probes()).first_order[0]
    np.testing.assert_allclose(run.first_order[0], (at_start + at_end) / 2, rtol=1e-3, atol=1e-7)
    assert np.abs(at_start).max() > 1e-6


def test_adapters_that_start_from_nothing_are_moved_by_the_steps_themselves():
    config = dataclasses.replace(tiny.SMALL, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0))
    given = candidate(dataclasses.replace(ADAM, learning_rate=0.02), config=config)
    (run, _) = virtual.virtual_runs(given, probes(), VirtualConfig(steps=6, stretches=6, runs=2, probes_per_family=1))
    np.testing.assert_array_equal(run.first_order[0], 0.0)  # the rate of the very first step is zero
    assert np.abs(run.first_order[-1]).max() > 1e-4
    np.testing.assert_allclose(run.first_order.sum(0), run.log_odds[-1] - run.log_odds[0], rtol=0.05, atol=1e-3)


def test_nothing_is_written_and_the_student_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = candidate()
    before = jax.tree.map(lambda leaf: np.array(leaf), given.start.params)
    virtual.virtual_runs(given, probes(), VirtualConfig(steps=2, stretches=2, runs=2, probes_per_family=1))
    assert not list(tmp_path.iterdir())
    jax.tree.map(np.testing.assert_array_equal, given.start.params, before)


def test_a_virtual_run_goes_beyond_the_warm_up_and_not_beyond_the_training():
    config = TrainConfig(steps=340, optimizer=OptimizerConfig(warmup_steps=20))
    assert VirtualConfig(steps=12, stretches=4).length(config) == 32
    assert VirtualConfig(steps=12, stretches=4).ends(config) == [8, 16, 24, 32]
    short = dataclasses.replace(config, steps=10)
    assert VirtualConfig(steps=12, stretches=4).ends(short)[-1] == 10
    rates = virtual.learning_rates(candidate(steps=6))
    np.testing.assert_allclose(rates[:3], [0.0, 1e-3, 2e-3], rtol=1e-6)


def test_a_forecast_of_nothing_is_refused_by_name():
    with pytest.raises(AuditError, match="runs=1; it must be at least 2"):
        VirtualConfig(runs=1)
    with pytest.raises(AuditError, match="stretches=4 is more than steps=3"):
        VirtualConfig(steps=3)
    with pytest.raises(AuditError, match="a training of 2 steps, and 4 stretches.*at most 2"):
        virtual.virtual_runs(candidate(steps=2), probes(), VirtualConfig())
