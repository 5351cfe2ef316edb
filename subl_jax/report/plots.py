"""The report's plots as inline SVG: rows of dots with intervals, bars, and line charts with or without intervals.

In: numbers and labels; `Intervals`, `Bars`, `Lines` and `Bands` are what `report.figures` writes to files too. Out: HTML
fragments without scripts or outside references. Positions are percentages and text stays HTML, so that a plot is as
readable at phone width as on a desk; colours come from the style sheet's properties. SVG by hand rather than by Matplotlib:
it follows the reader's theme, stays selectable, and weighs a few kilobytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

_ROW_HEIGHT = 30
# A mark's outline around its centre, for a size of 1.
MARKERS = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0z",
    "square": "M-.9-.9h1.8v1.8h-1.8z",
    "diamond": "M0-1.3L1.3 0L0 1.3L-1.3 0z",
}
# Beyond this ratio of the largest to the smallest value a linear axis shows the small ones as one line on its bottom.
_LOG_RATIO = 20.0
_MAX_POINTS = 240  # per line; more than the pixels of a chart carry no information


@dataclasses.dataclass(frozen=True)
class Dot:
    """One row of an interval plot.

    Attributes:
      label, detail: the row's name, and a smaller line under it.
      value, low, high: the estimate and its interval; None where nothing was measured.
      points: the estimate of each seed, seed -> value.
      colour: the name of a colour property of the style sheet.
      figure: the value in words at the row's end.
      marker: of `MARKERS`, so that rows are told apart without their colour.
      reference: somebody else's figure, drawn as a hollow diamond; None without one.
    """

    label: str
    detail: str
    value: float | None
    low: float | None
    high: float | None
    points: Mapping[int, float]
    colour: str
    figure: str
    marker: str = "circle"
    reference: float | None = None

    @property
    def interval(self) -> tuple[float, float, float] | None:
        """(estimate, low, high), where the row was measured."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return self.value, self.low, self.high


@dataclasses.dataclass(frozen=True)
class Key:
    """A line of a legend: a mark and what it means."""

    marker: str
    filled: bool
    colour: str
    words: str


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rows of dots with intervals over one axis.

    Attributes:
      name: of its files where it is exported.
      title: what is shown.
      dots: the rows.
      domain, ticks: of the axis.
      unit: of the axis, as short as "%" or "points".
      subtitle: a line under the title of a file; on a page the caption says it.
      keys: the legend, where marks differ in more than their row's name.
      reference: whose the dots' `reference` is, in one word.
    """

    name: str
    title: str
    dots: Sequence[Dot]
    domain: tuple[float, float]
    ticks: Sequence[float]
    unit: str
    subtitle: str = ""
    keys: Sequence[Key] = ()
    reference: str = ""

    @property
    def begins(self) -> list[bool]:
        """Whether each row is the first of its name; rows that follow under one name need not repeat it."""
        return [row == 0 or self.dots[row - 1].label != dot.label for row, dot in enumerate(self.dots)]


@dataclasses.dataclass(frozen=True)
class Bars:
    """Bars as shares of a whole.

    Attributes:
      name, title: as of `Intervals`.
      bars: (label, value, colour property).
      whole: the value of a full bar.
      unit: what is counted.
    """

    name: str
    title: str
    bars: Sequence[tuple[str, float, str]]
    whole: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart: its name in the legend, its points in order of x, its colour property, and its seed if any."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Lines:
    """A chart of lines over a common x axis; `name` and `title` as of `Intervals`."""

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "step"


@dataclasses.dataclass(frozen=True)
class Points:
    """Single points over two axes, one series per kind; for files alone. `name` and `title` as of `Intervals`.

    Attributes:
      series: points that share a colour; several may have one colour, and then differ in their marks.
      x_label, y_label: of the axes, with units.
    """

    name: str
    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str


@dataclasses.dataclass(frozen=True)
class Band:
    """One line of an interval chart.

    Attributes:
      label: of the legend.
      x, y: the measured points.
      limits: the interval of each point, None where it has none.
      singles: (x, y) of each replicate, drawn thin.
      colour: the name of a colour property of the style sheet.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    limits: Sequence[Sequence[float] | None]
    singles: Sequence[tuple[Sequence[float], Sequence[float]]]
    colour: str


