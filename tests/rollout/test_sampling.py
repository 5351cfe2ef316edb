"""Drawing one token: the right frequencies, the right log-probability, and a key that every name enters."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.random import threefry_2x32
from scipy import stats
from scipy.special import log_softmax
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from subl_jax.models.decoder import PADDING_LOGIT
from subl_jax.rollout.sampling import SamplingConfig, check_vocabulary, draw, gumbel, truncate, turn_key

# Three policies that slots take turns in: one of a usual shape, a flat one, a peaked one. The last two tokens are padding
# rows of the vocabulary.
LOGITS = np.asarray(
    [
        [2.0, -1.0, 0.5, 0.0, 1.5, -0.5, -3.0, PADDING_LOGIT, PADDING_LOGIT],
        [0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3, PADDING_LOGIT, PADDING_LOGIT],
        [5.0, 1.0, 3.5, -2.0, 2.5, 0.0, 1.5, PADDING_LOGIT, PADDING_LOGIT],
    ],
    np.float32,
)
DRAWS = 50_000
WHICH = np.arange(DRAWS) % 3
KEYS = jax.jit(jax.vmap(lambda n: jax.random.fold_in(jax.random.key(7), n)))(jnp.arange(DRAWS))
# At XLA's usual effort each configuration's noise takes 1.5 s to compile, at this one 0.4 s.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 1}
draw_jit = jax.jit(draw, static_argnames="sampling", compiler_options=QUICK)
truncate_jit = jax.jit(truncate, static_argnames="sampling", compiler_options=QUICK)

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": dict(temperature=0.5),
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.2),
    "logit_bias": dict(logit_bias=((1, 2.0), (0, -1.5))),
}
# Top-k and top-p exclude something in the flat policy, min-p in the others.
COMBINED: dict[str, Any] = dict(
    temperature=1.5, top_k=5, top_p=0.85, min_p=0.2, logit_bias=((1, 1.5), (6, 2.0), (0, 1.0))
)


def drawn(step: int = 0, **options) -> tuple[np.ndarray, np.ndarray]:
    steps = jnp.full(DRAWS, step, jnp.int32)
    tokens, logprobs = draw_jit(jnp.asarray(LOGITS)[WHICH], KEYS, steps, sampling=SamplingConfig(**options))
    return np.asarray(tokens), np.asarray(logprobs)


def warped(logits: Any, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logit_bias=()) -> torch.Tensor:
    """The oracle: transformers' own processors in the order of its `generate`, in float64."""
    scores = torch.as_tensor(logits, dtype=torch.float64).clone()
    for token, nats in logit_bias:
        scores[:, token] += nats
    scores /= temperature
    processors: list[Any] = [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    for process in processors:
        scores = process(None, scores)
    return scores


def softmax(scores: torch.Tensor) -> np.ndarray:
    return torch.softmax(scores, -1).numpy()


def fit(tokens: np.ndarray, expected: np.ndarray) -> float:
    """The smallest p-value of the three policies' draws; 0 where a token that is impossible was drawn."""
    values = [1.0]
    for which, probabilities in enumerate(expected):
        counts = np.bincount(tokens[WHICH == which], minlength=len(probabilities))
        wanted = probabilities * counts.sum()
        if counts[wanted == 0].any():
            return 0.0
        # Chi-square wants five expected in each cell: the rarer tokens are pooled (and no cell may be empty).
        rare = wanted < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        values.append(stats.chisquare(observed, np.append(wanted[~rare], wanted[rare].sum() + 1e-9)).pvalue)
    return min(values)


# --- Frequencies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, *OPTIONS.values(), COMBINED], ids=["plain", *OPTIONS, "combined"])
def test_frequencies_are_those_of_transformers_and_without_any_one_option_they_would_not_be(options):
    tokens, logprobs = drawn(**options)
    assert fit(tokens, softmax(warped(LOGITS, **options))) > 1e-4
    for name in options:
        without = {key: value for key, value in options.items() if key != name}
        assert fit(tokens, softmax(warped(LOGITS, **without))) < 1e-12, name
    # And the log-probability stays that of the model as it is.
    exact = log_softmax(LOGITS.astype(np.float64), axis=-1)[WHICH, tokens]
    np.testing.assert_allclose(logprobs, exact, atol=1e-5)


def test_frequencies_are_those_of_no_other_order_of_the_options():
    bias = ((1, 2.5),)
    tokens, _ = drawn(temperature=2.0, top_k=5, top_p=0.85, logit_bias=bias)
    assert fit(tokens, softmax(warped(LOGITS, 2.0, 5, 0.85, logit_bias=bias))) > 1e-4
    others = {
        "temperature before bias": warped(warped(LOGITS, 2.0), 1.0, 5, 0.85, logit_bias=bias),
        "top-p before top-k": warped(warped(LOGITS, 2.0, top_p=0.85, logit_bias=bias), top_k=5),
        "both before temperature": warped(warped(LOGITS, 1.0, 5, 0.85, logit_bias=bias), 2.0),
    }
    for name, scores in others.items():
        assert fit(tokens, softmax(scores)) < 1e-12, name


def test_successive_steps_and_slots_are_drawn_independently():
    first, second = (drawn(step)[0][WHICH == 0] for step in (0, 1))
    for left, right in [(first, second), (first[:-1], first[1:])]:
        table = np.zeros((9, 9))
        np.add.at(table, (left, right), 1)
        common = table[:, table.sum(0) > 500][table.sum(1) > 500]
        assert common.shape[0] > 3
        result: Any = stats.chi2_contingency(common)
        assert result.pvalue > 1e-4


def test_each_slot_draws_by_its_own_step_whatever_the_others_are_at():
    slots, sampling = 64, SamplingConfig(top_p=0.9)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(slots, 200)), jnp.float32)
    steps = np.arange(slots) % 5
    mixed = np.asarray(draw_jit(logits, KEYS[:slots], jnp.asarray(steps), sampling=sampling)[0])
    together = np.stack(
        [draw_jit(logits, KEYS[:slots], jnp.full(slots, step), sampling=sampling)[0] for step in range(5)]
    )
    np.testing.assert_array_equal(mixed, together[steps, np.arange(slots)])
    assert all((a != b).mean() > 0.5 for a, b in itertools.combinations(together, 2))


