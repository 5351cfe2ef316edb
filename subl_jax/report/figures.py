"""Every figure of a report as files: NAME.svg and NAME.png to look at, NAME.csv with the numbers.

The drawings that the pages show (`report.plots`) in, a directory out. Matplotlib draws them in the colours of the page's
light theme with the font that it ships; the same drawings give the same bytes.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from subl_jax.artifacts import atomic_directory
from subl_jax.report import html, panels, plots
from subl_jax.report.page import ReportError
from subl_jax.report.style import light_colours

Drawing = plots.Intervals | plots.Bars | plots.Lines | plots.Points

_WIDTH = 7.5  # inches
_ROW = 0.34  # inches of a row
_DPI = 144
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "svg.fonttype": "path",  # looks the same where that font is not installed
    "svg.hashsalt": "subl_jax",  # ids inside an SVG are random without it
    "path.simplify": False,
}
_METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def export_run(
    directory: str | os.PathLike[str],
    summary: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    sanitizer: Mapping[str, Any] | None = None,
) -> None:
    """Writes every figure of a run's report; arguments as of `report.html.write_report`, else as of `export`."""
    export(directory, html.drawings(summary, curves, sanitizer))


def export_grid(directory: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Writes every figure of a grid's report; `document` is `grid.json`, else as of `export`."""
    export(directory, panels.drawings(document))


def export(directory: str | os.PathLike[str], drawings: Sequence[Drawing]) -> None:
    """Writes three files per drawing; the directory is replaced as a whole, so that no figure of an older run stays.

    Args:
      directory: of the figures alone.
      drawings: with different names.

    Raises:
      ReportError: something else stands in the directory, or two drawings would share a file.
    """
    names = [_file_name(drawing.name) for drawing in drawings]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ReportError(f"two figures would be written to {twice[0]}.svg; give the drawings different names")
    directory = Path(directory)
    others = [path.name for path in directory.iterdir() if path.suffix not in _WRITERS] if directory.is_dir() else []
    if others:
        raise ReportError(
            f"{directory} holds {sorted(others)[0]}, which is no figure; choose a directory for figures alone"
        )
    with atomic_directory(directory, overwrite=True) as partial, matplotlib.rc_context(_STYLE):
        for name, drawing in zip(names, drawings, strict=True):
            figure = None
            for suffix, write in _WRITERS.items():
                figure = write(partial / f"{name}{suffix}", drawing, figure)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "-", name).strip("-.") or "figure"


def _write_csv(path: Path, drawing: Drawing, figure: Figure | None) -> Figure | None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table(drawing))
    return figure


def _write_image(path: Path, drawing: Drawing, figure: Figure | None) -> Figure:
    figure = figure or draw(drawing)
    kind = path.suffix[1:]
    figure.savefig(path, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return figure


_WRITERS: dict[str, Callable[[Path, Drawing, Figure | None], Figure | None]] = {
    ".svg": _write_image,
    ".png": _write_image,
    ".csv": _write_csv,
}


# Numbers


def table(drawing: Drawing) -> list[list[Any]]:
    """A drawing's numbers, unrounded: a header with units, then a row per dot, bar or point."""
    if isinstance(drawing, plots.Intervals):
        return _interval_table(drawing)
    if isinstance(drawing, plots.Bars):
        header = ["label", f"count ({drawing.unit})", "share of the whole (%)"]
        return [header, *([label, value, 100 * value / max(drawing.whole, 1)] for label, value, _ in drawing.bars)]
    y_label = drawing.y_label if isinstance(drawing, plots.Points) else drawing.title
    header = ["line", "seed", drawing.x_label, y_label]
    points = [
        [line.label, "" if line.seed is None else line.seed, x, y]
        for line in drawing.series
        for x, y in zip(line.x, line.y, strict=True)
    ]
    return [header, *points]


def _interval_table(drawing: plots.Intervals) -> list[list[Any]]:
    unit = f"({drawing.unit})"
    seeds = sorted({seed for dot in drawing.dots for seed in dot.points})
    header = ["label", "detail", f"estimate {unit}", f"95 % low {unit}", f"95 % high {unit}"]
    return [
        [*header, *(f"seed {seed} {unit}" for seed in seeds)],
        *(
            [dot.label, dot.detail, dot.value, dot.low, dot.high, *(dot.points.get(seed, "") for seed in seeds)]
            for dot in drawing.dots
        ),
    ]


# Pictures


def draw(drawing: Drawing) -> Figure:
    """A drawing as a Matplotlib figure."""
    colours = light_colours()
    if isinstance(drawing, plots.Lines):
        figure, axes = _canvas(drawing.title, 4.2, colours)
        _lines(axes, drawing, colours)
    elif isinstance(drawing, plots.Points):
        figure, axes = _canvas(drawing.title, 5.2, colours)
        _points(axes, drawing, colours)
    else:
        rows = len(drawing.dots if isinstance(drawing, plots.Intervals) else drawing.bars)
        figure, axes = _canvas(drawing.title, 1.1 + _ROW * rows, colours)
        axes.set_ylim(rows - 0.5, -0.5)
        if isinstance(drawing, plots.Intervals):
            _intervals(axes, drawing, colours)
        else:
            _bars(axes, drawing, colours)
    return figure


def _canvas(title: str, height: float, colours: Mapping[str, str]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=colours["card"])
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_plain(title), loc="left", color=colours["ink"], fontsize=10, fontweight="bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours["line"])
    axes.tick_params(length=0, pad=7, colors=colours["soft"])
    axes.set_axisbelow(True)
    return figure, axes


def _plain(text: str) -> str:
    """Text that Matplotlib sets as it is; a dollar sign begins a formula otherwise."""
    return text.replace("$", r"\$")


def _rows(axes: Axes, labels: Sequence[str], figures: Sequence[str], colours: Mapping[str, str]) -> None:
    """Names at the left of rows and their figures at the right."""
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels], color=colours["ink"])
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(figures)), [_plain(text) for text in figures])
    right.tick_params(length=0, pad=7, colors=colours["ink"])
    right.spines["right"].set_visible(False)


