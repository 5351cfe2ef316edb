"""The drawings of a sweep: rates along an axis, contrasts by level, a heat map of two axes, the chart of defences.

`sweep.json` (schema 1) in, drawings (`report.plots`, `report.charts`) out: `report.sweep` shows them and `report.figures`
writes them to files. A broken level is marked as broken in every one, in shape and in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.evaluate.protocol import Targets
from subl_jax.report import charts, plots, sections
from subl_jax.report.charts import Chart, Heat, Mark, Trace
from subl_jax.report.table import size_text

LINEAGES = {"student": "biased", "control": "control", "benign": "benign"}
_WORDS = {"student": "student", "control": "control student", "benign": "benign student"}
# How far lineages stand apart at one level, as a share of the axis, so that their intervals do not cover each other.
_APART = 0.012

Document = Mapping[str, Any]
Line = Mapping[str, Any]
Drawing = plots.Intervals | Chart | Heat


def drawings(document: Document) -> list[Drawing]:
    """Every figure of the report; the first is the sweep's one plot."""
    if not measured(document):
        return []
    found: list[Drawing] = []
    numeric = document["sweep"]["numeric"]
    if len(numeric) == 2:
        found += [heat(document)]
    elif numeric[0]:
        found += [along(document, "behaviour_rate", "rates", f"{document['wording']['behaviour']} rate by level")]
        found += [along(document, "utility", "utility", "utility on safe tasks by level")]
    else:
        found += [dots(document)]
    found.append(contrasts(document))
    if document["defences"]:
        found.insert(0, defences(document))
    return found


def measured(document: Document) -> list[Line]:
    """The levels that have been measured, in order."""
    return [line for line in document["levels"] if line["conditions"]]


def level_name(line: Line) -> str:
    """A level's name in a drawing, with what must not be overlooked."""
    return f"{line['label']}: broken" if line["broken"] else line["label"]


def axis_word(axis: str) -> str:
    """An axis for readers; fields are dotted."""
    return axis.replace(".", " ").replace("_", " ")


def _shared(document: Document, condition: str) -> Mapping[str, Any] | None:
    """A model that is one for all levels, over the most seeds that a level has; None where levels have their own."""
    lines = measured(document)
    if len({line["models"][condition] for line in lines}) > 1:
        return None
    return max(lines, key=lambda line: len(line["seeds"]))["conditions"][condition]


# --- One axis -----------------------------------------------------------------------------------------------------------


def along(document: Document, figure: str, name: str, title: str) -> Chart:
    """A figure of student, control and benign student over an axis of numbers; base and teacher as lines across."""
    lines = measured(document)
    axis, places = charts.level_axis(axis_word(document["sweep"]["axes"][0]), [line["at"][0] for line in lines])
    width = axis.domain[1] - axis.domain[0]
    traces, rules = [], []
    for shift, (role, colour) in zip((-_APART, 0.0, _APART), LINEAGES.items(), strict=True):
        marks = []
        for line, place in zip(lines, places, strict=True):
            values, x = line["conditions"][line["students"][role]], place + shift * width
            limits = values["ci95"] if figure == "behaviour_rate" else None
            marks.append(
                Mark(
                    line["label"], x, 100 * values[figure],
                    y_limits=None if limits is None else (100 * limits[0], 100 * limits[1]),
                    seeds={each["seed"]: (x, 100 * each[figure]) for each in values["per_seed"]},
                    broken=bool(line["broken"]),
                )
            )  # fmt: skip
        traces.append(Trace(_WORDS[role], colour, marks))
    for condition, colour in (("base", "base"), ("teacher", "positive")):
        if (values := _shared(document, condition)) is not None:
            rules.append((f"{condition}, all levels", 100 * values[figure], colour))
    several = len(document["seeds"]) > 1
    note = "Dots: means over seeds; circles: single seeds. " if several else "One seed. "
    if figure == "behaviour_rate":
        note += "Bars: 95 % intervals, over seeds." if several else "Bars: 95 % intervals within this run."
    return Chart(name, f"{title[0].upper()}{title[1:]}, %", traces, axis, charts.SHARES, rules, note)


def dots(document: Document) -> plots.Intervals:
    """Rates of student, control and benign student of every level in rows; base and teacher first where they are shared."""
    lines = measured(document)
    found: dict[tuple[str, str], tuple[Mapping[str, Any], str]] = {}
    for condition, colour in (("base", "base"), ("teacher", "positive")):
        if (values := _shared(document, condition)) is not None:
            found[condition, "all levels"] = (values, colour)
    for line in lines:
        for role, colour in LINEAGES.items():
            found[level_name(line), _WORDS[role]] = (line["conditions"][line["students"][role]], colour)
    rows = [
        plots.Dot(
            label, detail, 100 * values["behaviour_rate"], 100 * values["ci95"][0], 100 * values["ci95"][1],
            {each["seed"]: 100 * each["behaviour_rate"] for each in values["per_seed"]}, colour,
            sections.rate_text(values),
        )
        for (label, detail), (values, colour) in found.items()
    ]  # fmt: skip
    title = f"{document['wording']['behaviour']} rate by level"
    return plots.Intervals("rates", f"{title[0].upper()}{title[1:]}", rows, (0.0, 100.0), (0, 25, 50, 75, 100), "%")


