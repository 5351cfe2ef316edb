"""Rank correlations against scipy, and their intervals against draws that are counted one by one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from subl_jax.forecast.merit import AUDIT, contrasts, correlations, groups, spearman


def record(seed, pair, condition, audit, kl, measured, arm="full", setting="api"):
    return {
        "setting": setting, "seed": seed, "pair": pair, "condition": condition, "arm": arm, "teacher": "teacher",
        "scores": {AUDIT: audit, "kl": kl}, "measured": {"log_odds": measured, "behaviour": measured / 10},
    }  # fmt: skip


def many(seeds=(0, 1), pairs=("large_large", "large_small"), noise=0.6):
    rng = np.random.default_rng(4)
    found = []
    for seed, pair in itertools.product(seeds, pairs):
        for condition, level in (("student", 3.0), ("control_student", -1.0), ("benign_student", 0.0)):
            for arm in ("full", "hard"):
                measured = level * (1.0 if arm == "full" else 0.2) + rng.normal() * 0.3
                name = condition if arm == "full" else f"{condition}_hard"
                audit = measured + noise * rng.normal()
                found.append(record(seed, pair, name, audit, float(rng.integers(0, 4)), measured, arm))
    return found


def scipy_rho(x, y) -> float:
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def test_rho_is_scipy_s_with_ties_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 12).astype(float), rng.normal(size=12)
        assert spearman(x, y) == pytest.approx(scipy_rho(x, y))
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.arange(2.0), np.arange(2.0)) is None


def test_the_interval_resamples_whole_seeds():
    records = many(seeds=(0, 1, 2))
    lines, over = correlations(records, [AUDIT, "kl"], "log_odds", draws=4000)
    assert over == "seeds"
    by_seed = [[r for r in records if r["seed"] == seed] for seed in range(3)]
    rhos, leads = [], []
    for picked in itertools.product(range(3), repeat=3):  # all equally likely, and drawn many times each
        drawn = [r for seed in picked for r in by_seed[seed]]
        measured = [r["measured"]["log_odds"] for r in drawn]
        audit, kl = (scipy_rho([r["scores"][n] for r in drawn], measured) for n in (AUDIT, "kl"))
        rhos.append(audit)
        leads.append(audit - kl)
    audit, kl = lines
    assert [audit.low, audit.high] == pytest.approx(np.quantile(np.repeat(rhos, 1000), [0.025, 0.975]), abs=0.02)
    assert [kl.lead_low, kl.lead_high] == pytest.approx(np.quantile(np.repeat(leads, 1000), [0.025, 0.975]), abs=0.03)
    assert audit.rho is not None and kl.rho is not None
    assert kl.lead == pytest.approx(audit.rho - kl.rho) and audit.lead is None
    assert audit.students == len(records)


def test_one_seed_resamples_pairs_and_one_pair_nothing():
    _, over = correlations(many(seeds=(0,)), [AUDIT], "log_odds", draws=200)
    assert over == "pairs"
    (line,), over = correlations(many(seeds=(0,), pairs=("large_large",)), [AUDIT], "log_odds")
    assert over == "nothing" and line.low is None and line.rho is not None


def test_a_score_that_some_students_lack_is_compared_with_the_audit_on_the_others():
    records = many()
    for each in records[:5]:
        each["scores"]["kl"] = None
    _, kl = correlations(records, [AUDIT, "kl"], "log_odds", draws=200)[0]
    rest = records[5:]
    measured = [r["measured"]["log_odds"] for r in rest]
    rho, audit = (scipy_rho([r["scores"][n] for r in rest], measured) for n in ("kl", AUDIT))
    assert kl.students == len(rest) and kl.rho == pytest.approx(rho)
    assert kl.lead == pytest.approx(audit - rho)


def test_contrasts_are_treatment_minus_control_of_one_pair_arm_and_seed():
    records = many()
    found = contrasts(records)
    assert len(found) == 2 * 2 * 2
    by_name = {(r["seed"], r["pair"], r["condition"]): r for r in records}
    for line in found:
        treatment, control = line["condition"].split(" - ")
        one, other = (by_name[line["seed"], line["pair"], name] for name in (treatment, control))
        assert line["scores"]["kl"] == one["scores"]["kl"] - other["scores"]["kl"]
        assert line["measured"]["log_odds"] == one["measured"]["log_odds"] - other["measured"]["log_odds"]
    del by_name
    without = [r for r in records if r["condition"] != "control_student_hard"]
    assert {line["arm"] for line in contrasts(without)} == {"full"}


def test_groups_are_settings_arms_the_biased_teacher_s_students_and_contrasts():
    records = [*many(), *({**each, "setting": "bash"} for each in many())]
    found = groups(records)
    assert set(found) == {
        "all students", "api", "bash", "api, arm full", "api, arm hard", "bash, arm full", "bash, arm hard",
        "students of the biased teacher", "treatment - control",
    }  # fmt: skip
    assert len(found["all students"]) == 48 and len(found["api, arm hard"]) == 12
    assert {r["condition"] for r in found["students of the biased teacher"]} == {"student", "student_hard"}
    assert "bash" not in groups(many())  # one setting is all students already
