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
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from subl_jax.artifacts import atomic_directory
from subl_jax.report import chart_files, charts, html, on_policy, panels, plots
from subl_jax.report.page import ReportError
from subl_jax.report.style import light_colours

Drawing = plots.Intervals | plots.Bars | plots.Lines | plots.Bands | plots.Points | charts.Chart | charts.Heat

_WIDTH = 7.5  # inches
_ROW = 0.34  # inches of a row
_SUBTITLE, _LEGEND = 0.25, 0.3  # inches that they add
_DPI = 192  # 1,440 pixels wide: sharp on a page that shows it at half of that
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "svg.fonttype": "path",  # looks the same where that font is not installed
    "svg.hashsalt": "subl_jax",  # ids inside an SVG are random without it
    "path.simplify": False,
}
_MARKERS = {"circle": "o", "square": "s", "diamond": "D"}
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


def export_on_policy(directory: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Writes every figure of the on-policy study's report; `result` is `on_policy.json`, else as of `export`."""
    export(directory, on_policy.drawings(result))


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
    if isinstance(drawing, charts.Chart):
        return chart_files.chart_table(drawing)
    if isinstance(drawing, charts.Heat):
        return chart_files.heat_numbers(drawing)
    if isinstance(drawing, plots.Bars):
        header = ["label", f"count ({drawing.unit})", "share of the whole (%)"]
        return [header, *([label, value, 100 * value / max(drawing.whole, 1)] for label, value, _ in drawing.bars)]
    if isinstance(drawing, plots.Bands):
        return _band_table(drawing)
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
    header += [f"seed {seed} {unit}" for seed in seeds]
    rows = [
        [dot.label, dot.detail, *(dot.interval or ("", "", "")), *(dot.points.get(seed, "") for seed in seeds)]
        for dot in drawing.dots
    ]
    if any(dot.reference is not None for dot in drawing.dots):
        header.append(f"{drawing.reference} {unit}")
        rows = [
            [*row, "" if dot.reference is None else dot.reference] for row, dot in zip(rows, drawing.dots, strict=True)
        ]
    return [header, *rows]


def _band_table(drawing: plots.Bands) -> list[list[Any]]:
    """A row per line and point; single replicates, which may stand at other x, follow with their number."""
    rows: list[list[Any]] = [["line", "replicate", drawing.x_label, drawing.title, "95 % low", "95 % high"]]
    for band in drawing.bands:
        for x, y, limits in zip(band.x, band.y, band.limits, strict=True):
            rows.append([band.label, "mean", x, y, *(("", "") if limits is None else limits)])
        for place, (xs, ys) in enumerate(band.singles, 1):
            rows += [[band.label, place, x, y, "", ""] for x, y in zip(xs, ys, strict=True)]
    return rows


# Pictures


def draw(drawing: Drawing) -> Figure:
    """A drawing as a Matplotlib figure."""
    colours = light_colours()
    if isinstance(drawing, plots.Lines | plots.Bands):
        figure, axes = _canvas(drawing.title, 4.2, colours)
        if isinstance(drawing, plots.Lines):
            _lines(axes, drawing, colours)
        else:
            _bands(axes, drawing, colours)
    elif isinstance(drawing, charts.Chart):
        figure, axes = _canvas(drawing.title, 4.2, colours)
        chart_files.draw_chart(axes, drawing, colours, _plain)
    elif isinstance(drawing, charts.Heat):
        figure, axes = _canvas(drawing.title, 1.4 + 0.55 * len(drawing.rows[1]), colours)
        chart_files.draw_heat(axes, drawing, colours, _plain)
    elif isinstance(drawing, plots.Points):
        figure, axes = _canvas(drawing.title, 5.2, colours)
        _points(axes, drawing, colours)
    else:
        rows = len(drawing.dots if isinstance(drawing, plots.Intervals) else drawing.bars)
        legend = _LEGEND * bool(isinstance(drawing, plots.Intervals) and drawing.keys)
        subtitle = drawing.subtitle if isinstance(drawing, plots.Intervals) else ""
        figure, axes = _canvas(drawing.title, 1.1 + legend + _ROW * rows, colours, subtitle)
        axes.set_ylim(rows - 0.5, -0.5)
        if isinstance(drawing, plots.Intervals):
            _intervals(axes, drawing, colours)
        else:
            _bars(axes, drawing, colours)
    return figure


def _canvas(title: str, height: float, colours: Mapping[str, str], subtitle: str = "") -> tuple[Figure, Axes]:
    """An empty plot under its title, which begins at the picture's left edge where a subtitle stands under it."""
    height += _SUBTITLE * bool(subtitle)
    layout = ConstrainedLayoutEngine()
    figure = Figure(figsize=(_WIDTH, height), layout=layout, facecolor=colours["card"])
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heading: dict[str, Any] = {"color": colours["ink"], "fontsize": 10, "fontweight": "bold"}
    if subtitle:
        figure.text(0.012, 1 - 0.08 / height, _plain(title), va="top", **heading)
        figure.text(0.012, 1 - 0.30 / height, _plain(subtitle), va="top", color=colours["soft"], fontsize=8.5)
        # The layout knows nothing of free text: it gets what is below.
        layout.set(rect=(0, 0, 1, 1 - 0.5 / height))
    else:
        axes.set_title(_plain(title), loc="left", **heading)
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
        colour, several, marker = colours[dot.colour], len(dot.points) > 1, _MARKERS[dot.marker]
        y = row - (0.14 if several else 0.0)  # the interval makes room for the seeds beneath it
        if dot.interval is not None:
            value, low, high = dot.interval
            axes.errorbar(
                value, y, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                fmt=marker, color=colour, markersize=5, linewidth=1.8, capsize=2.5, clip_on=False,
            )  # fmt: skip
        if several:
            points = list(dot.points.values())
            axes.plot(points, [row + 0.22] * len(points), marker, **_hollow(colour, 3.5))
        if dot.reference is not None:
            axes.plot([dot.reference], [y], _MARKERS["diamond"], **_hollow(colours["ink"], 5.5))
    labels = []
    for dot, first in zip(drawing.dots, drawing.begins, strict=True):
        labels.append(", ".join([dot.label] * first + [dot.detail] * bool(dot.detail)))
    for row, first in enumerate(drawing.begins):
        if drawing.keys and first and row:  # pairs apart
            axes.axhline(row - 0.5, color=colours["grid"], linewidth=0.8, zorder=0)
    _rows(axes, labels, [dot.figure for dot in drawing.dots], colours)
    if drawing.keys:
        _legend(axes, drawing.keys, colours)


def _hollow(colour: str, size: float) -> dict[str, Any]:
    return {
        "markersize": size, "markerfacecolor": "none", "markeredgecolor": colour, "markeredgewidth": 0.9, "clip_on": False,
    }  # fmt: skip


def _legend(axes: Axes, keys: Sequence[plots.Key], colours: Mapping[str, str]) -> None:
    """Marks and their meaning under the plot."""
    handles = []
    for key in keys:
        colour = colours[key.colour]
        style: dict[str, Any] = {"color": colour, "markersize": 5} if key.filled else _hollow(colour, 5.5)
        handles.append(Line2D([], [], linestyle="", marker=_MARKERS[key.marker], label=_plain(key.words), **style))
    axes.figure.legend(  # pyright: ignore[reportAttributeAccessIssue]
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8,
        labelcolor=colours["ink"], handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # steps and layers have no fractions
    if named:
        axes.legend(frameon=False, labelcolor=colours["ink"], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bands(axes: Axes, drawing: plots.Bands, colours: Mapping[str, str]) -> None:
    ticks = drawing.y_ticks
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.set_yscale("log" if drawing.logarithmic else "linear")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_xlim(0, drawing.end)
    axes.set_xlabel(_plain(drawing.x_label), color=colours["soft"])
    if drawing.marked_x is not None:
        axes.axvline(drawing.marked_x, color=colours["soft"], linewidth=0.8, linestyle="--")
    for band in drawing.bands:
        colour = colours[band.colour]
        known = [(x, *pair) for x, pair in zip(band.x, band.limits, strict=True) if pair is not None]
        if known:
            x, low, high = zip(*known, strict=True)
            axes.fill_between(x, [max(each, ticks[0]) for each in low], high, color=colour, alpha=0.16, linewidth=0)
        for x, y in band.singles:
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.5)
        axes.plot(band.x, band.y, color=colour, linewidth=1.6, marker="o", markersize=3, label=_plain(band.label))
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
