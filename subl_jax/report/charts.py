"""Points in a plane with intervals both ways, and tables of shaded numbers: what a sweep over numbers, or over two axes, is.

In: numbers and labels (`Chart`, `Heat`; `report.figures` writes them to files too). Out: HTML fragments without scripts or
outside references. All positions are shares of the drawing's width and height, so that marks keep their shape at any size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape

from subl_jax.report.plots import log_ticks, nice_ticks

Limits = tuple[float, float]
# Values that span more than a decade stand on a logarithmic axis.
_DECADE = 10.0
# Behind the last number of an axis stands its word (`all`), this share of the axis further on.
_BEHIND = 0.18


@dataclasses.dataclass(frozen=True)
class Mark:
    """One point.

    Attributes:
      name: of the level, in full.
      x, y: where it stands.
      x_limits, y_limits: its intervals; None: it has none.
      seeds: seed -> (x, y).
      broken: drawn as a cross, and said so: its place is not to be read as a success.
      letter: written beside it.
    """

    name: str
    x: float
    y: float
    x_limits: Limits | None = None
    y_limits: Limits | None = None
    seeds: Mapping[int, Limits] = dataclasses.field(default_factory=dict)
    broken: bool = False
    letter: str = ""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Points of one kind: the legend's word, a colour property of the style sheet, whether a line joins them."""

    label: str
    colour: str
    marks: Sequence[Mark]
    joined: bool = True


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
      label: what it shows, with its unit.
      domain: its ends.
      ticks: where they stand, and what they say.
      signed: whether zero divides it into two sides, and has a line.
    """

    label: str
    domain: Limits
    ticks: Sequence[tuple[float, str]]
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Points in a plane.

    Attributes:
      name: of its files where it is exported.
      title: what is shown.
      traces: the points.
      x, y: the axes.
      rules: horizontal lines (label, height, colour property).
      note: the caption.
    """

    name: str
    title: str
    traces: Sequence[Trace]
    x: Axis
    y: Axis
    rules: Sequence[tuple[str, float, str]] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Heat:
    """A table of numbers, shaded by their size.

    Attributes:
      name, title: as of `Chart`.
      rows, columns: (what varies, the values).
      values: [row][column], None where nothing was measured.
      texts: what stands in each cell; more than a number where it is broken or missing.
      high: the value of the darkest shade; unit: of the values.
    """

    name: str
    title: str
    rows: tuple[str, Sequence[str]]
    columns: tuple[str, Sequence[str]]
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]
    high: float
    unit: str


# --- Axes ---------------------------------------------------------------------------------------------------------------


def level_axis(label: str, places: Sequence[float | str]) -> tuple[Axis, list[float]]:
    """An axis on which levels stand, and where each of them does.

    Numbers that span more than a decade, all positive, are placed by their logarithm. A word stands behind the numbers.
    """
    numbers = [place for place in places if not isinstance(place, str)]
    log = min(numbers) > 0 and max(numbers) / min(numbers) > _DECADE
    at = [math.log10(number) if log else float(number) for number in numbers]
    low, high = min(at), max(at)
    width = (high - low) or 1.0
    words = [place for place in places if isinstance(place, str)]
    ends = {word: high + _BEHIND * width * place for place, word in enumerate(words, 1)}
    found = [ends[place] if isinstance(place, str) else at[numbers.index(place)] for place in places]
    ticks = dict(zip(found, (f"{place:g}" if not isinstance(place, str) else place for place in places), strict=True))
    shown = list(ticks.items())
    if len(shown) > 8:  # they would overlap on a phone
        round_numbers = log_ticks(min(numbers), max(numbers)) if log else nice_ticks(low, high)
        shown = [
            (math.log10(tick) if log else tick, f"{tick:g}")
            for tick in round_numbers
            if min(numbers) <= tick <= max(numbers)
        ] + [(end, word) for word, end in ends.items()]
    pad = 0.06 * (max(found) - low or 1.0)
    told = f"{label}, logarithmic" if log else label
    return Axis(told, (low - pad, max(found) + pad), shown), found