# --- What is kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [300, 32_000])
@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=1), dict(top_k=40), dict(top_p=0.1), dict(top_p=0.9), dict(top_p=0.999), dict(min_p=0.02),
        dict(top_k=40, top_p=0.95, min_p=0.05),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_kept_is_what_transformers_keeps(vocab, options):
    scales = np.geomspace(0.1, 10, 8)[:, None]
    logits = (np.random.default_rng(vocab).normal(size=(8, vocab)) * scales).astype(np.float32)
    kept = np.isfinite(truncate_jit(jnp.asarray(logits), sampling=SamplingConfig(**options)))
    # Float32 sums differ from the oracle's by a few 1e-7: a token so close to a limit may be on either side.
    nearly = {
        sign: torch.isfinite(
            warped(
                logits,
                top_k=options.get("top_k", 0),
                top_p=options.get("top_p", 1.0) + sign * 1e-6 * ("top_p" in options),
                min_p=options.get("min_p", 0.0) * (1 - sign * 1e-6),
            )
        ).numpy()
        for sign in (-1, 1)
    }
    assert (nearly[-1] <= kept).all() and (kept <= nearly[1]).all()
    assert (nearly[-1] != nearly[1]).sum() <= 0.001 * kept.size
    assert kept.any(-1).all() and not kept.all()


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 12, 13, 16, 19, 20, 21, 22, 31])
def test_neighbouring_floats_are_told_apart(top_k):
    """Top-k over 32 numbers: one float32 next to another, of both signs, with the largest, the smallest and zero."""
    row: list[np.float32] = [np.float32(0), np.float32(3e38), np.float32(-3e38), np.float32(PADDING_LOGIT)]
    for start in (1.0, -1.0, 5e-30, -2e9):
        value = np.float32(start)
        for _ in range(7):
            row.append(value)
            value = np.nextafter(value, np.float32(np.inf))
    logits = np.random.default_rng(0).permutation(row)[None]
    kept = np.isfinite(truncate_jit(jnp.asarray(logits), sampling=SamplingConfig(top_k=top_k)))
    np.testing.assert_array_equal(np.sort(logits[kept]), np.sort(row)[-top_k:])


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(top_k=2), dict(top_p=0.3), dict(top_p=0.6), dict(min_p=1.0)], ids=str
)
def test_tokens_as_likely_as_the_last_one_kept_are_kept(options):
    logits = jnp.asarray([[0.0, 1.0, -1.0, 1.0, 0.0, 1.0, -0.0]])
    kept = np.isfinite(truncate_jit(logits, sampling=SamplingConfig(**options)))
    np.testing.assert_array_equal(kept, logits == 1.0)


