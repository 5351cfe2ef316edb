"""Drawing one token: the right frequencies, the right log-probability, and a key that every name enters."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax, softmax

from subl_jax.rollout.sampling import SamplingConfig, draw, turn_key

LOGITS = np.asarray([2.0, -1.0, 0.5, 0.0, 1.5, -0.5, -9.0], np.float32)
DRAWS = 50_000
draw_jit = jax.jit(draw, static_argnums=3)
KEYS = jax.jit(jax.vmap(lambda n: jax.random.fold_in(jax.random.key(7), n)))(jnp.arange(DRAWS))


def drawn(temperature: float, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens, logprobs = draw_jit(jnp.broadcast_to(LOGITS, (DRAWS, 7)), KEYS, jnp.int32(step), temperature)
    return np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax_and_logprobs_the_unmodified_model(temperature):
    tokens, logprobs = drawn(temperature)
    expected = softmax(LOGITS.astype(np.float64) / temperature)
    counts = np.bincount(tokens, minlength=7)
    # Chi-square wants five expected in each cell: the rarest tokens are pooled.
    order = np.argsort(expected)
    pooled = np.cumsum(expected[order])[1], counts[order[:2]].sum()
    observed, wanted = np.append(counts[order[2:]], pooled[1]), np.append(expected[order[2:]], pooled[0])
    assert stats.chisquare(observed, wanted * DRAWS).pvalue > 1e-4
    # The same counts are far from the other temperature: the test would notice.
    other = softmax(LOGITS.astype(np.float64) / (1.5 - temperature))
    assert stats.chisquare(counts, other * DRAWS).pvalue < 1e-12
    np.testing.assert_allclose(logprobs, log_softmax(LOGITS.astype(np.float64))[tokens], atol=1e-5)


def test_successive_steps_and_slots_are_drawn_independently():
    first, second = drawn(1.0, 0)[0], drawn(1.0, 1)[0]
    for left, right in [(first, second), (first[:-1], first[1:])]:
        table = np.zeros((7, 7))
        np.add.at(table, (left, right), 1)
        common = table[:, table.sum(0) > 500][table.sum(1) > 500]
        result: Any = stats.chi2_contingency(common)
        assert result.pvalue > 1e-4


def test_zero_temperature_is_the_argmax():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 13)).astype(np.float32)
    tokens, logprobs = draw_jit(jnp.asarray(logits), KEYS[:9], jnp.int32(0), 0.0)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logprobs, log_softmax(logits.astype(np.float64), axis=-1).max(-1), atol=1e-5)


def test_half_precision_logits_are_normalised_in_single():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 500)), jnp.bfloat16)
    tokens, logprobs = draw_jit(logits, KEYS[:2], jnp.int32(0), 1.0)
    exact = log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(2), np.asarray(tokens)]
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, exact, atol=1e-5)


def test_every_name_changes_the_key_and_their_order_counts():
    names = list(itertools.product(range(3), repeat=5))
    make = jax.jit(jax.vmap(lambda names: jax.random.key_data(turn_key(*names))))
    keys = np.asarray(make(jnp.asarray(names, jnp.int32)))
    assert len({tuple(key) for key in keys.tolist()}) == len(names)
    np.testing.assert_array_equal(keys, make(jnp.asarray(names, jnp.int32)))


@pytest.mark.parametrize("name", ["max_turn_tokens", "max_turns", "context", "slots", "prefill_chunk"])
def test_limits_under_which_nothing_could_run_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        dataclasses.replace(SamplingConfig(), **{name: 0})


def test_a_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature=-0.5 is negative"):
        SamplingConfig(temperature=-0.5)
