"""Figures in files: one of each kind per figure of the page, the page's numbers and colours, the same bytes again."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter

import pytest
from matplotlib.text import Text
from PIL import Image

from subl_jax.report import figures, html, on_policy, page, panels, plots, style
from tests.report import fake_run, fake_study

DOT = plots.Dot("a $b$, c", "d", 25.0, 10.0, 50.0, {4: 20.0, 7: 30.0}, "biased", "25")
OTHER = plots.Dot("e", "", 5.0, 0.0, 9.0, {7: 5.0}, "base", "5")
INTERVALS = plots.Intervals("i", "title", [DOT, OTHER], (0.0, 100.0), (0, 50, 100), "%")
BARS = plots.Bars("b", "title", [("in", 8, "base"), ("kept", 6, "benign")], 8, "trajectories")
LINES = plots.Lines("l", "loss (nats)", [plots.Series("x", [0, 1], [0.5, math.nan], "s0", 3)])


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_every_figure_of_a_run_s_page_has_three_files(tmp_path):
    summary = fake_run.summary()
    figures.export_run(tmp_path / "figures", summary, fake_run.curves())
    suffixes = Counter(path.suffix for path in (tmp_path / "figures").iterdir())
    text = html.render(summary, fake_run.curves(), [], None, {})
    assert set(suffixes.values()) == {text.count("<figure")} and set(suffixes) == {".svg", ".png", ".csv"}


def test_every_figure_of_a_grid_s_page_is_among_the_exported_ones(document):
    from subl_jax.report import grid

    assert len(panels.drawings(document)) == grid.render(document).count("<figure")


def test_the_numbers_are_those_of_the_drawing_with_units_and_seeds(tmp_path):
    figures.export(tmp_path / "f", [INTERVALS, BARS, LINES])
    assert rows(tmp_path / "f" / "i.csv") == [
        ["label", "detail", "estimate (%)", "95 % low (%)", "95 % high (%)", "seed 4 (%)", "seed 7 (%)"],
        ["a $b$, c", "d", "25.0", "10.0", "50.0", "20.0", "30.0"],
        ["e", "", "5.0", "0.0", "9.0", "", "5.0"],
    ]
    assert rows(tmp_path / "f" / "b.csv")[1:] == [["in", "8", "100.0"], ["kept", "6", "75.0"]]
    assert rows(tmp_path / "f" / "l.csv") == [
        ["line", "seed", "step", "loss (nats)"], ["x", "3", "0", "0.5"], ["x", "3", "1", "nan"],
    ]  # fmt: skip


def test_the_same_drawing_gives_the_same_bytes_and_neither_date_nor_version(tmp_path):
    for name in ("one", "two"):
        figures.export(tmp_path / name, [INTERVALS, LINES])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    svg = (tmp_path / "one" / "i.svg").read_text(encoding="utf-8")
    assert "<dc:date" not in svg and not re.search(r"Matplotlib v", svg)


def test_colours_are_those_of_the_light_page(tmp_path):
    colours = style.light_colours()
    assert colours["biased"] == "#b8431b" and "scheme" not in colours
    figures.export(tmp_path / "f", [INTERVALS])
    svg = (tmp_path / "f" / "i.svg").read_text(encoding="utf-8")
    assert all(colours[name] in svg for name in ("biased", "base", "card"))
    with Image.open(tmp_path / "f" / "i.png") as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_dots_stand_where_their_values_are():
    axes = figures.draw(INTERVALS).axes[0]
    drawn = {
        (round(float(x), 6), round(float(y)))
        for line in axes.lines
        if line.get_marker() == "o"
        for x, y in line.get_xydata()  # pyright: ignore[reportGeneralTypeIssues]
    }
    assert drawn == {(25.0, 0), (20.0, 0), (30.0, 0), (5.0, 1)}
    assert axes.get_xlim() == (0.0, 100.0) and axes.get_ylim() == (1.5, -0.5)  # the first row on top


def test_an_older_run_s_figures_go_and_anything_else_is_not_touched(tmp_path):
    figures.export(tmp_path / "f", [INTERVALS, BARS])
    figures.export(tmp_path / "f", [INTERVALS])
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["i.csv", "i.png", "i.svg"]
    (tmp_path / "f" / "notes.txt").write_text("mine")
    with pytest.raises(page.ReportError, match=r"holds notes\.txt"):
        figures.export(tmp_path / "f", [BARS])
    assert (tmp_path / "f" / "i.csv").exists()


def test_names_become_files_and_two_of_one_name_are_refused(tmp_path):
    odd = plots.Bars("../a/b <c>", "t", [("x", 1, "base")], 1, "n")
    figures.export(tmp_path / "f", [odd])
    assert {path.stem for path in (tmp_path / "f").iterdir()} == {"a-b-c"}
    with pytest.raises(page.ReportError, match="two figures"):
        figures.export(tmp_path / "f", [odd, odd])


def test_an_overview_is_wide_enough_and_holds_the_other_figure_in_its_numbers(document, tmp_path):
    figures.export(tmp_path / "f", panels.overview(document, "bash"))
    header, *body = rows(tmp_path / "f" / "bash-overview.csv")
    assert header[-1] == "paper (points)"
    assert [row[-1] for row in body] == ["25.0", "", "5.0", "45.0", ""]
    assert body[2][:5] == ["small → small", "", "", "", ""]  # invalid: no estimate
    with Image.open(tmp_path / "f" / "bash-overview.png") as picture:
        assert picture.width >= 1400


def test_nothing_of_an_overview_runs_off_the_picture(document):
    (plot,) = panels.overview(document, "api")
    figure = figures.draw(plot)
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    boxes = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text().strip()]
    assert len(boxes) > 20
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


# --- The on-policy study ----------------------------------------------------------------------------------------------


def test_the_figures_of_the_on_policy_study_hold_the_page_s_numbers(tmp_path):
    result = fake_study.result()
    figures.export_on_policy(tmp_path / "f", result)
    names = {path.stem for path in (tmp_path / "f").iterdir()}
    assert len(names) == on_policy.render(result).count("<figure") == 3
    header, *body = rows(tmp_path / "f" / "reverse-kl-student.csv")
    assert header[:4] == ["line", "replicate", "loss tokens trained on, thousands", on_policy.drawings(result)[0].title]
    curve = next(each for each in result["curves"] if (each["arm"], each["states"]) == ("mixed", "student"))
    means = [[float(value) for value in row[2:]] for row in body if row[:2] == ["mixed", "mean"]]
    assert means == [[p["loss_tokens"] / 1000, p["reverse_kl"], *p["ci95"]] for p in curve["points"]]
    third = [float(row[3]) for row in body if row[:2] == ["mixed", "3"]]
    assert third == [point["per_seed"][2]["reverse_kl"] for point in curve["points"]]


def test_an_interval_chart_in_a_file_has_the_page_s_axis():
    band = plots.Band("a", [0.0, 10.0], [1.0, 0.01], [[0.5, 1.5], [-0.3, 0.1]], [([0.0, 10.0], [0.9, 0.02])], "s0")
    drawing = plots.Bands("b", "t", [band], "x", "", 5.0)
    axes = figures.draw(drawing).axes[0]
    assert axes.get_yscale() == "log" and axes.get_ylim() == (0.01, 2.0) and axes.get_xlim() == (0.0, 10.0)
    drawn = [[list(point) for point in line.get_xydata()] for line in axes.lines]  # pyright: ignore[reportGeneralTypeIssues]
    assert [[0.0, 1.0], [10.0, 0.01]] in drawn and [[0.0, 0.9], [10.0, 0.02]] in drawn
    straight = plots.Bands("b", "t", [plots.Band("a", [0.0, 10.0], [1.0, 3.0], [None, None], [], "s0")], "x")
    assert figures.draw(straight).axes[0].get_yscale() == "linear"
