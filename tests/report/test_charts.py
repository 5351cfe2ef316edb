"""Points in a plane and shaded tables: where marks stand, and that all of it is also said in words."""

from __future__ import annotations

import csv
import math
import re

import pytest

from subl_jax.report import charts, figures
from subl_jax.report.charts import SHARES, Chart, Heat, Mark, Trace
from tests.report.parsed import parsed


def chart(marks, axis=None, **more) -> Chart:
    axis = axis or charts.points_axis("x, points", [-20, 40])
    return Chart("c", "A title", [Trace("student", "biased", marks)], axis, SHARES, **more)


def test_numbers_over_more_than_a_decade_stand_by_their_logarithm_and_others_by_themselves():
    axis, places = charts.level_axis("steps", [1, 10, 100])
    assert (
        places == [0, 1, 2] and [text for _, text in axis.ticks] == ["1", "10", "100"] and "logarithmic" in axis.label
    )
    axis, places = charts.level_axis("temperature", [1.0, 2.0, 8.0])
    assert places == [1, 2, 8] and "logarithmic" not in axis.label
    axis, places = charts.level_axis("dilution", [0.0, 0.5, 20.0])  # zero has no logarithm
    assert places == [0, 0.5, 20] and axis.domain[0] < 0 < 20 < axis.domain[1] and not axis.signed


def test_a_word_stands_behind_the_numbers():
    axis, places = charts.level_axis("trajectories", [25, 50, 400, "all"])
    assert places[:3] == [math.log10(25), math.log10(50), math.log10(400)] and places[3] > places[2]
    assert axis.ticks[-1] == (places[3], "all") and axis.domain[1] > places[3]


def test_ticks_of_many_levels_are_round_numbers_that_do_not_overlap():
    axis, places = charts.level_axis("n", list(range(1, 41)))
    assert len(places) == 40 and len(axis.ticks) <= 8


def test_marks_stand_where_their_numbers_say():
    drawing = chart([Mark("a", -20, 0), Mark("b", 40, 100)], axis=charts.Axis("x", (-20, 40), []))
    marks = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)%">', charts.chart(drawing))
    assert [(float(x), float(y)) for x, y in marks] == [(0, 100), (100, 0)]


def test_a_broken_mark_has_another_shape_and_is_called_broken():
    whole, broken = (charts.chart(chart([Mark("a", 1, 50, letter="A", broken=state)])) for state in (False, True))
    assert "<path" not in whole and "broken" not in whole and "<circle r=" in whole
    assert "<path" in broken and "<circle r=" not in broken
    page = parsed(broken)
    assert "A broken" in page.text and "broken level: not to be read as a success" in page.text
    [label] = [
        str(attributes["aria-label"]) for tag, attributes in page.tags if "aria-label" in attributes and tag == "svg"
    ]
    assert "a (broken) 50.0" in label


def test_all_of_a_chart_is_in_its_words_and_is_escaped():
    evil = "<b onload=x>"
    mark = Mark(evil, 10, 50, (5, 15), (40, 60), {0: (10, 45), 1: (10, 55)}, letter="A")
    text = charts.chart(Chart("c", evil, [Trace(evil, "biased", [mark])], charts.points_axis(evil, [0, 20]), SHARES,
                              [(evil, 12.5, "base")], evil))  # fmt: skip
    page = parsed(text)
    [label] = [str(attributes["aria-label"]) for tag, attributes in page.tags if "aria-label" in attributes]
    assert f"{evil}: {evil} 50.0 [40.0, 60.0] at 10.0 [5.0, 15.0]" in label and f"{evil} at 12.5" in label
    assert page.text.count(evil) >= 5 and "<b onload" not in text
    assert text.count('r="2.6"') == 2  # single seeds


def test_shades_repeat_what_cells_say_and_never_darken_a_cell_that_is_not_measured():
    heat = Heat("h", "Map", ("rate", ["1", "2"]), ("rank", ["4", "8"]), [[10.0, None], [-5.0, 20.0]],
                [["+10", "✕ broken +90"], ["-5", "+20"]], 20.0, "points")  # fmt: skip
    text = charts.heat_table(heat)
    page = parsed(text)
    for told in ("+10", "✕ broken +90", "-5", "+20", "rate", "rank"):
        assert told in page.text
    assert re.findall(r"var\(--biased\) (\d+)%", text) == ["20", "40"]
    assert [tag for tag, attributes in page.tags if attributes.get("scope") == "row"] == ["th", "th"]


@pytest.mark.parametrize("kind", ["chart", "heat"])
def test_both_are_written_as_pictures_and_numbers_and_twice_alike(tmp_path, kind):
    mark = Mark("a $x", 10, 50, (5, 15), (40, 60), {0: (10, 45), 1: (10, 55)}, letter="A", broken=True)
    drawing = chart([mark, Mark("b", 20, 60)], rules=[("base", 3.25, "base")])
    if kind == "heat":
        drawing = Heat(
            "c", "Map", ("r", ["1"]), ("s", ["4", "8"]), [[10.0, None]], [["+10", "missing"]], 10.0, "points"
        )
    figures.export(tmp_path / "one", [drawing])
    figures.export(tmp_path / "two", [drawing])
    for suffix in ("svg", "png", "csv"):
        first, second = ((tmp_path / folder / f"c.{suffix}").read_bytes() for folder in ("one", "two"))
        assert first == second and len(first) > 50
    rows = list(csv.reader((tmp_path / "one" / "c.csv").open()))
    if kind == "chart":
        assert rows[1] == ["student", "a $x", "broken", "", "10", "50", "40", "60", "5", "15"]
        assert rows[2][3:6] == ["0", "10", "45"] and rows[-1][:1] == ["base"] and rows[-1][5] == "3.25"
    else:
        assert rows[1:] == [["1", "4", "10.0", "+10"], ["1", "8", "", "missing"]]
