"""`report.charts` as pictures and tables for files: what `report.figures` calls for a `Chart` or a `Heat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from subl_jax.report.charts import Chart, Heat, Limits, Mark, Trace

Plain = Callable[[str], str]


def chart_table(drawing: Chart) -> list[list[Any]]:
    """A chart's numbers, unrounded: a header with units, then a row per mark and one per seed of it."""
    header = ["trace", "level", "broken", "seed", drawing.x.label]
    header += [drawing.y.label, "95 % low", "95 % high", "95 % low, across", "95 % high, across"]
    rows: list[list[Any]] = []
    for trace in drawing.traces:
        for mark in trace.marks:
            lead = [trace.label, mark.name, "broken" if mark.broken else ""]
            rows.append([*lead, "", mark.x, mark.y, *(mark.y_limits or ("", "")), *(mark.x_limits or ("", ""))])
            rows += [[*lead, seed, x, y, "", "", "", ""] for seed, (x, y) in mark.seeds.items()]
    rows += [[label, "", "", "", "", height, "", "", "", ""] for label, height, _ in drawing.rules]
    return [header, *rows]


def heat_numbers(drawing: Heat) -> list[list[Any]]:
    """A heat map's numbers, unrounded, with what stands in each cell beside."""
    (row_word, rows), (column_word, columns) = drawing.rows, drawing.columns
    found: list[list[Any]] = [[row_word, column_word, f"{drawing.title} ({drawing.unit})", "as shown"]]
    for name, values, texts in zip(rows, drawing.values, drawing.texts, strict=True):
        for column, value, text in zip(columns, values, texts, strict=True):
            found.append([name, column, "" if value is None else value, text])
    return found


def draw_chart(axes: Axes, drawing: Chart, colours: Mapping[str, str], plain: Plain) -> None:
    """Draws a chart into axes that have its title."""
    axes.set_xlim(*drawing.x.domain)
    axes.set_ylim(*drawing.y.domain)
    axes.set_xticks([tick for tick, _ in drawing.x.ticks], [plain(text) for _, text in drawing.x.ticks])
    axes.set_yticks([tick for tick, _ in drawing.y.ticks], [plain(text) for _, text in drawing.y.ticks])
    axes.set_xlabel(plain(drawing.x.label), color=colours["soft"])
    axes.set_ylabel(plain(drawing.y.label), color=colours["soft"])
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    if drawing.y.signed:
        axes.axhline(0, color=colours["soft"], linewidth=0.8)
    if drawing.x.signed:
        axes.axvline(0, color=colours["soft"], linewidth=0.8)
    for label, height, colour in drawing.rules:
        axes.axhline(height, color=colours[colour], linewidth=1.2, linestyle=(0, (4, 3)), label=plain(label))
    for trace in drawing.traces:
        _draw_trace(axes, trace, colours[trace.colour], colours["ink"], plain)
    if any(mark.broken for trace in drawing.traces for mark in trace.marks):
        axes.plot([], [], "x", color=colours["soft"], markersize=6, markeredgewidth=2, label="broken level: no success")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=colours["ink"], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_trace(axes: Axes, trace: Trace, colour: str, ink: str, plain: Plain) -> None:
    if trace.joined:
        axes.plot([mark.x for mark in trace.marks], [mark.y for mark in trace.marks], color=colour, linewidth=1.2)
    for mark in trace.marks:
        axes.errorbar(
            mark.x, mark.y, yerr=_reach(mark.y, mark.y_limits), xerr=_reach(mark.x, mark.x_limits),
            fmt="x" if mark.broken else "o", color=colour, markersize=6 if mark.broken else 5,
            markeredgewidth=2 if mark.broken else 1, linewidth=1.6, clip_on=False,
        )  # fmt: skip
        several = list(mark.seeds.values()) if len(mark.seeds) > 1 else []
        axes.plot(
            [x for x, _ in several], [y for _, y in several], "o", markersize=3.2, markerfacecolor="none",
            markeredgecolor=colour, markeredgewidth=0.9, clip_on=False,
        )  # fmt: skip
        if mark.letter:
            told = f"{mark.letter} broken" if mark.broken else mark.letter
            beside: dict[str, Any] = (
                {"xytext": (-6, -6), "ha": "right", "va": "top"} if mark.broken else {"xytext": (5, 5)}
            )
            axes.annotate(told, (mark.x, mark.y), textcoords="offset points", color=ink, fontsize=8, **beside)
            axes.plot([], [], marker="", linestyle="", label=plain(f"{mark.letter}  {_named(mark)}"))
    if trace.label:
        axes.plot([], [], "o-" if trace.joined else "o", color=colour, markersize=5, label=plain(trace.label))


def _named(mark: Mark) -> str:
    return f"{mark.name} (broken)" if mark.broken else mark.name


def _reach(value: float, limits: Limits | None) -> list[list[float]] | None:
    """Limits as Matplotlib wants them: how far they reach to both sides."""
    return None if limits is None else [[max(0.0, value - limits[0])], [max(0.0, limits[1] - value)]]


def draw_heat(axes: Axes, drawing: Heat, colours: Mapping[str, str], plain: Plain) -> None:
    """Draws a heat map into axes that have its title; the numbers stand in the cells."""
    (row_word, rows), (column_word, columns) = drawing.rows, drawing.columns
    shades = LinearSegmentedColormap.from_list("shades", [colours["card"], colours["biased"]])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row, (values, texts) in enumerate(zip(drawing.values, drawing.texts, strict=True)):
        for column, (value, text) in enumerate(zip(values, texts, strict=True)):
            share = 0.0 if value is None else 0.4 * min(1.0, max(0.0, value / drawing.high))
            axes.fill_between(
                [column - 0.5, column + 0.5], row - 0.5, row + 0.5, color=shades(share), edgecolor=colours["line"],
                linewidth=0.8,
            )  # fmt: skip
            axes.text(column, row, plain(text), ha="center", va="center", color=colours["ink"], fontsize=8.5)
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns])
    axes.set_yticks(range(len(rows)), [plain(name) for name in rows])
    axes.set_xlabel(plain(column_word), color=colours["soft"])
    axes.set_ylabel(plain(row_word), color=colours["soft"])
