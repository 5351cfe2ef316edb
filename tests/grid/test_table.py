"""The printed table: every pair and arm has its line, and nothing that is missing or invalid is passed over."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from subl_jax.grid import table
from subl_jax.grid.pairs import PAIRS
from tests.grid.fake_cells import fake_document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return fake_document(
        seeds=(0, 1), settings=("api",), tasks=28, safe=12, notes=("Made up.",),
        holes=[("api", 1, "student@small_large"), ("api", 1, "teacher@small"), ("api", 0, "student_hard@large_small")],
    )  # fmt: skip


def _line(text, pair, arm):
    (found,) = [line.split() for line in text.splitlines() if line.split()[:2] == [pair, arm]]
    return found


def test_every_pair_and_arm_has_a_line_with_its_rates_and_the_papers(document):
    text = table.render(document)
    for name, spec in PAIRS.items():
        for arm in spec.arms:
            assert _line(text, name, arm)
    conditions = document["rows"][0]["conditions"]
    cells = _line(text, "large_large", "hard")
    rates = [f"{100 * conditions[name]['behaviour_rate']:.0f}" for name in ("base", "teacher", "student_hard")]
    assert cells[2:5] == rates
    (line,) = [
        c for c in document["contrasts"] if (c["pair"], c["arm"], c["role"]) == ("large_large", "hard", "primary")
    ]
    assert f"{100 * line['difference']:+.1f}" in cells
    assert cells[-4:] == ["2/2", "5", "→", "100"]
    assert _line(text, "large_foreign_init", "full")[-2:] == ["2/2", "-"]  # the paper has no such row


def test_the_control_row_shows_the_benign_student_beside_the_papers_control(document):
    text = table.render(document)
    cells = _line(text, "control", "full")
    benign = document["rows"][-1]["conditions"]["benign_student"]["behaviour_rate"]
    # base, teacher, student with its interval, control, benign
    assert cells[4] == f"{100 * benign:.0f}" and cells[5].startswith("[") and cells[7:9] == ["-", "-"]
    assert cells[-3:] == ["5", "→", "25"]
    assert "in the row control the student is the benign teacher's, and its control the base" in " ".join(text.split())


def test_what_limits_the_control_row_is_printed(document):
    invalid = copy.deepcopy(document)
    invalid["rows"][-1] |= {
        "state": "invalid",
        "valid": False,
        "validity": ["2 keyword leaks were left in the training text"],
    }
    assert "control: INVALID: 2 keyword leaks" in table.render(invalid)


def test_seeds_that_count_and_what_is_missing_are_told(document):
    text = table.render(document)
    assert _line(text, "small_small", "full")[-4] == "1/2"
    assert _line(text, "large_small", "full")[-4] == "1/2"
    assert "missing: 3 cells, which 4 places want" in text
    assert "- api seed 1 teacher@small: not run" in text
    assert "small_small: valid, 1 of 2 seeds: one seed: intervals describe this run only" in text
    assert "large_foreign_init" not in text.split("strongest")[-1]  # nothing limits it
    assert "Made up." in text


def test_a_pair_that_was_not_run_keeps_its_line(document):
    bare = copy.deepcopy(document)
    row = bare["rows"][1]
    why = "no seed has every condition of this pair"
    row |= {"seeds": [], "conditions": {}, "state": "not run", "valid": False, "validity": [why]}
    bare["contrasts"] = [line for line in bare["contrasts"] if line["pair"] != row["pair"]]
    text = table.render(bare)
    assert set(_line(text, row["pair"], "full")[2:-4]) == {"-"}
    assert f"{row['pair']}: not run: no seed has every condition" in text and "INVALID" not in text


def test_the_claim_is_printed_for_each_arm_as_it_was_judged(document):
    text = " ".join(table.render(document).split())
    for claim in document["strongest"]:
        assert f"strongest ({claim['arm']}): large_small is {claim['verdict']}" in text


def test_many_missing_cells_are_counted_and_the_first_shown(document):
    many = copy.deepcopy(document)
    blank = {"setting": "api", "pair": "large_large", "condition": "student"}
    many["missing"] = [{**blank, "seed": seed, "model": "student", "why": "not run"} for seed in range(20)]
    lines = table.render(many).splitlines()
    assert sum(": not run" in line for line in lines) == 5 and "  and 15 more" in lines


def test_departures_from_the_protocol_are_printed(document):
    departed = copy.deepcopy(document)
    departed["protocol"]["deviations"] = ["seeds: frozen [0, 1], ran [0]"]
    assert "1 deviation\n  - seeds: frozen [0, 1], ran [0]" in table.render(departed)


def test_a_p_value_within_one_run_is_marked_and_the_mark_explained(document):
    text = table.render(document)
    marked = {pair: "†" in _line(text, pair, "full") for pair in ("large_large", "small_small", "large_small")}
    assert marked == {"large_large": False, "small_small": True, "large_small": True}
    assert "† within one run: interval and p are over the tasks of its one seed" in text
    whole = copy.deepcopy(document)
    for line in whole["contrasts"]:
        line["per_seed"] = [{"seed": 0}, {"seed": 1}]
    assert "†" not in table.render(whole)


def test_one_thing_is_not_told_as_several(document):
    one = copy.deepcopy(document)
    one["settings"]["api"]["seeds"] = [3]
    one["missing"] = one["missing"][:1]
    text = table.render(one)
    assert "preset tiny, seed 3; deletion" in text and "missing: 1 cell, which 1 place wants;" in text