@dataclasses.dataclass(frozen=True)
class Bands:
    """A chart of lines with their intervals, see `interval_chart`.

    Attributes:
      name, title: as of `Intervals`.
      bands: the lines; all values finite.
      x_label: under the x axis, which begins at zero.
      note: the caption.
      marked_x: where a dashed line stands.
    """

    name: str
    title: str
    bands: Sequence[Band]
    x_label: str
    note: str = ""
    marked_x: float | None = None

    @property
    def limits(self) -> list[float]:
        """Every end of an interval."""
        return [limit for band in self.bands for pair in band.limits if pair is not None for limit in pair]

    @property
    def values(self) -> list[float]:
        """Every value that is drawn, of means and of replicates.

        Raises:
          ValueError: there is none, or one is not finite.
        """
        found = [value for band in self.bands for value in band.y]
        found += [value for band in self.bands for _, values in band.singles for value in values]
        if not found or not all(map(math.isfinite, found)):
            raise ValueError(f"{self.title}: an interval chart needs finite values, got {found[:8]}")
        return found

    @property
    def logarithmic(self) -> bool:
        """Whether the y axis is: where the values span more than a factor of 20 and all are positive."""
        return min(self.values) > 0 and max(self.values) / min(self.values) > _LOG_RATIO

    @property
    def y_ticks(self) -> list[float]:
        """Round values that enclose everything; a logarithmic axis ends at the lowest value, intervals may reach below."""
        if self.logarithmic:
            return log_ticks(min(self.values), max([*self.values, *self.limits]))
        return nice_ticks(min([*self.values, *self.limits]), max([*self.values, *self.limits]))

    @property
    def end(self) -> float:
        """The end of the x axis."""
        return max(x for band in self.bands for x in band.x) or 1.0


def _share(value: float, domain: tuple[float, float]) -> float:
    """The position of a value in per cent of the plot's width."""
    low, high = domain
    return round(100 * (min(max(value, low), high) - low) / (high - low), 3)


def tick_label(value: float, domain: tuple[float, float]) -> str:
    """A tick of an axis; signed where the axis has two sides."""
    return f"{value:+g}" if domain[0] < 0 and value else f"{value:g}"


def interval_rows(plot: Intervals) -> str:
    """Horizontal dots with intervals, per-seed points as open circles beneath, and an axis at the end."""
    domain = plot.domain
    grid = "".join(
        f'<line x1="{_share(t, domain)}%" x2="{_share(t, domain)}%" y1="0" y2="{_ROW_HEIGHT}" '
        f'stroke="var(--{"soft" if t == 0 and domain[0] < 0 else "grid"})"/>'
        for t in plot.ticks
    )
    rows = "".join(
        _dot_row(dot, domain, grid, plot.reference, first) for dot, first in zip(plot.dots, plot.begins, strict=True)
    )
    labels = "".join(
        f'<text x="{_share(t, domain)}%" y="14" text-anchor="middle">{tick_label(t, domain)}</text>' for t in plot.ticks
    )
    return (
        f'{rows}<div class="row axis" aria-hidden="true"><div class="name"></div><div class="plot">'
        f'<svg width="100%" height="18">{labels}</svg></div><div class="figure note">{escape(plot.unit)}</div></div>'
        f"{_legend(plot.keys)}"
    )


def _mark(marker: str, filled: bool, colour: str, size: float) -> str:
    """A mark around the origin."""
    paint = (
        f'fill="var(--{colour})"' if filled else f'fill="none" stroke="var(--{colour})" stroke-width="{1.3 / size:.3g}"'
    )
    return f'<path d="{MARKERS[marker]}" transform="scale({size:g})" {paint}/>'


def _placed(mark: str, x: float, y: float) -> str:
    """A mark at a share of the plot's width; inside an SVG of its own, since paths know no per cent."""
    return f'<svg x="{x}%" y="{y:g}" width="1" height="1" overflow="visible">{mark}</svg>'


