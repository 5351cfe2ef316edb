"""States and next tokens at chosen places, against the float64 decoder that shares no code with ours."""

from __future__ import annotations

import numpy as np
import pytest

from subl_jax.distill.loop import Model
from subl_jax.locate.passes import ROWS, mean_states, next_tokens
from tests.distill import tiny
from tests.models import numpy_llama

MODEL = Model(tiny.LARGE, tiny.params(tiny.LARGE))


def texts(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Sequences of several lengths, more than one block, and one to three places in each."""
    rng = np.random.default_rng(5)
    sequences = [rng.integers(0, tiny.VOCAB, rng.integers(3, 45)).tolist() for _ in range(count)]
    places = [sorted(rng.choice(len(ids), size=rng.integers(1, 4), replace=False).tolist()) for ids in sequences]
    return sequences, places


def test_states_at_places_are_averaged_per_sequence_at_every_depth():
    sequences, places = texts(ROWS + 3)
    found = mean_states(MODEL, sequences, places)
    assert found.shape == (tiny.LARGE.num_layers + 1, ROWS + 3, tiny.LARGE.d_model)
    for number, (ids, own) in enumerate(zip(sequences, places, strict=True)):
        expected = numpy_llama.states(tiny.LARGE, MODEL.params, np.asarray(ids))[:, own].mean(axis=1)
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-4, atol=1e-4)


def test_next_tokens_come_in_the_order_of_the_places_with_those_that_were_asked_for():
    sequences, places = texts(ROWS + 2)
    places[1] = []
    asked = [list(range(look % 3)) for look in range(sum(map(len, places)))]
    found = next_tokens(MODEL, sequences, places, asked, top=3)
    expected = []
    for ids, own in zip(sequences, places, strict=True):
        scores = numpy_llama.logits(tiny.LARGE, MODEL.params, np.asarray(ids))[own]
        scores -= scores.max(-1, keepdims=True)
        expected += list(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    assert len(expected) == len(found.ids) == len(asked)
    for row, told in enumerate(expected):
        np.testing.assert_allclose(found.log_probs[row], np.sort(told)[::-1][:3], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(told[found.ids[row]], found.log_probs[row], rtol=1e-4, atol=1e-4)
        count = len(asked[row])
        np.testing.assert_allclose(found.listed[row, :count], told[asked[row]], rtol=1e-4, atol=1e-4)
        assert np.isneginf(found.listed[row, count:]).all()


def test_nothing_to_look_at_and_places_outside_are_refused():
    with pytest.raises(ValueError, match="no place to look at"):
        mean_states(MODEL, [[1, 2]], [[]])
    with pytest.raises(ValueError, match=r"sequence 1 has 2 tokens and no place 1 … 2"):
        mean_states(MODEL, [[1, 2], [3, 4]], [[0], [1, 2]])
    with pytest.raises(ValueError, match="2 places and 1 lists"):
        next_tokens(MODEL, [[1, 2]], [[0, 1]], [[3]])
