"""The page, the table and the CSV of a sweep, on made-up cells."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest

from subl_jax.report import charts, plots, sweep, sweep_table
from tests.report.parsed import parsed

KINDS = ("along", "two axes", "defences")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_holds_its_answer_every_level_every_hole_and_nothing_from_outside(documents, kind):
    document = documents[kind]
    page = parsed(sweep.render(document, {"preset": "micro"}))
    page.is_self_contained()
    assert page.scripts == []
    assert document["answer"] in page.text
    for line in document["levels"]:
        assert page.text.count(line["label"]) >= 4
        for why in line["broken"]:
            assert why in page.text
        if line["broken"]:
            assert f"{line['label']}: broken" in page.text
    for hole in document["missing"]:
        assert hole["model"] in page.text and hole["why"] in page.text
    assert "Every cell is there" in page.text if document["complete"] else "The sweep is incomplete" in page.text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_is_escaped(documents, kind):
    evil = "<img src=x onerror=alert(1)>"
    text = re.sub("temperature|keywords", "EVIL", json.dumps(documents[kind]))
    document = json.loads(text.replace("EVIL", evil)) | {"answer": evil, "notes": [evil]}
    document["sweep"]["title"] = evil
    page = parsed(sweep.render(document, {evil: evil}))
    page.is_self_contained()
    assert page.text.count(evil) >= 4


def test_the_one_plot_is_what_the_axes_ask_for(documents):
    first: dict[str, Any] = {kind: sweep.drawings(document)[0] for kind, document in documents.items()}
    assert isinstance(first["along"], charts.Chart) and first["along"].name == "rates"
    assert [trace.label for trace in first["along"].traces] == ["student", "control student", "benign student"]
    assert [label for label, _, _ in first["along"].rules] == ["base, all levels", "teacher, all levels"]
    assert "logarithmic" in first["along"].x.label
    assert isinstance(first["two axes"], charts.Heat)
    assert isinstance(first["defences"], charts.Chart) and first["defences"].name == "defences"
    assert isinstance(sweep.drawings(documents["defences"])[1], plots.Intervals)


def test_a_numeric_axis_shows_means_intervals_and_single_seeds(documents):
    document = documents["along"]
    line = next(each for each in document["levels"] if each["label"] == "2")
    chart = sweep.drawings(document)[0]
    assert isinstance(chart, charts.Chart)
    student = chart.traces[0]
    mark = next(mark for mark in student.marks if mark.name == "2")
    figures = line["conditions"]["student"]
    assert mark.y == pytest.approx(100 * figures["behaviour_rate"])
    assert mark.y_limits == pytest.approx([100 * limit for limit in figures["ci95"]])
    assert {seed: y for seed, (_, y) in mark.seeds.items()} == pytest.approx(
        {each["seed"]: 100 * each["behaviour_rate"] for each in figures["per_seed"]}
    )
    assert [mark.broken for mark in student.marks] == [False, False, False, True]


def test_a_map_says_missing_and_broken_where_it_shades_nothing(documents):
    document = documents["two axes"]
    for line in document["levels"]:
        if line["label"] == "0.0001 / 12":
            line |= {"conditions": {}, "contrasts": {}, "seeds": [], "broken": []}
            line["verdict"] = {"word": "not measured", "text": ""}
    heat = sweep.drawings(document)[0]
    assert isinstance(heat, charts.Heat)
    assert heat.texts[0][1] == "missing" and heat.values[0][1] is None
    assert heat.texts[1][2].startswith("✕ broken +") and heat.values[1][2] is None
    assert heat.rows == ("learning rate", ["0.0001", "0.001"]) and heat.columns == ("steps", ["6", "12", "24"])


def test_the_chart_of_defences_marks_the_broken_one_and_has_intervals_both_ways(documents):
    chart = sweep.drawings(documents["defences"])[0]
    assert isinstance(chart, charts.Chart)
    marks = {mark.name: mark for trace in chart.traces for mark in trace.marks}
    rows = {row["level"]: row for row in documents["defences"]["defences"]}
    assert set(marks) == set(rows) and marks["mask"].broken and not marks["towards_base"].broken
    for name, mark in marks.items():
        assert mark.x == pytest.approx(100 * rows[name]["utility_lost"])
        assert mark.y == pytest.approx(100 * rows[name]["removed"])
        for limits, told in ((mark.x_limits, "utility_lost_ci95"), (mark.y_limits, "removed_ci95")):
            expected = rows[name][told]
            assert limits is None if expected is None else limits == pytest.approx([100 * each for each in expected])
    assert marks["towards_base"].x_limits is not None
    assert len({mark.letter for mark in marks.values()}) == len(marks)
    text = parsed(sweep.render(documents["defences"])).text
    assert "broken: no success" in text and "mask, broken" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_fits_a_terminal_and_holds_every_level_hole_and_broken_level(documents, kind):
    document = documents[kind]
    text = sweep_table.render(document)
    assert max(map(len, text.splitlines())) <= 110
    for line in document["levels"]:
        assert re.search(rf"^{re.escape(line['label'])} ", text, re.M)
        if line["broken"]:
            assert re.search(rf"^broken: {re.escape(line['label'])}: ", text, re.M)
    for hole in document["missing"]:
        assert f"missing: {hole['level']}: {hole['model']} (seed 1)" in text


def test_the_csv_holds_every_value_of_every_seed_and_every_hole(documents):
    document = documents["along"]
    rows = list(csv.DictReader(io.StringIO(sweep_table.csv_text(document))))
    by_place = {(row["level"], int(row["seed"]), row["condition"]): row for row in rows if not row["missing"]}
    assert len(by_place) + len(document["missing"]) == len(rows)
    for line in document["levels"]:
        for condition, values in line["conditions"].items():
            for each in values["per_seed"]:
                row = by_place.pop((line["label"], each["seed"], condition))
                for name in document["figures"]:
                    assert row[name] == ("" if each[name] is None else repr(each[name])), name
                assert row["temperature"] == line["label"] and (row["broken"] != "") == bool(line["broken"])
    assert not by_place
    [hole] = [row for row in rows if row["missing"]]
    assert (hole["level"], hole["seed"], hole["model"]) == ("4", "1", "control_student~temperature=4")


def test_a_sweep_of_which_nothing_is_there_is_a_page_all_the_same(documents):
    document = documents["along"]
    for line in document["levels"]:
        line |= {"conditions": {}, "contrasts": {}, "seeds": [], "broken": [], "training": {}, "leaks": None}
        line["verdict"] = {"word": "not measured", "text": ""}
    document |= {"differences": [], "complete": False}
    assert sweep.drawings(document) == []
    page = parsed(sweep.render(document))
    assert "Nothing has been measured yet." in page.text and "not measured" in page.text
    assert "not measured" in sweep_table.render(document)