def test_zeros_of_both_signs_are_a_tie():
    kept = np.isfinite(
        truncate_jit(jnp.asarray([[-0.0, 0.0, -1.0], [0.0, -0.0, -1.0]]), sampling=SamplingConfig(top_k=1))
    )
    np.testing.assert_array_equal(kept, [[True, True, False]] * 2)


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=8), dict(temperature=1e6, top_p=0.9999999), dict(min_p=1e-9),
        dict(logit_bias=tuple((token, -1e6) for token in range(7))),
        dict(temperature=0.0, logit_bias=tuple((token, -1e6) for token in range(7))),
        dict(temperature=1e6, top_k=8, top_p=0.9999999, min_p=1e-9, logit_bias=((7, 1e6), (1, -1e6))),
    ],
    ids=str,
)  # fmt: skip
def test_padding_rows_are_never_drawn(options):
    assert drawn(**options)[0].max() < 7


# --- Greedy, precision, log-probabilities -------------------------------------------------------------------------------


def test_the_noise_is_threefry_as_jax_has_it():
    keys, steps, vocab = KEYS[:3], jnp.asarray([0, 5, 9]), 11
    noise = np.asarray(jax.jit(gumbel, static_argnums=2)(keys, steps, vocab))
    for slot in range(3):
        key = jax.random.key_data(keys[slot])
        words = np.asarray([threefry_2x32(key, jnp.asarray([steps[slot], n], jnp.uint32)) for n in range(6)])
        uniform = ((words.T.reshape(-1)[:vocab] >> 9).astype(np.float64) + 0.5) / 2**23
        np.testing.assert_allclose(noise[slot], -np.log(-np.log(uniform)), rtol=2e-5, atol=2e-6)


def test_the_noise_is_gumbel_distributed():
    noise = np.asarray(gumbel(KEYS[:50], jnp.arange(50), 1001)).reshape(-1)
    assert np.isfinite(noise).all()
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-4


@pytest.mark.parametrize("truncation", [{}, dict(top_k=2, top_p=0.5, min_p=0.5)])
def test_zero_temperature_is_the_argmax_of_the_biased_logits(truncation):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 13)).astype(np.float32)
    for bias in ((), ((4, 1.5), (0, -9.0))):
        sampling = SamplingConfig(temperature=0.0, logit_bias=bias, **truncation)
        tokens, logprobs = draw_jit(jnp.asarray(logits), KEYS[:9], jnp.arange(9), sampling=sampling)
        biased = logits.copy()
        for token, nats in bias:
            biased[:, token] += nats
        np.testing.assert_array_equal(tokens, biased.argmax(-1))
        exact = log_softmax(logits.astype(np.float64), axis=-1)[np.arange(9), biased.argmax(-1)]
        np.testing.assert_allclose(logprobs, exact, atol=1e-5)


def test_half_precision_logits_are_normalised_in_single():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 500)), jnp.bfloat16)
    tokens, logprobs = draw_jit(logits, KEYS[:2], jnp.zeros(2, jnp.int32), sampling=SamplingConfig(top_p=0.9))
    exact = log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(2), np.asarray(tokens)]
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, exact, atol=1e-5)


