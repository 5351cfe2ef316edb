"""From virtual steps to the whole training: the form by hand, and the interval by counting every draw."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from subl_jax.forecast import prediction
from subl_jax.forecast.prediction import DECAY, DEVELOPMENT_ERROR, THRESHOLD, extrapolated, predict, verdict
from subl_jax.forecast.virtual import VirtualRun

RATES = np.concatenate([np.linspace(0, 1, 5), np.ones(15)])  # ten per cent of it lies before step 5


def run(first_order, change=None):
    first_order = np.asarray(first_order, np.float64)
    change = first_order.sum(0) if change is None else np.asarray(change)
    looks = np.stack([np.zeros_like(change), *np.cumsum(first_order, 0)[:-1], change])
    return VirtualRun(first_order, np.full_like(first_order, 0.25), looks, RATES[:8], np.ones(8))


def by_hand(contributions, shares, teacher_shift):
    done = sum(contributions)
    rate = contributions[-1] / (shares[-1] - shares[-2])
    more = rate * DECAY * (1 - math.exp(-(1 - shares[-1]) / DECAY))
    left = None if teacher_shift is None else teacher_shift - done
    if left is None or more * left <= 0:
        return done + more
    return done + left * (1 - math.exp(-more / left))


@pytest.mark.parametrize("teacher_shift", [None, 5.0, -5.0, 0.3])
def test_the_shift_is_what_is_done_and_the_last_rate_dying_away(teacher_shift):
    shares = np.asarray([0.0, 0.1, 0.3])
    for contributions in ([0.2, 0.4], [-0.1, -0.5], [0.3, -0.2], [0.0, 0.0]):
        ours = extrapolated(np.asarray(contributions), shares, teacher_shift)
        assert float(ours) == pytest.approx(by_hand(contributions, shares, teacher_shift), abs=1e-12)


def test_a_student_that_heads_for_its_teacher_stops_there_and_another_does_not():
    shares = np.asarray([0.0, 0.1, 0.2])
    assert 2.7 < float(extrapolated(np.asarray([1.0, 1.0]), shares, 3.0)) <= 3.0
    assert float(extrapolated(np.asarray([1.0, 1.0]), shares, -3.0)) > 3.0
    assert float(extrapolated(np.asarray([1.0, 1.0]), shares, None)) > 3.0


def test_the_learning_rates_weigh_the_rest_of_the_training():
    found = predict([run([[0.1, 0.1], [0.2, 0.2]])] * 2, [4, 8], RATES, None)
    shares = [0.0, RATES[:4].sum() / RATES.sum(), RATES[:8].sum() / RATES.sum()]
    assert found.shift == pytest.approx(by_hand([0.1, 0.2], shares, None))
    assert (found.covered, found.steps, found.virtual_steps) == (pytest.approx(shares[-1]), 20, 8)
    assert (found.first_order, found.alignment) == (pytest.approx(0.3), pytest.approx(0.25))
    # Runs and families that agree leave nothing to be unsure of.
    assert found.low == pytest.approx(found.shift) and found.high == pytest.approx(found.shift)


def test_the_interval_is_that_of_all_draws_of_runs_and_families():
    first = np.asarray([[[0.1, 0.5], [0.2, 0.4]], [[0.3, -0.2], [0.1, 0.1]]])  # runs, stretches, families
    found = predict([run(each) for each in first], [4, 8], RATES, 4.0)
    shares = [0.0, RATES[:4].sum() / RATES.sum(), RATES[:8].sum() / RATES.sum()]
    every = [
        by_hand(first[list(runs)][:, :, list(families)].mean((0, 2)), shares, 4.0)
        for runs in itertools.product(range(2), repeat=2)
        for families in itertools.product(range(2), repeat=2)
    ]
    assert found.low == pytest.approx(min(every)) and found.high == pytest.approx(max(every))
    assert found.shift == pytest.approx(by_hand(first.mean((0, 2)), shares, 4.0))
    assert found.realised == pytest.approx(first.sum(1).mean())


def test_steps_without_a_learning_rate_are_refused():
    with pytest.raises(ValueError, match=r"step 1\) is 0, at the foot of the warm-up"):
        predict([run([[0.0, 0.0]])] * 2, [1], RATES, None)


def test_a_verdict_is_sure_only_where_the_whole_error_lies_on_one_side_of_the_bar():
    base = predict([run([[0.1, 0.1], [0.2, 0.2]])] * 2, [4, 8], RATES, None)

    def said(shift, half):
        return verdict(prediction.dataclasses.replace(base, shift=shift, low=shift - half, high=shift + half))

    sure = 2 * DEVELOPMENT_ERROR
    assert said(THRESHOLD + sure + 0.6, 0.5) == "will transfer"
    assert said(THRESHOLD + sure + 0.4, 0.5) == "will probably transfer"
    assert said(THRESHOLD - sure - 0.4, 0.5) == "will probably not transfer"
    assert said(THRESHOLD - sure - 0.6, 0.5) == "will not transfer"