def _legend(keys: Sequence[Key]) -> str:
    items = "".join(
        f'<li><svg class="key" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f"{_mark(key.marker, key.filled, key.colour, 4.6 if key.filled else 3.6)}</svg>{escape(key.words)}</li>"
        for key in keys
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _dot_row(dot: Dot, domain: tuple[float, float], grid: str, reference: str, first: bool) -> str:
    colour = f"var(--{dot.colour})"
    shown = len(dot.points) > 1
    # With per-seed points below, the interval moves up a little to keep the two apart.
    y = 11 if shown else 15
    named = f"{dot.label} ({dot.detail})" if dot.detail else dot.label
    words, marks = f"{named}: {dot.figure}", ""
    if dot.interval is not None:
        value, low, high = dot.interval
        left, right, at = (_share(each, domain) for each in (low, high, value))
        seeds = f"; {', '.join(f'seed {seed}: {p:.1f}' for seed, p in dot.points.items())}" if shown else ""
        words = f"{named}: {value:.1f}, 95 % interval {low:.1f} to {high:.1f}{seeds}"
        marks = (
            f'<line x1="{left}%" x2="{right}%" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2.5"/>'
            f'<line x1="{left}%" x2="{left}%" y1="{y - 4}" y2="{y + 4}" stroke="{colour}" stroke-width="1.5"/>'
            f'<line x1="{right}%" x2="{right}%" y1="{y - 4}" y2="{y + 4}" stroke="{colour}" stroke-width="1.5"/>'
            f"{_placed(_mark(dot.marker, True, dot.colour, 5), at, y)}"
        )
        own = _mark(dot.marker, False, dot.colour, 3)
        marks += "".join(_placed(own, _share(p, domain), 22) for p in (dot.points.values() if shown else ()))
    if dot.reference is not None:
        words += f"; {reference}: {dot.reference:g}"
        marks += _placed(_mark("diamond", False, "ink", 3.6), _share(dot.reference, domain), y)
    name = escape(dot.label) if first else ""
    detail = f"<small>{escape(dot.detail)}</small>" if dot.detail else ""
    return (
        f'<div class="row{"" if first else " same"}"><div class="name">{name}{detail}</div><div class="plot">'
        f'<svg width="100%" height="{_ROW_HEIGHT}" role="img" aria-label="{escape(words)}">{grid}{marks}</svg></div>'
        f'<div class="figure">{escape(dot.figure)}</div></div>'
    )


def bar_rows(plot: Bars) -> str:
    """Horizontal bars, each with its count and its share of the whole."""
    rows = []
    for label, value, colour in plot.bars:
        width = _share(value, (0.0, max(plot.whole, 1.0)))
        rows.append(
            f'<div class="row"><div class="name">{escape(label)}</div><div class="plot">'
            f'<svg width="100%" height="18" role="img" aria-label="{escape(f"{label}: {value:g} of {plot.whole:g}")}">'
            f'<rect x="0" y="3" width="100%" height="12" rx="2" fill="var(--grid)"/>'
            f'<rect x="0" y="3" width="{width}%" height="12" rx="2" fill="var(--{colour})"/></svg></div>'
            f'<div class="figure">{value:g} ({width:.1f} %)</div></div>'
        )
    return "".join(rows)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """At least two round values whose ends enclose [low, high], about `count` steps apart."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"an axis needs finite limits, got {low} to {high}")
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * m for m in (1, 2, 2.5, 5, 10) if magnitude * m >= rough * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float], limit: int = _MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points of a line, the first and the last among them."""
    if len(x) <= limit:
        return list(x), list(y)
    kept = sorted({round(k * (len(x) - 1) / (limit - 1)) for k in range(limit)})
    return [x[k] for k in kept], [y[k] for k in kept]


def finite_lines(series: Sequence[Series]) -> list[Series]:
    """The lines without the points that are not finite, and without lines that then have none."""
    return [
        dataclasses.replace(line, x=[a for a, _ in pairs], y=[b for _, b in pairs])
        for line in series
        if (pairs := [(a, b) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(b)])
    ]


def line_chart(plot: Lines) -> str:
    """Lines over a common x axis; points that are not finite break off with a note, never with a false line."""
    title, series, x_label = plot.title, plot.series, plot.x_label
    finite = finite_lines(series)
    lost = sum(len(line.x) for line in series) - sum(len(line.x) for line in finite)
    note = f" {lost} values that are not finite are left out." if lost > 1 else ""
    note = " One value that is not finite is left out." if lost == 1 else note
    if not finite:
        return f'<figure><h3>{escape(title)}</h3><p class="note">No finite values.{note}</p></figure>'
    values = [b for line in finite for b in line.y]
    y_ticks = nice_ticks(min(values), max(values))
    steps = [a for line in finite for a in line.x]
    x_domain = (min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1)
    y_domain = (y_ticks[0], y_ticks[-1])
    grid = "".join(
        f'<line x1="0" x2="100" y1="{100 - _share(t, y_domain)}" y2="{100 - _share(t, y_domain)}" '
        'stroke="var(--grid)" vector-effect="non-scaling-stroke"/>'
        for t in y_ticks
    )
    lines = "".join(_polyline(line, x_domain, y_domain) for line in finite)
    labels = {line.label: line.colour for line in finite}
    legend = "".join(
        f'<li><span style="background: var(--{colour})"></span>{escape(label)}</li>' for label, colour in labels.items()
    )
    last = "; ".join(f"{line.label} ends at {line.y[-1]:.3g}" for line in finite)
    y_axis = "".join(f"<span>{t:g}</span>" for t in y_ticks)
    return (
        f'<figure><h3>{escape(title)}</h3><div class="chart"><div class="y" aria-hidden="true">{y_axis}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title} over {x_label}: {last}")}">{grid}{lines}</svg>'
        f'<div class="x" aria-hidden="true"><span>{x_domain[0]:g}</span><span>{escape(x_label)}</span>'
        f'<span>{x_domain[1]:g}</span></div></div><ul class="legend">{legend}</ul>'
        f"{f'<figcaption>{note.strip()}</figcaption>' if note else ''}</figure>"
    )


def _polyline(line: Series, x_domain: tuple[float, float], y_domain: tuple[float, float]) -> str:
    x, y = thin(line.x, line.y)
    if len(x) == 1:
        x, y = [x[0], x_domain[1]], [y[0], y[0]]
    points = " ".join(
        f"{_share(a, x_domain):g},{round(100 - _share(b, y_domain), 3):g}" for a, b in zip(x, y, strict=True)
    )
    return f'<polyline points="{points}" stroke="var(--{line.colour})"/>'


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5 in each decade (1 alone over many decades) whose ends enclose [low, high]; both positive."""
    if not 0 < low <= high < math.inf:
        raise ValueError(f"a logarithmic axis needs positive finite limits, got {low} to {high}")
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if high / low < 1e3 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    first = max(tick for tick in ticks if tick <= low)
    last = min(tick for tick in ticks if tick >= high and tick > first)
    return [tick for tick in ticks if first <= tick <= last]


def interval_chart(
    title: str, bands: Sequence[Band], x_label: str, note: str = "", marked_x: float | None = None, whole: bool = False
) -> str:
    """Lines with their intervals as shaded bands and single replicates as thin lines.

    The y axis is logarithmic where the values span more than a factor of 20 and all are positive; an interval that
    reaches below such an axis ends at its bottom, and the caption says so.

    Args:
      title, bands, x_label, note, marked_x: as of `Bands`.
      whole: ticks of the x axis are whole numbers only.

    Raises:
      ValueError: no line, or a value that is not finite.
    """
    drawing = Bands("", title, bands, x_label, note, marked_x)
    log, ticks, end = drawing.logarithmic, drawing.y_ticks, drawing.end
    if log:
        note += " Logarithmic axis."
        if min([*drawing.values, *drawing.limits]) < ticks[0]:
            note += " Intervals that reach below the axis end at its bottom."
    x_ticks = [tick for tick in nice_ticks(0.0, end) if tick <= end and not (whole and tick % 1)]
    scale = math.log10 if log else float
    y_domain, x_domain = (scale(ticks[0]), scale(ticks[-1])), (0.0, end)

    def at(x: float, y: float) -> str:
        up = _share(scale(max(y, ticks[0])), y_domain)
        return f"{_share(x, x_domain):g},{round(100 - up, 3):g}"

    grid = "".join(
        f'<line x1="0" x2="100" y1="{100 - _share(scale(t), y_domain):g}" y2="{100 - _share(scale(t), y_domain):g}" '
        'stroke="var(--grid)" vector-effect="non-scaling-stroke"/>'
        for t in ticks
    )
    if marked_x is not None:
        place = f"{_share(marked_x, x_domain):g}"
        grid += f'<line class="marked" x1="{place}" x2="{place}" y1="0" y2="100" vector-effect="non-scaling-stroke"/>'
    y_axis = "".join(f'<span style="bottom: {_share(scale(t), y_domain):g}%">{t:g}</span>' for t in ticks)
    x_axis = "".join(f'<span style="left: {_share(t, x_domain):g}%">{t:g}</span>' for t in x_ticks)
    legend = "".join(
        f'<li><span style="background: var(--{band.colour})"></span>{escape(band.label)}</li>' for band in bands
    )
    last = "; ".join(f"{band.label} ends at {band.y[-1]:.3g}" for band in bands)
    return (
        f'<figure><h3>{escape(title)}</h3><div class="chart"><div class="y placed" aria-hidden="true">{y_axis}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title} over {x_label}: {last}")}">{grid}{"".join(_band(band, at) for band in bands)}'
        f'</svg><div class="x placed" aria-hidden="true">{x_axis}</div>'
        f'<div class="x label" aria-hidden="true">{escape(x_label)}</div></div><ul class="legend">{legend}</ul>'
        f"{f'<figcaption>{escape(note.strip())}</figcaption>' if note.strip() else ''}</figure>"
    )


def _band(band: Band, at: Callable[[float, float], str]) -> str:
    """The shaded interval, the replicates, the line and its points, from back to front."""
    colour = f"var(--{band.colour})"
    known = [(x, pair) for x, pair in zip(band.x, band.limits, strict=True) if pair is not None]
    outline = [at(x, high) for x, (_, high) in known] + [at(x, low) for x, (low, _) in reversed(known)]
    shade = f'<polygon points="{" ".join(outline)}" fill="{colour}" class="band"/>' if known else ""
    singles = "".join(
        f'<polyline class="single" points="{" ".join(map(at, x, y))}" stroke="{colour}"/>' for x, y in band.singles
    )
    points = [at(x, y) for x, y in zip(band.x, band.y, strict=True)]
    # Lines of no length with round ends: circles would be stretched with the drawing.
    dots = "".join(f'<path class="dot" d="M{point}h0" stroke="{colour}"/>' for point in points)
    return f'{shade}{singles}<polyline class="mean" points="{" ".join(points)}" stroke="{colour}"/>{dots}'
