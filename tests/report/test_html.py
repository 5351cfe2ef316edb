"""The HTML report: complete, well-formed, self-contained, and safe against what a model wrote."""

from __future__ import annotations

import math
import re

import pytest

from subl_jax.report import curves, html, page, plots
from subl_jax.report import style as sheet
from tests.report import fake_run
from tests.report.parsed import parsed


def _page(**changes):
    given = {
        "summary": fake_run.summary(), "curves": fake_run.curves(), "examples": fake_run.examples(),
        "sanitizer": None, "config": {"distill": {"learning_rate": 3e-4}},
    }  # fmt: skip
    return parsed(html.render(**(given | changes)))


@pytest.fixture(scope="module")
def report():
    return _page()


def test_the_page_loads_nothing_and_runs_only_its_own_script(report):
    report.is_self_contained()
    assert not re.search(r"url\(|@import", sheet.css())
    assert [text for text in report.scripts] == [page.browser_script()]
    assert _page(examples=[]).scripts == []


def test_what_a_model_wrote_is_shown_as_text(report):
    assert "<script>alert('x')</script>" in report.text


def test_markup_in_every_outside_string_is_escaped():
    evil = "<img src=x onerror=alert(1)>"
    summary = fake_run.summary(notes=[evil], versions={evil: evil})
    summary["conditions"][evil] = summary["conditions"]["student"]
    summary["contrasts"][0] |= {"name": evil, "verdict": evil}
    summary["answer"] = evil
    summary["sanitizer"] = {"trajectories": 1, "kept": 0, "removed_by_word": {evil: 1}, "leaks": 0}
    summary["protocol"]["deviations"] = [evil]
    examples = fake_run.examples()
    examples[0] |= {"task_id": evil, "prompt": evil}
    call = {"function": {"name": evil, "arguments": {evil: evil}}}
    examples[0]["episodes"][evil] = {
        "messages": [
            {"role": "assistant", "content": evil, "tool_calls": [call]},
            {"role": "tool", "name": evil, "content": evil},
        ],
        "action": "unparseable", "tool": evil, "turn": 0, "done": False,
    }  # fmt: skip
    records = [{"stage": evil, "step": 0, "loss": 1.0}, {"stage": evil, "step": 1, f"loss_{evil}": 1.0}]
    found = _page(summary=summary, examples=examples, curves=records, config={evil: evil})
    assert "img" not in {tag for tag, _ in found.tags}
    assert found.text.count(evil) > 10


def test_the_answer_and_every_condition_and_contrast_stand_there(report):
    summary = fake_run.summary()
    assert summary["answer"] in report.text
    for name in summary["conditions"]:
        assert name in report.text
    for contrast in summary["contrasts"]:
        assert contrast["name"] in report.text and contrast["verdict"] in report.text
    assert summary["protocol"]["hash"] in report.text and "learning_rate" in report.text


def test_the_total_time_stands_there_once(report):
    # The summary brings its own total (249.6 s here, the sum of the stages).
    assert report.text.count("249.6") == 1 and "499.2" not in report.text


def test_headings_descend_one_level_at_a_time_and_tables_have_captions(report):
    levels = [int(tag[1]) for tag, _ in report.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    names = [tag for tag, _ in report.tags]
    assert names.count("table") == names.count("caption") > 5


def test_every_plot_is_described_in_words(report):
    for tag, attributes in report.tags:
        if tag == "svg" and attributes.get("role") == "img":
            assert re.search(r"\d", attributes["aria-label"] or "")


def test_a_report_over_the_size_limit_is_refused_and_the_old_one_stays(tmp_path):
    path = tmp_path / "report.html"
    html.write_report(path, fake_run.summary(), fake_run.curves(), fake_run.examples(), None, {})
    before = path.read_bytes()
    assert len(before) < 300_000
    examples = fake_run.examples()
    examples[0]["prompt"] = "x" * page.SIZE_LIMIT
    with pytest.raises(page.ReportError, match="over the limit"):
        html.write_report(path, fake_run.summary(), [], examples, None, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_an_empty_run_still_renders():
    text = _page(curves=[], examples=[]).text
    assert "No training metrics were recorded" in text and "No episodes were kept" in text


def test_dots_stand_where_their_values_are():
    dot = plots.Dot("student", "", 25.0, 10.0, 50.0, {4: 20.0, 7: 30.0}, "biased", "25")
    row = plots.interval_rows(plots.Intervals("a", "a", [dot], (0.0, 100.0), (0, 100), "%"))
    assert 'x1="10.0%" x2="50.0%"' in row and "seed 4: 20.0, seed 7: 30.0" in row
    placed = re.findall(r'<svg x="([\d.]+)%"[^>]*><path [^>]*(fill="none"|fill="var\(--biased\)")', row)
    assert [(float(x), paint == 'fill="none"') for x, paint in placed] == [(25.0, False), (20.0, True), (30.0, True)]


def test_a_reference_stands_as_a_hollow_mark_where_its_value_is_and_is_told():
    dot = plots.Dot("a", "", None, None, None, {}, "base", "not run", reference=75.0)
    row = plots.interval_rows(plots.Intervals("a", "a", [dot], (0.0, 100.0), (0, 100), "%", reference="paper"))
    assert 'aria-label="a: not run; paper: 75"' in row and row.count('<svg x="75.0%"') == row.count("<path") == 1
    assert 'fill="none"' in row and 'stroke-width="2.5"' not in row  # no interval


def test_losses_are_drawn_to_scale_and_upwards_is_larger():
    chart = plots.line_chart(plots.Lines("a", "loss", [plots.Series("a", [0, 10], [0.0, 4.0], "s0")]))
    assert '<polyline points="0,100 100,0"' in chart


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.013, 0.0171), (3.0, 3.0), (-2.0, 5.0), (0.0, 0.0), (1e-9, 3e-9)]
)
def test_ticks_enclose_the_data(low, high):
    ticks = plots.nice_ticks(low, high)
    assert len(ticks) >= 2 and ticks[0] <= low and high <= ticks[-1]


def test_values_that_are_not_finite_are_left_out_and_said():
    records = [{"stage": "base", "step": step, "loss": None if step == 3 else 1.0 * step} for step in range(6)]
    section = curves.section(records)
    assert "One value that is not finite is left out" in section and "nan" not in section
    chart = plots.line_chart(plots.Lines("a", "x", [plots.Series("a", [0], [math.inf], "s0")]))
    assert chart.count("polyline") == 0


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    x, y = plots.thin(range(10_000), range(10_000))
    assert len(x) <= 240 and x[0] == 0 and x[-1] == 9999 and x == y


def test_learning_rates_and_timings_are_not_drawn_as_losses():
    assert "<polyline" not in curves.section([{"stage": "base", "step": 1, "learning_rate": 0.1, "tokens_per_s": 5.0}])
