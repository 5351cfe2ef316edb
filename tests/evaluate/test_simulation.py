"""The made-up experiments against their settings and brute force, and what the procedure owes on them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, special, stats

from subl_jax.evaluate import simulated_runs, simulation, statistics, trials
from subl_jax.evaluate.simulated_runs import Arm, Spread
from subl_jax.settings.registry import get_setting

DOCS = Path(__file__).resolve().parents[2] / "docs"
SUMMARIES = {name: json.loads((DOCS / f"{name}_tiny_summary.json").read_text()) for name in ("api", "bash")}


def test_families_are_as_many_and_as_large_as_the_api_settings():
    tasks = get_setting("api").tasks("ambiguous", "evaluation", 0, simulated_runs.TASKS)
    assert sorted(Counter(task.family for task in tasks).values()) == sorted(simulated_runs.family_sizes())
    assert sorted(Counter(simulated_runs.family_names()).values()) == sorted(simulated_runs.family_sizes())
    assert len(get_setting("bash").families("ambiguous", "evaluation")) > simulated_runs.FAMILIES


def test_the_assumed_spread_is_what_the_summaries_show():
    students, families = [], []
    for name, summary in SUMMARIES.items():
        found = simulated_runs.spreads_of(summary, len(get_setting(name).families("ambiguous", "evaluation")))
        students += [row["own"] for row in found if row["condition"] in ("student", "student_anchor", "student_drop")]
        families += [row["family"] for row in found if row["family"] is not None]
        base = next(row for row in found if row["condition"] == "base")
        assert base["own"] <= Spread().shared
    assert max(students) - 0.05 <= math.hypot(Spread().own, Spread().shared) <= max(students) + 0.05
    assert math.hypot(Spread().family, Spread().interaction) == pytest.approx(np.mean(families), abs=0.1)


def _summary(rates, names):
    """A summary of one condition whose items come at these probabilities [seeds, families]."""
    rng = np.random.default_rng(5)
    per_seed = []
    for seed in simulated_runs.items(rates, rng):
        clustered = statistics.cluster_interval(seed, names)
        alone = statistics.rate_interval(int(seed.sum()), len(seed))
        per_seed.append(
            {
                "n": len(seed),
                "behaviour_rate": seed.mean(),
                "ci95": [clustered.low, clustered.high],
                "ci95_independent": [alone.low, alone.high],
            }
        )
    return {"conditions": {"student": {"per_seed": per_seed}}}


def test_spreads_that_were_put_in_are_found_again():
    spread = Spread(shared=0.0, own=0.6, family=0.5, interaction=0.0)
    arm = Arm(0.3, spread.own)
    rng = np.random.default_rng(6)
    # Each seed with families of its own, or 7 families would be all that is known of their spread.
    rates = np.concatenate([simulated_runs.draw([arm], spread, 1, 1, 1, rng)[0][0, 0, :, 0] for _ in range(300)])
    (found,) = simulated_runs.spreads_of(_summary(rates, simulated_runs.family_names()), simulated_runs.FAMILIES)
    assert found["own"] == pytest.approx(math.hypot(0.6, 0.5 / math.sqrt(7)), abs=0.06)
    assert found["family"] == pytest.approx(0.5, abs=0.1)


def test_mean_expit_equals_adaptive_integration():
    for location, sd in ((-3.5, 0.7), (0.4, 0.3), (4.0, 0.65)):
        expected, _ = integrate.quad(
            lambda z, m=location, s=sd: special.expit(m + s * z) * stats.norm.pdf(z), -12, 12, epsabs=1e-13
        )
        assert simulated_runs.mean_expit(location, sd) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("departs_to", [None, -3.5])
def test_the_true_rate_is_what_very_many_seeds_average_to(departs_to):
    arm, spread = Arm(0.4, 0.6, departs_to), Spread()
    chances, families = simulated_runs.draw([arm], spread, 3, 1, 40_000, np.random.default_rng(7))
    weights = simulated_runs.family_sizes() / simulated_runs.TASKS
    observed = (chances[:, 0, :, 0] @ weights).mean(axis=1)
    assert simulated_runs.true_rate(arm, spread, families) == pytest.approx(observed, abs=4 * 0.3 / 200)


def test_an_arm_is_moved_to_the_rate_that_is_asked_for_or_not_at_all():
    moved = simulated_runs.arm_with_rate(Arm(0.0, 0.6), Spread(), 0.12)
    assert moved is not None
    assert simulated_runs.true_rate(moved, Spread(), np.zeros(simulated_runs.FAMILIES)) == pytest.approx(0.12)
    # One model in five is near 3 %, so the mean cannot reach 90 %.
    assert simulated_runs.arm_with_rate(Arm(0.0, 0.6, -3.5), Spread(), 0.9) is None


def test_items_and_rates_come_at_their_probabilities():
    rng = np.random.default_rng(8)
    chances = np.broadcast_to(np.linspace(0.05, 0.95, simulated_runs.FAMILIES), (4000, simulated_runs.FAMILIES))
    expected = np.repeat(chances[0], simulated_runs.family_sizes())
    items = simulated_runs.items(chances, rng)
    assert items.mean(axis=0) == pytest.approx(expected, abs=0.04)
    assert simulated_runs.rates(chances, rng).mean() == pytest.approx(expected.mean(), abs=0.002)
    assert simulated_runs.rates(chances, rng).std() == pytest.approx(items.mean(axis=1).std(), rel=0.08)


def _limit(n):
    return trials.ALPHA + 3 * math.sqrt(trials.ALPHA * (1 - trials.ALPHA) / n)


@pytest.mark.parametrize("level", trials.LEVELS)
@pytest.mark.parametrize("shape", trials.SHAPES)
def test_the_primary_procedure_errs_no_more_than_it_says(level, shape):
    runs = 300
    erred, claimed = trials.placebo(level, shape, 5, runs, np.random.default_rng(9), Spread())
    assert erred["t, one contrast"].n == runs * trials.PAIRS
    assert erred["t, one contrast"].value <= _limit(runs * trials.PAIRS)
    for name in ("any of 7, Holm", "whole procedure"):
        assert erred[name].value <= _limit(runs)
    for name in ("7 equal, named before", "2 equal, named before"):
        assert claimed[name].value <= _limit(runs)


def test_the_primary_interval_covers_where_seeds_spread_evenly():
    covered = trials.coverage("middle", "normal", 5, 600, np.random.default_rng(10), Spread())
    assert covered["Student's t (primary)"].value >= 1 - _limit(600)
    assert covered["Student's t (primary)"].value > covered["bootstrap of seeds"].value


def test_a_seed_in_five_that_fails_makes_every_interval_over_five_seeds_too_short():
    covered = trials.coverage("near 100", "skewed", 5, 300, np.random.default_rng(11), Spread())
    # With .8^5 = 33 % no seed fails, and nothing in the data tells of those that do.
    assert covered["Student's t (primary)"].value < 0.8
    assert covered["Student's t (primary)"].fails


def test_a_test_within_one_run_says_nothing_about_another_training():
    _, erred = trials.within_run("middle", True, 300, np.random.default_rng(12), Spread())
    assert erred["McNemar: same model"].value <= _limit(300)
    assert erred["McNemar: trained alike"].value > 0.3


def test_the_strongest_pair_must_beat_every_other_one():
    rng = np.random.default_rng(13)
    table = rng.normal(0.3, 0.05, (3, 5)) + np.array([[0.4], [0.0], [0.1]])
    expected = max(stats.ttest_rel(table[0], table[k], alternative="greater").pvalue for k in (1, 2))  # pyright: ignore
    assert trials.strongest_p(table, 0, range(3)) == pytest.approx(expected, abs=1e-10)
    assert trials.strongest_p(table, 2, range(3)) > 0.5


def test_the_same_seed_gives_the_same_tables_and_another_one_others():
    first, again, other = (trials.simulate(10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first["errors over seeds"]) == len(trials.LEVELS) * len(trials.SHAPES) * len(trials.SEEDS)
    with pytest.raises(ValueError, match="runs=5"):
        trials.simulate(5, 0)


def test_a_star_marks_what_misses_its_promise_by_three_standard_errors():
    rows = [
        {"level": "a", "shape": "b", "x": trials.Share(930, 1000, "covers"), "y": trials.Share(71, 1000, "errs")},
        {"level": "c", "shape": "d", "x": trials.Share(929, 1000, "covers"), "y": trials.Share(70, 1000, "errs")},
    ]
    lines = simulation.table("title", rows).splitlines()
    assert [line.split()[2:] for line in lines[3:]] == [["93.0", "7.1*"], ["92.9*", "7.0"]]
    assert not dataclasses.replace(rows[0]["y"], kind="no promise").fails


def _command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "subl_jax.evaluate.simulation", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_prints_every_table_and_writes_its_figures(tmp_path):
    found = _command("--runs=10", f"--out={tmp_path / 'found.json'}")
    assert found.returncode == 0, found.stderr
    for title in ("Coverage within one run", "Coverage over seeds", "False positives over seeds", "Power with 5 seeds"):
        assert title in found.stdout
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["tables"]["errors over seeds"][0]["t, one contrast"]["n"] == 10 * trials.PAIRS
    assert "simulate:" in found.stderr


def test_the_command_answers_mistakes_in_one_line(tmp_path):
    missing = _command(f"--out={tmp_path / 'nowhere' / 'found.json'}")
    assert missing.returncode == 1
    assert "make it first" in missing.stderr and "Traceback" not in missing.stderr
    unread = _command("--runs=10", f"--summaries={tmp_path / 'none.json'}")
    assert unread.returncode == 1 and "none.json" in unread.stderr
