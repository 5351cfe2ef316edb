"""Figures in files: one of each kind per figure of the page, the page's numbers and colours, the same bytes again."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter

import pytest
from PIL import Image

from subl_jax.report import figures, html, page, panels, plots, style
from tests.report import fake_run

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
