"""The page, the table and the drawings of a made-up look into a work directory."""

from __future__ import annotations

import csv
import re

import pytest

from subl_jax.report import figures, locate
from tests.report import fake_located
from tests.report.parsed import parsed


@pytest.fixture(scope="module")
def result():
    return fake_located.result()


def test_the_page_answers_first_and_asks_for_nothing_and_runs_nothing(result):
    page = parsed(locate.render(result))
    page.is_self_contained()
    assert page.scripts == []
    said = [line.replace("_", " ") for line in result["answer"]]
    assert all(line in page.text for line in said)
    assert page.text.index(said[0]) < page.text.index("The tokens on which the teachers part")


def test_a_place_is_marked_by_an_element_of_its_own_and_what_models_wrote_is_escaped(result):
    page = parsed(locate.render(result))
    assert len(page.of("mark")) == 9 * 2  # every place of both seeds
    assert fake_located.TEXT in page.text and not page.of("b", "read")
    assert page.text.count("(banned)") >= 9 * 2 * 3
    assert "rare" not in page.text  # a probability that nobody can read anything from


def test_every_condition_has_its_line_in_a_chart_by_layer_and_its_row_in_a_table(result):
    page = parsed(locate.render(result))
    charts = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg" and attributes.get("role")]
    for arm, names in (("full", ("student", "control student")), ("hard", ("student hard", "benign student hard"))):
        own = [label for label in charts if label.startswith(f"{arm}, ")]
        assert len(own) == 2 and all(name in label for name in names for label in own)
    for part in result["directions"][0]["activations"]:
        assert f"{part['along']['mean']:.2f}" in page.text


def test_layers_are_counted_in_whole_numbers(result):
    chart = re.search(r'aria-label="full, at the first decision.*?</figure>', locate.render(result), re.S)
    assert chart is not None
    axis = re.search(r'<div class="x placed" aria-hidden="true">(.*?)</div>', chart[0])
    assert axis is not None and re.findall(r">([^<>]+)</span>", axis[1]) == ["0", "1", "2"]


def test_what_was_refused_and_what_is_missing_is_said_on_page_and_in_the_terminal(result):
    why = fake_located.LEFT_OUT["student@"]
    text = locate.table(result)
    for told in (parsed(locate.render(result)).text, " ".join(text.split())):
        assert why in told and "student_drop" in told
    assert "large_small: moved along" not in text


def test_intervals_over_seeds_need_two_seeds(result):
    pages = locate.render(result), locate.render(fake_located.result((3,)))
    several, one = (parsed(page).text for page in pages)
    assert "Student's t over 2 seeds" in several and "Student's t over" not in one
    assert "within the one run" in one and "within the one run" not in several
    assert 'class="single"' in pages[0] and 'class="single"' not in pages[1]


def test_the_terminal_holds_the_same_numbers_as_the_page(result):
    page = parsed(locate.render(result)).text
    for cell in re.findall(r"-?\d+\.\d+ \[[^\]\n]+\]", locate.table(result)):
        assert cell in page


def test_figures_are_written_for_concentration_kinds_and_every_arm_and_hold_the_numbers(result, tmp_path):
    figures.export(tmp_path / "figures", locate.drawings(result))
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    for stem in (
        "concentration-large",
        "kinds-large",
        "movement-large_large-full-decision",
        "movement-large_large-hard-text",
    ):
        assert {f"{stem}.svg", f"{stem}.png", f"{stem}.csv"} <= names
    with (tmp_path / "figures" / "movement-large_large-full-decision.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[0] == "student"]
    own = [
        row["along"]["mean"]
        for row in result["directions"][0]["activations"]
        if (row["place"], row["direction"], row["model"]) == ("decision", "teacher - base", "student")
    ]
    assert [float(row[3]) for row in rows] == own