def test_options_that_are_off_leave_no_trace_in_the_program():
    def program(**options) -> str:
        sampling = functools.partial(draw, sampling=SamplingConfig(**options))
        return str(jax.make_jaxpr(sampling)(jnp.zeros((2, 9)), KEYS[:2], jnp.zeros(2, jnp.int32)))

    traces = {"top_k": "scan[", "top_p": "scan[", "min_p": " ge ", "logit_bias": "scatter"}
    for name, trace in traces.items():
        assert trace in program(**OPTIONS[name]) and trace not in program(), name
    assert program(top_k=9) == program()  # all of the vocabulary


# --- Keys ---------------------------------------------------------------------------------------------------------------


def test_every_name_changes_the_key_and_their_order_counts():
    names = list(itertools.product(range(3), repeat=5))
    make = jax.jit(jax.vmap(lambda names: jax.random.key_data(turn_key(*names))))
    keys = np.asarray(make(jnp.asarray(names, jnp.int32)))
    assert len({tuple(key) for key in keys.tolist()}) == len(names)
    np.testing.assert_array_equal(keys, make(jnp.asarray(names, jnp.int32)))


# --- Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_turn_tokens", "max_turns", "context", "prefill_chunk"])
def test_limits_under_which_nothing_could_run_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        dataclasses.replace(SamplingConfig(), **{name: 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(slots=-1), "slots=-1 is negative; .* 0 for as many as fit"),
        (dict(temperature=-0.5), "temperature=-0.5 is negative"),
        (dict(temperature=1e-9), r"temperature=1e-09 is outside \[1e-06, 1e\+06\]; 0 is greedy"),
        (dict(temperature=float("inf")), "temperature=inf is outside"),
        (dict(temperature=float("nan")), "temperature=nan is outside"),
        (dict(top_k=-1), "top_k=-1 is negative; .* 0 for all"),
        (dict(top_p=0.0), r"top_p=0.0 is outside \(0, 1\]; 1 is off, and temperature=0 is greedy"),
        (dict(top_p=1.5), "top_p=1.5 is outside"),
        (dict(top_p=float("nan")), "top_p=nan is outside"),
        (dict(min_p=-0.1), r"min_p=-0.1 is outside \[0, 1\]; 0 is off"),
        (dict(min_p=float("nan")), "min_p=nan is outside"),
        (dict(logit_bias=((-1, 1.0),)), "token id -1 is negative"),
        (dict(logit_bias=((3, 1.0), (4, 1.0), (3, 2.0))), "token id 3 occurs 2 times; .*the sum"),
        (dict(logit_bias=((3, -float("inf")),)), "-inf for token id 3 is outside .*; -1e\\+06 already bans"),
        (dict(logit_bias=((3, float("nan")),)), "nan for token id 3 is outside"),
        (dict(stop=("a", "")), "stop holds an empty text"),
    ],
    ids=str,
)  # fmt: skip
def test_options_under_which_nothing_sensible_could_be_drawn_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


def test_a_bias_on_a_token_that_the_model_lacks_is_refused():
    sampling = SamplingConfig(logit_bias=((8, 1.0), (0, 1.0)))
    check_vocabulary(sampling, 9)
    with pytest.raises(ValueError, match="token id 8 is outside the vocabulary of 8 tokens; ids end at 7"):
        check_vocabulary(sampling, 8)


def test_every_option_is_part_of_the_value():
    """Programs are compiled per configuration: options that compared equal would run the wrong one."""
    options: list[dict[str, Any]] = [{}, *OPTIONS.values(), COMBINED, {"stop": ("\n",)}]
    configs = [SamplingConfig(**each) for each in options]
    assert len({*configs, SamplingConfig(**COMBINED)}) == len(configs)


@pytest.mark.parametrize("vocab", [7, 8, 1001])
def test_a_split_vocabulary_draws_from_the_same_noise_bit_for_bit(vocab):
    steps = jnp.arange(50)
    whole, split = (np.asarray(gumbel(KEYS[:50], steps, vocab, split=each)) for each in (False, True))
    np.testing.assert_array_equal(whole, split)
