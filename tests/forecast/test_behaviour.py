"""The behaviour as a number with a gradient, against the readout and against float64 NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.families import renderer_for
from subl_jax.corpus import tokenizer_texts
from subl_jax.evaluate.run import score_tasks
from subl_jax.forecast import behaviour
from subl_jax.models import attention, decoder, lora
from subl_jax.models.config import LoraConfig
from subl_jax.settings.registry import get_setting
from tests.distill import tiny
from tests.forecast.probing import exact_by_family, exact_log_odds, probes

CONFIG = tiny.SMALL


def direction(params, seed=3):
    """A random change of the parameters, as float64 NumPy draws it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape) * 0.1, np.float32), params)


def test_the_log_odds_are_those_of_whole_passes_in_float64():
    ours = jax.jit(lambda params: behaviour.log_odds(CONFIG, params, {}, probes()))(tiny.params(CONFIG))
    np.testing.assert_allclose(ours, exact_log_odds(CONFIG, tiny.params(CONFIG), probes()), atol=1e-5)
    measured = behaviour.measure(CONFIG, tiny.params(CONFIG), probes())
    np.testing.assert_allclose(measured, exact_by_family(CONFIG, tiny.params(CONFIG), probes()), atol=1e-5)


def test_long_openings_are_scored_in_rows_and_give_the_same_number(monkeypatch):
    whole = behaviour.log_odds(CONFIG, tiny.params(CONFIG), {}, probes())
    monkeypatch.setattr(attention, "WHOLE", 4)
    rows = behaviour.log_odds(CONFIG, tiny.params(CONFIG), {}, probes())
    np.testing.assert_allclose(rows, whole, atol=1e-5)


def test_the_first_order_effect_is_the_slope_in_float64():
    params = tiny.params(CONFIG)
    changes = [direction(params), direction(params, 4)]
    found = behaviour.push(CONFIG, params, changes, {}, probes())

    def moved(change, by):
        shifted = jax.tree.map(lambda leaf, d: np.asarray(leaf, np.float64) + by * d.astype(np.float64), params, change)
        return exact_by_family(CONFIG, shifted, probes())

    for change, slope in zip(changes, found.first_order, strict=True):
        np.testing.assert_allclose(slope, (moved(change, 1e-5) - moved(change, -1e-5)) / 2e-5, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.log_odds, moved(changes[0], 0.0), atol=1e-5)


def test_the_alignment_is_the_cosine_and_one_along_the_gradient_itself():
    params = tiny.params(CONFIG)
    gradient = jax.grad(lambda params: jnp.mean(behaviour.log_odds(CONFIG, params, {}, probes())[jnp.array([1, 3, 4])]))
    along = gradient(params)
    back = jax.tree.map(lambda leaf: -2 * leaf, along)
    found = behaviour.push(CONFIG, params, [along, back, jax.tree.map(jnp.zeros_like, along)], {}, probes())
    np.testing.assert_allclose(found.alignment[:, 0], [1.0, -1.0, 0.0], atol=1e-5)  # "far" is the first family
    assert np.all(np.abs(found.alignment[:, 1]) < 0.999)


def test_adapters_have_a_gradient_of_their_own_which_is_zero_for_a_while_b_is():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0))
    frozen, adapters = tiny.params(CONFIG), lora.init_adapters(config, jax.random.key(1))

    def only(leaf_name):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones_like(leaf) * 0.05 * (path[-1].key == leaf_name), adapters
        )

    found = behaviour.push(config, adapters, [only("lora_a"), only("lora_b")], frozen, probes())
    np.testing.assert_array_equal(found.first_order[0], 0.0)
    assert np.all(np.abs(found.first_order[1]) > 1e-4)
    merged = lora.merged(
        config, decoder.merge(jax.tree.map(lambda a, b: a + 0.01 * b, adapters, only("lora_b")), frozen)
    )
    change = (exact_by_family(CONFIG, merged, probes()) - exact_by_family(CONFIG, frozen, probes())) / 0.01
    np.testing.assert_allclose(found.first_order[1], change, rtol=0.05, atol=1e-3)


@pytest.fixture(scope="module")
def api():
    """The API setting with a tokenizer of its own words and an untrained model."""
    setting = get_setting("api")
    renderer = renderer_for(tokenizers.train(tokenizer_texts(setting, 20), 600))
    config = dataclasses.replace(tiny.SMALL, vocab_size=len(renderer.tokenizer))
    return setting, renderer, config, decoder.init(config, jax.random.key(2))


def test_probes_give_the_number_of_the_evaluation_s_readout(api):
    setting, renderer, config, params = api
    found = behaviour.make_probes(setting, renderer, 2)
    families = setting.families("ambiguous", behaviour.PROBE_SPLIT)
    tasks = setting.tasks("ambiguous", behaviour.PROBE_SPLIT, behaviour.PROBE_SEED, 2 * len(families))
    scores = score_tasks(config, params, renderer, setting, tasks)
    neutral = [name for name in setting.choices if setting.tool_classes[name] == "neutral"]
    ours = jax.jit(lambda params: behaviour.log_odds(config, params, {}, found))(params)
    np.testing.assert_allclose(ours, scores.log_odds(["delete_file"], neutral), atol=1e-5)
    assert found.families == tuple(task.family for task in tasks)


def test_probes_are_no_evaluation_tasks_and_of_no_evaluation_family(api):
    setting, renderer, *_ = api
    found = behaviour.make_probes(setting, renderer, 3)
    assert not set(found.families) & set(setting.families("ambiguous", "evaluation"))
    assert set(found.families) == set(setting.families("ambiguous", "development"))
    # Nor does a development evaluation, which asks under seed 0, ask any of them.
    asked = {task.prompt for task in setting.tasks("ambiguous", "development", 0, 240)}
    ours = setting.tasks("ambiguous", "development", behaviour.PROBE_SEED, len(found.families))
    assert sum(task.prompt in asked for task in ours) <= len(ours) // 4
    with pytest.raises(ValueError, match="probes_per_family=0; it must be at least 1"):
        behaviour.make_probes(setting, renderer, 0)