def contrasts(document: Document) -> plots.Intervals:
    """Student minus control student at every level, and minus benign student beneath."""
    rows = []
    for line in measured(document):
        for name, detail, colour in (("primary", "minus control", "biased"), ("benign", "minus benign", "benign")):
            if name in line["contrasts"]:
                shown = "base" if line["broken"] else colour  # a broken level's colour says nothing of its lineage
                rows.append(sections.contrast_dot(line["contrasts"][name], level_name(line), detail, shown))
    return sections.differences("contrasts", "Student minus its matched controls, by level", rows)


# --- Two axes -----------------------------------------------------------------------------------------------------------


def heat(document: Document) -> Heat:
    """The contrast with the control at every combination, in points; levels that are missing or broken say so."""
    by_place = {tuple(line["at"]): line for line in document["levels"]}
    row_word, column_word = map(axis_word, document["sweep"]["axes"])
    rows = list(dict.fromkeys(row for row, _ in by_place))
    columns = list(dict.fromkeys(column for _, column in by_place))
    found = [[by_place.get((row, column)) for column in columns] for row in rows]
    values = [[_shown(line) for line in each] for each in found]
    texts = [[_cell(line) for line in each] for each in found]
    high = max([100.0 * value for each in values for value in each if value is not None], default=1.0)
    scaled = [[None if value is None else 100 * value for value in each] for each in values]
    return Heat(
        "contrasts-map", "Student minus control student in points [95 % interval]", (row_word, [_tick(r) for r in rows]),
        (column_word, [_tick(c) for c in columns]), scaled, texts, max(high, 1.0), "points",
    )  # fmt: skip


def _tick(place: Any) -> str:
    return place if isinstance(place, str) else f"{place:g}"


def _shown(line: Line | None) -> float | None:
    """A contrast that may be shaded: one that was measured on a level that is not broken."""
    if line is None or line["broken"] or "primary" not in line["contrasts"]:
        return None
    return line["contrasts"]["primary"]["difference"]


def _cell(line: Line | None) -> str:
    if line is None:
        return "no level"
    if "primary" not in line["contrasts"]:
        return "missing"
    told = size_text(line["contrasts"]["primary"])
    return f"✕ broken {told}" if line["broken"] else told


# --- Defences -----------------------------------------------------------------------------------------------------------


def defences(document: Document) -> Chart:
    """Transfer removed against utility lost, both in points against the undefended student, with intervals."""
    rows = document["defences"]
    against = next(line["against"] for line in document["differences"] if line["level"] == rows[0]["level"])
    letters = {row["level"]: letter for row, letter in zip(rows, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False)}
    whole, broken = ([row for row in rows if row["broken"] is kind] for kind in (False, True))

    def marks(of: Sequence[Mapping[str, Any]]) -> list[Mark]:
        return [
            Mark(
                row["level"], 100 * row["utility_lost"], 100 * row["removed"],
                _points(row["utility_lost_ci95"]), _points(row["removed_ci95"]),
                broken=row["broken"], letter=letters.get(row["level"]) or row["level"],
            )
            for row in of
        ]  # fmt: skip

    every = [value for row in rows for value in (row["removed"], *(row["removed_ci95"] or ()))]
    # At least as wide as what counts as broken: noise of a point or two is not to look like a spread.
    bar = Targets().utility_margin
    costs = [-bar, bar] + [value for row in rows for value in (row["utility_lost"], *(row["utility_lost_ci95"] or ()))]
    return Chart(
        "defences",
        f"Transfer removed against utility lost, compared with “{against}”",
        [Trace("", "control", marks(whole), joined=False), Trace("", "base", marks(broken), joined=False)],
        charts.points_axis("utility lost, points (right: costs more)", [100 * value for value in costs]),
        charts.points_axis("transfer removed, points (up: removes more)", [100 * value for value in every]),
        note="Upper left is what a defence should reach: nothing lost, all removed. Bars: 95 % intervals over paired seeds, "
        "where there are several. A defence that breaks the student removes nothing that could be told.",
    )


def _points(limits: Sequence[float] | None) -> tuple[float, float] | None:
    return None if limits is None else (100 * limits[0], 100 * limits[1])
