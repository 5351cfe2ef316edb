"""The on-policy study's page and table, on made-up numbers."""

from __future__ import annotations

import re

import pytest

from subl_jax.report import on_policy, plots
from tests.report import fake_study
from tests.report.parsed import parsed


def test_the_first_screen_answers_with_the_numbers_and_both_curves_stand_there():
    result = fake_study.result()
    page = parsed(on_policy.render(result))
    assert result["answer"] in page.text
    assert page.text.index(result["answer"]) < page.text.index("Along the way")
    charts = [str(attributes["aria-label"]) for tag, attributes in page.tags if tag == "svg"]
    assert [label.split(":")[0] for label in charts[:2]] == ["Student's states", "Teacher's states"]
    for label in charts:
        assert all(arm in label for arm in ("off-policy", "mixed", "on-policy"))
    for contrast in result["contrasts"]:
        assert f"{contrast['difference']:+.4f}" in page.text


def test_the_page_loads_nothing_and_runs_nothing_and_escapes_what_it_is_given():
    evil = "<img src=x onerror=alert(1)>"
    result = fake_study.result() | {"answer": evil, "notes": [evil], "versions": {evil: evil}, "config": {evil: evil}}
    page = parsed(on_policy.render(result))
    page.is_self_contained()
    assert page.scripts == []
    assert page.text.count(evil) >= 5


def test_lines_of_single_seeds_and_intervals_are_drawn_where_there_are_several_seeds_and_only_there():
    several, one = on_policy.render(fake_study.result()), on_policy.render(fake_study.result((4,)))
    assert several.count("<polygon") == 2 * 3 and several.count('class="single"') == 3 * 3 * 3
    assert one.count("<polygon") == 0 and one.count('class="single"') == 0
    assert "Shaded" not in one and "one seed: no interval" in one


def test_the_table_fits_a_terminal_and_holds_every_arm_the_start_and_the_teacher():
    text = on_policy.table(fake_study.result())
    assert max(map(len, text.splitlines())) <= 110
    for name in ("before training", "off-policy", "mixed", "on-policy", "teacher", "on-policy - off-policy"):
        assert re.search(rf"^{name} ", text, re.M)


# --- The chart --------------------------------------------------------------------------------------------------------


def band(y: list[float], limits: list | None = None) -> plots.Band:
    return plots.Band("a", [0.0, 10.0], y, limits or [None, None], [], "s0")


def points(chart: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'<{kind} [^>]*points="([^"]*)"', chart) or re.search(rf'points="([^"]*)"[^>]*{kind}', chart)
    assert found
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


def test_a_linear_chart_is_to_scale_with_its_interval():
    chart = plots.interval_chart("t", [band([1.0, 3.0], [[0.0, 2.0], [2.0, 4.0]])], "x")
    assert points(chart, "polyline") == [(0, 75), (100, 25)]
    assert points(chart, "polygon") == [(0, 50), (100, 0), (100, 50), (0, 100)]
    assert "Logarithmic" not in chart


def test_values_over_decades_get_a_logarithmic_axis_and_an_interval_below_zero_ends_at_its_bottom():
    chart = plots.interval_chart("t", [band([1.0, 0.01], [[0.5, 1.5], [-0.3, 0.1]])], "x")
    assert "Logarithmic axis. Intervals that reach below the axis end at its bottom." in chart
    # From 0.01 to 2: 0.1 stands at log(10) / log(200) of the height.
    outline = points(chart, "polygon")
    assert outline[1][1] == pytest.approx(100 - 100 * 0.43458, abs=0.01) and outline[2] == (100, 100)
    assert points(chart, "polyline")[1] == (100, 100)


@pytest.mark.parametrize(("low", "high"), [(0.01, 1.0), (0.013, 0.017), (3.0, 3.0), (1e-6, 2.0), (5.0, 5.0)])
def test_logarithmic_ticks_enclose_the_data(low: float, high: float):
    ticks = plots.log_ticks(low, high)
    assert len(ticks) >= 2 and ticks == sorted(ticks) and ticks[0] <= low and high <= ticks[-1]


def test_a_chart_of_nothing_or_of_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        plots.interval_chart("t", [band([float("nan"), 1.0])], "x")
    with pytest.raises(ValueError, match="finite"):
        plots.interval_chart("t", [], "x")
