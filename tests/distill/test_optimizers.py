"""Optimizers and schedules by name, against closed forms and torch.optim."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.distill.optimizers import OptimizerConfig, make_optimizer, make_schedule

PLAIN = OptimizerConfig("sgd", learning_rate=0.1, warmup_steps=0, clip_norm=1e9)
RNG = np.random.default_rng(0)
# As of a model: matrices stacked over layers, norms, and the embedding.
PARAMS = {
    "layers": {"q": {"kernel": RNG.normal(size=(2, 4, 3))}, "norm": {"scale": RNG.normal(size=(2, 4))}},
    "embedding": RNG.normal(size=(5, 4)),
}
GRADIENTS = [jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), PARAMS) for _ in range(8)]


def trajectory(optimizer: OptimizerConfig, steps: int = 8, length: int = 10) -> list[Any]:
    """Parameters after each of the first steps of a run of that length, on the same gradients."""
    transformation = make_optimizer(optimizer, length)
    params = jax.tree.map(jnp.float32, PARAMS)
    state, found = transformation.init(params), []

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = transformation.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for gradient in GRADIENTS[:steps]:
        params, state = step(params, state, jax.tree.map(jnp.float32, gradient))
        found.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
    return found


def rates(optimizer: OptimizerConfig, length: int) -> list[float]:
    """The rate of every step, and of the one after the last."""
    schedule: Any = make_schedule(optimizer, length)
    return [float(schedule(step)) for step in range(length + 1)]


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


def close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


# --- Rules ------------------------------------------------------------------------------------------------------------


def test_sgd_moves_by_the_learning_rate_times_the_gradient():
    after = trajectory(dataclasses.replace(PLAIN, schedule="constant"), 2)
    total = jax.tree.map(np.add, *GRADIENTS[:2])
    close(after[1], jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, total))


def test_clipping_scales_the_whole_gradient_to_the_norm():
    (after,) = trajectory(dataclasses.replace(PLAIN, clip_norm=0.25), 1)
    scale = 0.1 * 0.25 / norm(GRADIENTS[0])
    close(after, jax.tree.map(lambda p, g: p - scale * g, PARAMS, GRADIENTS[0]))
    assert norm(GRADIENTS[0]) > 0.25
    (whole,) = trajectory(dataclasses.replace(PLAIN, clip_norm=1.001 * norm(GRADIENTS[0])), 1)
    close(whole, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, GRADIENTS[0]))


def test_adamws_first_step_is_the_sign_of_the_gradient_and_decay_takes_matrices_only():
    optimizer = OptimizerConfig("adamw", learning_rate=0.01, warmup_steps=0, weight_decay=0.3, clip_norm=1e9)
    (after,) = trajectory(optimizer, 1)
    decay = jax.tree.map(lambda leaf: 0.3 * leaf * (leaf.ndim > 2), PARAMS)
    assert np.any(decay["layers"]["q"]["kernel"]) and not np.any(decay["embedding"])
    close(after, jax.tree.map(lambda p, g, d: p - 0.01 * (g / (np.abs(g) + 1e-8) + d), PARAMS, GRADIENTS[0], decay))


def test_lion_is_the_sign_of_the_interpolated_momentum():
    """Chen et al. 2302.06675, algorithm 2: b1 mixes the step, b2 keeps the momentum."""
    optimizer = OptimizerConfig(
        "lion", learning_rate=0.01, warmup_steps=0, weight_decay=0.3, b1=0.7, b2=0.9, clip_norm=1e9, schedule="constant"
    )
    params, momentum = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for gradient, after in zip(GRADIENTS, trajectory(optimizer), strict=True):
        decay = jax.tree.map(lambda leaf: 0.3 * leaf * (leaf.ndim > 2), params)
        step = jax.tree.map(lambda m, g: np.sign(0.7 * m + 0.3 * g), momentum, gradient)
        params = jax.tree.map(lambda p, s, d: p - 0.01 * (s + d), params, step, decay)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, momentum, gradient)
        close(after, params)


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum"])
def test_torchs_optimizers_take_the_same_eight_steps(name):
    torch: Any = pytest.importorskip("torch", reason="needs torch: make setup EXTRAS=dev,oracles")
    shared: dict[str, Any] = {"learning_rate": 0.05, "warmup_steps": 0, "clip_norm": 2.0, "schedule": "constant"}
    optimizer = {
        "adamw": OptimizerConfig("adamw", weight_decay=0.2, b1=0.8, b2=0.95, **shared),
        "sgd": OptimizerConfig("sgd", **shared),
        "momentum": OptimizerConfig("sgd", momentum=0.9, **shared),
    }[name]
    # Copies: torch writes into the memory that it is given.
    leaves = [torch.tensor(np.array(leaf), requires_grad=True) for leaf in jax.tree.leaves(PARAMS)]
    if name == "adamw":
        groups = [{"params": [x], "weight_decay": 0.2 * (x.ndim > 2)} for x in leaves]
        theirs = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-8)
    else:
        theirs = torch.optim.SGD(leaves, lr=0.05, momentum=0.9 if name == "momentum" else 0.0)
    for gradient, after in zip(GRADIENTS, trajectory(optimizer), strict=True):
        for leaf, g in zip(leaves, jax.tree.leaves(gradient), strict=True):
            leaf.grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(leaves, 2.0)
        theirs.step()
        close(jax.tree.leaves(after), [leaf.detach().numpy() for leaf in leaves])


# --- Schedules --------------------------------------------------------------------------------------------------------

PEAK = OptimizerConfig("sgd", learning_rate=2.0, warmup_steps=4, final_fraction=0.25, clip_norm=1e9)


def test_every_schedule_warms_up_in_a_line_from_nothing_to_the_peak():
    for schedule in ("cosine", "linear", "constant"):
        found = rates(dataclasses.replace(PEAK, schedule=schedule), 12)
        np.testing.assert_allclose(found[:5], [0, 0.5, 1.0, 1.5, 2.0], atol=1e-6)


def test_the_cosine_ends_at_its_fraction_of_the_peak():
    at = np.arange(9) / 8
    expected = 2.0 * (0.25 + 0.75 * (1 + np.cos(np.pi * at)) / 2)
    np.testing.assert_allclose(rates(PEAK, 12)[4:], expected, rtol=1e-5)


def test_the_line_ends_at_its_fraction_of_the_peak_and_the_constant_stays():
    linear, constant = (dataclasses.replace(PEAK, schedule=schedule) for schedule in ("linear", "constant"))
    np.testing.assert_allclose(rates(linear, 12)[4:], np.linspace(2.0, 0.5, 9), rtol=1e-5)
    np.testing.assert_allclose(rates(constant, 12)[4:], 2.0, rtol=1e-6)


def test_the_optimizer_runs_under_the_schedule():
    transformation = make_optimizer(PEAK, 12)
    state, found = transformation.init({"w": jnp.ones(())}), []
    for _ in range(13):
        update, state = transformation.update({"w": jnp.ones(())}, state)
        found.append(-float(update["w"]))  # type: ignore[index]
    np.testing.assert_allclose(found, rates(PEAK, 12), rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_shorter_than_its_warm_up_trains_at_the_peak_in_the_end(schedule):
    for length, warmup in ((1, 0), (1, 20), (5, 20)):
        found = rates(dataclasses.replace(PEAK, warmup_steps=warmup, schedule=schedule), length)
        assert found[length - 1] == pytest.approx(2.0, rel=1e-6)
        assert np.all(np.isfinite(found))


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_optimizer_is_refused_by_name():
    config = OptimizerConfig()
    object.__setattr__(config, "name", "adagrad")  # the annotation check of the tests would stop it earlier
    with pytest.raises(ValueError, match="'adagrad'; use adamw, lion, sgd"):
        make_optimizer(config, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": -1e-3}, {"learning_rate": float("nan")}, {"clip_norm": 0.0}, {"b2": 1.5}, {"warmup_steps": -1},
     {"weight_decay": -0.1}, {"final_fraction": 2.0}, {"momentum": 1.5, "name": "sgd"}, {"momentum": 0.9}],
)  # fmt: skip
def test_optimizer_values_with_which_no_run_could_learn_are_refused_by_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)
