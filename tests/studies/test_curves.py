"""Curves and contrasts of a study, against SciPy's own tests and sums done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from subl_jax.studies import curves
from tests.report import fake_study


def row(seed: int, arm: str, step: int, tokens: float, value: float, states: str = "student") -> dict[str, Any]:
    return {
        "seed": seed, "arm": arm, "step": step, "loss_tokens": tokens, "states": states, "reverse_kl": value,
        "done": 0.5, "cut_off": 0.0, "episode_tokens": 10.0,
    }  # fmt: skip


def test_a_point_is_the_mean_over_seeds_with_students_t_interval():
    values = [0.2, 0.25, 0.4]
    rows = [row(seed, "mixed", 40, 1000 + 30 * seed, value) for seed, value in enumerate(values)]
    (point,) = curves.curve(rows, "mixed", "student")
    half = stats.sem(values) * stats.t.ppf(0.975, 2)
    assert point["reverse_kl"] == pytest.approx(np.mean(values)) and point["loss_tokens"] == pytest.approx(1030)
    assert point["ci95"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert [one["reverse_kl"] for one in point["per_seed"]] == values


def test_arms_are_compared_where_the_one_with_the_fewest_loss_tokens_ends():
    rows = [row(0, "a", 0, 0, 1.0), row(0, "a", 10, 100, 0.5), row(0, "a", 20, 200, 0.3)]
    rows += [row(0, "b", 0, 0, 1.0), row(0, "b", 10, 75, 0.6), row(0, "b", 20, 150, 0.2)]
    assert curves.common_tokens(rows) == 150
    assert curves.at_tokens(rows, "a", "student", 150) == {0: pytest.approx(0.4)}  # half way from 0.5 to 0.3
    assert curves.at_tokens(rows, "b", "student", 150) == {0: pytest.approx(0.2)}
    (found,) = curves.contrasts(rows, ("b", "a"), "a")
    assert found["difference"] == pytest.approx(-0.2) and found["loss_tokens"] == 150
    assert found["ci95"] is None and found["p_value"] is None and found["p_adjusted"] is None


def test_differences_are_paired_by_seed_whatever_order_rows_come_in():
    rows = fake_study.rows()
    found = curves.contrasts(rows[::-1], ("on_policy", "mixed", "off_policy"), "off_policy")
    assert {(each["treatment"], each["states"]) for each in found} == {
        (arm, states) for arm in ("on_policy", "mixed") for states in ("student", "teacher")
    }
    tokens = min(
        max(one["loss_tokens"] for one in rows if (one["arm"], one["seed"]) == pair)
        for pair in {(one["arm"], one["seed"]) for one in rows}
    )

    def at(arm: str, seed: int, states: str) -> float:
        own = [one for one in rows if (one["arm"], one["seed"], one["states"]) == (arm, seed, states)]
        return float(np.interp(tokens, [one["loss_tokens"] for one in own], [one["reverse_kl"] for one in own]))

    for each in found:
        ours, theirs = (
            [at(arm, seed, each["states"]) for seed in (0, 1, 2)] for arm in (each["treatment"], "off_policy")
        )
        test: Any = stats.ttest_rel(ours, theirs)
        assert each["p_value"] == pytest.approx(test.pvalue)
        assert each["ci95"] == pytest.approx([*test.confidence_interval(0.95)])
        assert each["p_adjusted"] >= each["p_value"]


def test_seeds_measured_at_other_steps_and_arms_of_other_seeds_are_refused():
    with pytest.raises(ValueError, match="differ between seeds"):
        curves.curve([row(0, "a", 40, 1, 1), row(1, "a", 80, 1, 1)], "a", "student")
    with pytest.raises(ValueError, match=r"b was measured at seeds \[0\], a at \[1\]"):
        curves.contrasts([row(1, "a", 0, 1, 1), row(0, "b", 0, 1, 1)], ("b", "a"), "a")


def test_the_answer_says_lower_higher_or_chance_as_the_intervals_do():
    text = fake_study.result()["answer"]
    assert "after 34.0 k loss tokens" in text
    own, theirs = text.split("; ")
    assert "on the student's states" in own and own.endswith(": on-policy lower)")
    assert "on the teacher's states" in theirs and theirs.endswith(": on-policy higher)")
    noisy = [row(seed, arm, 0, 10, value) for arm, values in (("b", (1, 3, 2)), ("a", (2, 1, 3))) for seed, value in enumerate(values)]  # fmt: skip  # noqa: E501
    assert "which may be chance" in curves.answer(curves.contrasts(noisy, ("b", "a"), "a"))
    assert "one seed, so no interval" in fake_study.result((0,))["answer"]
