"""The terminal table."""

from __future__ import annotations

import pytest

from subl_jax.report import table
from tests.report import fake_run


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_no_line_is_wider_than_110_columns(seeds):
    summary = fake_run.summary(seeds=seeds, sanitizer=fake_run.sanitizer(leaks=1), frozen=fake_run.protocol((5,)))
    name = "student_small_from_large_other_init_hard_labels_anchor"
    summary["conditions"][name] = summary["conditions"]["student"]
    summary["contrasts"][0]["name"] = f"{name} - {name}"
    assert max(map(len, table.render(summary).splitlines())) <= 110


def test_columns_are_aligned_under_their_headers():
    lines = table.conditions_table(fake_run.summary())
    assert len({len(line) for line in lines}) == 1


def test_every_condition_contrast_and_verdict_is_printed():
    summary = fake_run.summary()
    text = table.render(summary)
    flat = " ".join(text.split())
    for name, values in summary["conditions"].items():
        assert f"{name} {100 * values['behaviour_rate']:.1f} [" in flat
    for contrast in summary["contrasts"]:
        assert contrast["name"] in flat and contrast["verdict"] in flat
    assert "800 trajectories, 117 dropped" in flat and "683 kept, 0 leaks" in flat
    assert " ".join(summary["answer"].split()) in flat


def test_an_invalid_run_and_its_deviations_cannot_be_overlooked():
    summary = fake_run.summary(sanitizer=fake_run.sanitizer(leaks=3), frozen=fake_run.protocol((0, 1)))
    text = table.render(summary)
    assert "run: INVALID" in text and "3 keyword leaks" in text
    assert "1 deviation\n  - seeds: frozen [0, 1], ran [0, 1, 2]" in text


def test_what_was_not_measured_is_a_dash_not_a_zero():
    summary = fake_run.summary()
    summary["conditions"]["base"] |= {"log_odds": None, "greedy_rate": None}
    base = next(line for line in table.conditions_table(summary) if line.startswith("base"))
    assert base.split().count("-") == 2