def points_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis of two sides that holds all values and zero."""
    ticks = nice_ticks(min(0.0, *values), max(0.0, *values))
    texts = [(tick, f"{tick:+g}" if tick else "0") for tick in ticks]
    return Axis(label, (ticks[0], ticks[-1]), texts, signed=True)


SHARES = Axis("%", (0.0, 100.0), [(tick, f"{tick:g}") for tick in (0.0, 25.0, 50.0, 75.0, 100.0)])


# --- HTML ---------------------------------------------------------------------------------------------------------------


def _share(value: float, domain: Limits) -> float:
    low, high = domain
    return round(100 * (min(max(value, low), high) - low) / (high - low), 3)


def chart(drawing: Chart) -> str:
    """The chart as a figure: axes, marks, a legend, and all of it in words for who cannot see it."""
    x, y = drawing.x, drawing.y
    grid = "".join(
        f'<line x1="0" x2="100%" y1="{100 - _share(tick, y.domain):g}%" y2="{100 - _share(tick, y.domain):g}%" '
        f'stroke="var(--{"soft" if tick == 0 and y.signed else "grid"})"/>'
        for tick, _ in y.ticks
    )
    if x.signed:
        place = f"{_share(0, x.domain):g}%"
        grid += f'<line x1="{place}" x2="{place}" y1="0" y2="100%" stroke="var(--soft)"/>'
    for _, height, colour in drawing.rules:
        up = f"{100 - _share(height, y.domain):g}%"
        grid += f'<line class="rule" x1="0" x2="100%" y1="{up}" y2="{up}" stroke="var(--{colour})"/>'
    marks = "".join(_trace(trace, drawing) for trace in drawing.traces)
    y_axis = "".join(
        f'<span style="bottom: {_share(tick, y.domain):g}%">{escape(text)}</span>' for tick, text in y.ticks
    )
    x_axis = "".join(f'<span style="left: {_share(tick, x.domain):g}%">{escape(text)}</span>' for tick, text in x.ticks)
    legend = "".join(
        f'<li><span style="background: var(--{trace.colour})"></span>{escape(trace.label)}</li>'
        for trace in drawing.traces
        if trace.label
    )
    legend += "".join(
        f'<li><span class="dashed" style="border-color: var(--{colour})"></span>{escape(label)}</li>'
        for label, _, colour in drawing.rules
    )
    letters = {mark.letter: mark for trace in drawing.traces for mark in trace.marks if mark.letter}
    legend += "".join(
        f"<li><b>{escape(letter)}</b> {escape(mark.name)}{', broken' if mark.broken else ''}</li>"
        for letter, mark in letters.items()
    )
    if any(mark.broken for trace in drawing.traces for mark in trace.marks):
        legend += '<li><span class="cross" aria-hidden="true">✕</span>broken level: not to be read as a success</li>'
    upward = "" if y is SHARES else f'<p class="note">Upwards: {escape(y.label)}</p>'
    return (
        f"<figure><h3>{escape(drawing.title)}</h3>{upward}"
        f'<div class="chart tall"><div class="y placed" aria-hidden="true">{y_axis}</div>'
        f'<svg role="img" aria-label="{escape(in_words(drawing))}">{grid}{marks}</svg>'
        f'<div class="x placed" aria-hidden="true">{x_axis}</div>'
        f'<div class="x label" aria-hidden="true">{escape(x.label)}</div></div><ul class="legend">{legend}</ul>'
        f"{f'<figcaption>{escape(drawing.note)}</figcaption>' if drawing.note else ''}</figure>"
    )


def in_words(drawing: Chart) -> str:
    """What a chart shows, mark by mark."""
    told = []
    for trace in drawing.traces:
        marks = [
            f"{mark.name}{' (broken)' if mark.broken else ''} {mark.y:.1f}"
            + ("" if mark.y_limits is None else f" [{mark.y_limits[0]:.1f}, {mark.y_limits[1]:.1f}]")
            + ("" if mark.x_limits is None else f" at {mark.x:.1f} [{mark.x_limits[0]:.1f}, {mark.x_limits[1]:.1f}]")
            for mark in trace.marks
        ]
        told.append(f"{trace.label or drawing.y.label}: {', '.join(marks)}")
    told += [f"{label} at {height:.1f}" for label, height, _ in drawing.rules]
    return f"{drawing.title}. {'; '.join(told)}"


def _trace(trace: Trace, drawing: Chart) -> str:
    """A trace's line, intervals, seeds and marks, from back to front."""
    colour = f"var(--{trace.colour})"

    def at(x: float, y: float) -> tuple[str, str]:
        return f"{_share(x, drawing.x.domain):g}%", f"{100 - _share(y, drawing.y.domain):g}%"

    def line(first: Limits, second: Limits, width: float) -> str:
        (x1, y1), (x2, y2) = at(*first), at(*second)
        return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>'

    parts = []
    pairs = zip(trace.marks, trace.marks[1:], strict=False) if trace.joined else ()
    parts += [line((first.x, first.y), (second.x, second.y), 1.6) for first, second in pairs]
    for mark in trace.marks:
        if mark.y_limits is not None:
            parts.append(line((mark.x, mark.y_limits[0]), (mark.x, mark.y_limits[1]), 2))
        if mark.x_limits is not None:
            parts.append(line((mark.x_limits[0], mark.y), (mark.x_limits[1], mark.y), 2))
        for x, y in mark.seeds.values() if len(mark.seeds) > 1 else ():
            left, up = at(x, y)
            parts.append(f'<circle cx="{left}" cy="{up}" r="2.6" fill="none" stroke="{colour}" stroke-width="1.1"/>')
        place = at(mark.x, mark.y)
        if mark.broken:
            shape = f'<path d="M-5-5L5 5M-5 5L5-5" stroke="{colour}" stroke-width="2.6" fill="none"/>'
        else:
            shape = f'<circle r="4.6" fill="{colour}"/>'
        # Near the right edge a letter stands on the left, where there is room; a broken mark's below, out of others' way.
        right, up = _share(mark.x, drawing.x.domain) > 80 or mark.broken, 15 if mark.broken else -7
        told = f"{mark.letter} broken" if mark.letter and mark.broken else mark.letter
        text = (
            f'<text x="{-9 if right else 9}" y="{up}" text-anchor="{"end" if right else "start"}">{escape(told)}</text>'
        )
        parts.append(f'<svg x="{place[0]}" y="{place[1]}">{shape}{text if told else ""}</svg>')
    return "".join(parts)


def heat_table(drawing: Heat) -> str:
    """The table; every cell says its number, and the shade only repeats it."""
    (row_word, rows), (column_word, columns) = drawing.rows, drawing.columns
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f"<td{_shade(value, drawing.high)}>{escape(text)}</td>" for value, text in zip(values, texts, strict=True)
        )
        + "</tr>"
        for name, values, texts in zip(rows, drawing.values, drawing.texts, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(drawing.title)}"><table class="heat">'
        f'<caption><span>{escape(drawing.title)}</span></caption><thead><tr><th scope="col">{escape(row_word)} \\ '
        f"{escape(column_word)}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _shade(value: float | None, high: float) -> str:
    """A shade of at most 40 %, on which the text keeps its contrast in both themes."""
    if value is None or value <= 0:
        return ""
    return f' style="background: color-mix(in srgb, var(--biased) {min(40.0, 40 * value / high):.0f}%, var(--card))"'