def _intervals(axes: Axes, drawing: plots.Intervals, colours: Mapping[str, str]) -> None:
    axes.set_xlim(*drawing.domain)
    axes.set_xticks(drawing.ticks, [plots.tick_label(tick, drawing.domain) for tick in drawing.ticks])
    axes.set_xlabel(drawing.unit, color=colours["soft"])
    for tick in drawing.ticks:
        zero = tick == 0 and drawing.domain[0] < 0
        axes.axvline(tick, color=colours["soft" if zero else "grid"], linewidth=0.8, zorder=0)
    for row, dot in enumerate(drawing.dots):
        colour, several = colours[dot.colour], len(dot.points) > 1
        y = row - (0.14 if several else 0.0)  # the interval makes room for the seeds beneath it
        axes.errorbar(
            dot.value, y, xerr=[[max(0.0, dot.value - dot.low)], [max(0.0, dot.high - dot.value)]],
            fmt="o", color=colour, markersize=5, linewidth=1.8, capsize=2.5, clip_on=False,
        )  # fmt: skip
        if several:
            points = list(dot.points.values())
            axes.plot(
                points, [row + 0.22] * len(points), "o", markersize=3.5, markerfacecolor="none",
                markeredgecolor=colour, markeredgewidth=0.9, clip_on=False,
            )  # fmt: skip
    labels = [f"{dot.label}, {dot.detail}" if dot.detail else dot.label for dot in drawing.dots]
    _rows(axes, labels, [dot.figure for dot in drawing.dots], colours)


def _bars(axes: Axes, drawing: plots.Bars, colours: Mapping[str, str]) -> None:
    whole = max(drawing.whole, 1.0)
    axes.set_xlim(0, whole)
    axes.set_xlabel(drawing.unit, color=colours["soft"])
    places = range(len(drawing.bars))
    axes.barh(places, [whole] * len(drawing.bars), height=0.5, color=colours["grid"])
    values = [value for _, value, _ in drawing.bars]
    axes.barh(places, values, height=0.5, color=[colours[colour] for *_, colour in drawing.bars])
    texts = [f"{value:g} ({100 * value / whole:.1f} %)" for value in values]
    _rows(axes, [label for label, *_ in drawing.bars], texts, colours)


def _lines(axes: Axes, drawing: plots.Lines, colours: Mapping[str, str]) -> None:
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_xlabel(_plain(drawing.x_label), color=colours["soft"])
    named: set[str] = set()
    for line in plots.finite_lines(drawing.series):
        single = len(line.x) == 1
        axes.plot(
            *plots.thin(line.x, line.y), color=colours[line.colour], linewidth=1.3, marker="o" if single else "",
            markersize=4, label=f"_{line.label}" if line.label in named else _plain(line.label),
        )  # fmt: skip
        named.add(line.label)
    if named:
        axes.legend(frameon=False, labelcolor=colours["ink"])


# Marks of series that share a colour, one after the other.
_MARKS = "os^Dv<>P*X"


def _points(axes: Axes, drawing: plots.Points, colours: Mapping[str, str]) -> None:
    axes.grid(color=colours["grid"], linewidth=0.8)
    axes.set_xlabel(_plain(drawing.x_label), color=colours["soft"])
    axes.set_ylabel(_plain(drawing.y_label), color=colours["soft"])
    for draw_line in (axes.axhline, axes.axvline):
        draw_line(0, color=colours["line"], linewidth=0.8, zorder=0)
    marks: dict[str, str] = {}
    for line in drawing.series:
        kind = line.label.rpartition(", ")[0] or line.label
        mark = marks.setdefault(kind, _MARKS[len(marks) % len(_MARKS)])
        axes.plot(
            line.x, line.y, mark, color=colours[line.colour], markersize=4.5, alpha=0.85, linestyle="",
            label=_plain(line.label),
        )  # fmt: skip
    axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
