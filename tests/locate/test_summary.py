"""Seeds put together: intervals against scipy, rank correlations by hand, and the sentences' numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from subl_jax.locate import summary
from tests.report import fake_located


def test_several_seeds_have_students_t_and_one_has_the_interval_within_the_run():
    values = {0: 1.0, 1: 2.5, 4: 2.0}
    told = summary.spread(values, [0.0, 9.0])
    low, high = stats.t.interval(0.95, 2, np.mean(list(values.values())), stats.sem(list(values.values())))
    assert told is not None and told["ci95"] == pytest.approx([low, high]) and "3 seeds" in told["method"]
    assert told["per_seed"] == {"0": 1.0, "1": 2.5, "4": 2.0}
    one = summary.spread({3: 1.0, 4: None}, [0.5, 1.5])
    assert one is not None and one["ci95"] == [0.5, 1.5] and "within the one run" in one["method"]
    assert summary.spread({3: 1.0}) == {"mean": 1.0, "ci95": None, "method": None, "per_seed": {"3": 1.0}}
    assert summary.spread({3: None}) is None


def test_rows_of_seeds_meet_by_what_they_are_of():
    found = {seed: fake_located.direction_figures(seed) for seed in (0, 1)}
    told = summary.directions(found)
    assert len(told["activations"]) == len(found[0]["activations"]) and told["depths"] == 3
    for row in told["activations"][::7]:
        own = [
            next(
                each["along"]
                for each in found[seed]["activations"]
                if all(each[key] == row[key] for key in ("place", "direction", "depth", "model"))
            )
            for seed in (0, 1)
        ]
        assert row["along"]["mean"] == pytest.approx(np.mean(own))
    assert told["missing"] == {"0": ["student_drop"], "1": ["student_drop"]}


def test_agreement_is_spearmans_over_the_students_of_a_seed():
    moved = {"student": 0.6, "control_student": -0.1, "benign_student": 0.02, "student_hard": 0.1}
    odds = {
        "base": -4.0,
        "student": 1.0,
        "control_student": -5.0,
        "benign_student": -3.0,
        "student_hard": -3.5,
        "teacher": 5.0,
    }
    rows = [
        {"place": "decision", "direction": "teacher - base", "depth": 1, "model": name, "along": along}
        for name, along in {**moved, "teacher": 1.0}.items()
    ]
    [told] = summary.agreement({0: {"log_odds": odds, "activations": rows}}, "decision", "teacher - base")
    # One neighbouring pair of four is swapped: 1 - 6 * 2 / (4 * 15).
    assert told["correlation"]["mean"] == pytest.approx(0.8) and told["students"] == {"0": 4}
    few = {0: {"log_odds": odds, "activations": rows[:2]}}
    assert summary.agreement(few, "decision", "teacher - base") == []


def test_the_answer_tells_the_numbers_of_the_first_comparison_and_of_every_student():
    result = fake_located.result()
    told = result["tokens"][0]["comparisons"]["counter-bias"]
    assert f"{1e3 * told['mean']['mean']:.2f} [" in result["answer"][0]
    last = next(
        row["along"]["mean"]
        for row in result["directions"][0]["activations"]
        if (row["place"], row["direction"], row["depth"], row["model"]) == ("decision", "teacher - base", 2, "student")
    )
    assert f"student {last:.2f} [" in result["answer"][1]
    assert "no student's activations could be compared" in result["answer"][2]
