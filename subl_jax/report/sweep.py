"""The HTML report of a sweep: its answer, its plot, its tables, the missing cells, and how it was made.

In: `sweep.json` (schema 1) and the reference configuration. Out: one self-contained page without scripts and outside
references. Everything from outside is escaped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.report import charts, page, plots, sections, sweep_table
from subl_jax.report.sweep_drawings import drawings, level_name
from subl_jax.report.table import MISSING, interval, number, p_cell, percent, size_text

__all__ = ["drawings", "render", "write_report"]
Document = Mapping[str, Any]
_NBSP = "\u00a0"


def write_report(path: str | os.PathLike[str], document: Document, config: Mapping[str, Any] | None = None) -> None:
    """Writes the page, atomically; `config`: the reference configuration, JSON-able.

    Raises:
      ReportError: the page is over the size limit.
    """
    page.write_page(path, render(document, config))


def render(document: Document, config: Mapping[str, Any] | None = None) -> str:
    """The page as a string; see `write_report`."""
    found = drawings(document)
    parts = [
        _header(document),
        "<main>",
        _plots(document, found),
        _transfer(document),
        _able(document),
        _against(document),
        _defences(document),
        _missing(document),
        _provenance(document, config),
        "</main>",
        "<footer><p>Written by subl_jax; the figures are in <code>sweep.json</code> and <code>sweep.csv</code> beside this "
        "file.</p></footer>",
    ]
    return page.whole_page(
        f"subl_jax: {document['sweep']['name']}, {document['setting']}", [part for part in parts if part]
    )


def _header(document: Document) -> str:
    broken = [line for line in document["levels"] if line["broken"]]
    reasons = [f"{line['label']}: {'; '.join(line['broken'])}" for line in broken]
    holes = len(document["missing"])
    kicker = f"Sweep: {document['sweep']['name'].replace('_', ' ')}, {document['setting']} setting"
    return (
        "<header>" + f'<p class="kicker">{escape(kicker)}</p><h1>{escape(document["sweep"]["title"])}</h1>'
        + page.answers([document["answer"]])
        + (
            page.status(True, "Every cell is there")
            if document["complete"]
            else page.status(False, "The sweep is incomplete", f"Missing cells: {holes}; see “What is missing”.")
        )
        + (page.status(False, f"{len(broken)} of {len(document['levels'])} levels are broken", "", reasons) if broken else "")
        + page.tiles(
            [
                ("preset", document["preset"]),
                ("levels", str(len(document["levels"]))),
                ("reference level", document["sweep"]["reference"]),
                ("seeds", ", ".join(map(str, document["seeds"]))),
                ("training and evaluation", _hours(sum(document["seconds"].values()))),
            ]
        )
        + "</header>"
    )  # fmt: skip


def _plots(document: Document, found: Sequence[Any]) -> str:
    body = []
    for drawing in found:
        if isinstance(drawing, charts.Chart):
            body.append(charts.chart(drawing))
        elif isinstance(drawing, charts.Heat):
            body.append(charts.heat_table(drawing))
        elif isinstance(drawing, plots.Intervals):
            heading = f"<h3>{escape(drawing.title)}</h3>"
            caption = "Dots and bars: means with 95 % intervals; circles: single seeds."
            if len(document["seeds"]) == 1:
                caption = "One seed: intervals hold within this one run."
            body.append(sections.interval_figure(drawing, caption, heading=heading))
    return page.section("plots", "What happens along the levels", "".join(body) or page.NOTHING)


def _transfer(document: Document) -> str:
    header = (
        "level", "verdict", f"student % [95{_NBSP}%{_NBSP}CI]", "control %", "benign %",
        f"student − control, points [95{_NBSP}%{_NBSP}CI]", "p (Holm)", "student − benign, points", "log-odds contrast, nats",
        "seeds",
    )  # fmt: skip
    rows = []
    for line in document["levels"]:
        conditions, lines = line["conditions"], line["contrasts"]
        name, detail = level_name(line), "reference" if line["reference"] else ""
        if not conditions:
            rows.append(page.table_row(name, [line["verdict"]["word"], *[MISSING] * 7, f"0/{len(document['seeds'])}"],
                                       detail=detail))  # fmt: skip
            continue
        student, control, benign = line["students"].values()
        cells = [
            line["verdict"]["word"],
            sections.rate_text(conditions[student]),
            percent(conditions[control]["behaviour_rate"]),
            percent(conditions[benign]["behaviour_rate"]),
            size_text(lines["primary"]),
            p_cell(lines["primary"]["p_adjusted"]),
            size_text(lines["benign"]) if "benign" in lines else MISSING,
            size_text(lines["log_odds"]) if "log_odds" in lines else MISSING,
            f"{len(line['seeds'])}/{len(document['seeds'])}",
        ]
        rows.append(page.table_row(name, cells, detail=detail))
    methods = dict.fromkeys(
        line["contrasts"]["primary"]["method"] for line in document["levels"] if "primary" in line["contrasts"]
    )
    lead = (
        "<p>Transfer is student minus its own control student: distilled alike, from a teacher with the counter-bias. It must "
        "agree in sign with student minus benign student. p is adjusted over the levels (Holm); a level that is missing counts "
        f"as p = 1. {escape('; '.join(methods).capitalize())}.</p>"
    )
    caption = f"{document['wording']['behaviour'].capitalize()} rates and contrasts by level"
    return page.section("transfer", "Transfer by level", lead + page.captioned_table(caption, header, rows))


def _able(document: Document) -> str:
    header = (
        "level", "utility of student", "of control", "of base", "unparseable %", "of control, %", "KL from teacher, nats",
        "‖Δθ‖", "trajectories", "keywords left by the filter",
    )  # fmt: skip
    rows = []
    for line in document["levels"]:
        conditions = line["conditions"]
        if not conditions:
            rows.append(page.table_row(level_name(line), [MISSING] * 9))
            continue
        student, control, _ = (conditions[name] for name in line["students"].values())
        cells = [
            number(student["utility"]),
            number(control["utility"]),
            number(conditions["base"]["utility"]),
            percent(student["unparseable"]),
            percent(control["unparseable"]),
            number(student.get("divergence_from_teacher"), 4),
            number(student.get("delta_norm")),
            number(line["training"].get("documents"), 0),
            MISSING if line["leaks"] is None else str(line["leaks"]),
        ]
        rows.append(page.table_row(level_name(line), cells))
    lead = (
        "<p>More biased is not more broken, and less biased may be just that. A level is broken where its student or its "
        "control lost more utility than the protocol's margin, or is unparseable above its bar.</p>"
    )
    return page.section(
        "able", "Is it still able?", lead + page.captioned_table("Utility, parsing and distance by level", header, rows)
    )


def _against(document: Document) -> str:
    by_level: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for line in document["differences"]:
        by_level[line["level"], line["against"]][line["measure"]] = line
    header = (
        "level", "against", f"contrast, points [95{_NBSP}%{_NBSP}CI]", "p", "p (Holm)", "log-odds contrast, nats",
        "student's rate, points", "student's utility, points",
    )  # fmt: skip
    rows = []
    names = {line["label"]: level_name(line) for line in document["levels"]}
    for (level, against), measures in by_level.items():
        first = measures.get("behaviour")
        if first is None:
            continue
        cells = [
            names[against],
            sweep_table.difference_text(first),
            *(MISSING if first[name] is None else p_cell(first[name]) for name in ("p_value", "p_adjusted")),
            *(
                sweep_table.difference_text(measures[name]) if name in measures else MISSING
                for name in ("log_odds", "student", "utility")
            ),
        ]
        rows.append(page.table_row(names[level], cells, prose=(0,)))
    if not rows:
        return page.section("against", "Levels against each other", page.NOTHING)
    methods = dict.fromkeys(line["method"] for line in document["differences"] if line["measure"] == "behaviour")
    lead = (
        "<p>Each level minus the one that it is compared with, paired by seed; p of the first column, adjusted over the levels "
        f"(Holm). {escape('; '.join(methods).capitalize())}.</p>"
    )
    table = page.captioned_table("Differences between levels", header, rows, prose=("against",))
    return page.section("against", "Levels against each other", lead + table)


def _defences(document: Document) -> str:
    if not document["defences"]:
        return ""
    header = ("defence", "state", f"transfer removed, points [95{_NBSP}%{_NBSP}CI]", "of the undefended, %",
              f"utility lost, points [95{_NBSP}%{_NBSP}CI]")  # fmt: skip
    rows = [
        page.table_row(
            row["level"],
            [
                "broken: no success" if row["broken"] else "able",
                _sized(row["removed"], row["removed_ci95"]),
                percent(row["removed_share"], 0),
                _sized(row["utility_lost"], row["utility_lost_ci95"]),
            ],
            prose=(0,),
        )
        for row in document["defences"]
    ]
    lead = (
        "<p>Against the undefended student, paired by seed. The share takes the undefended contrast as it was measured and has "
        "no interval of its own; it is left out where that contrast is not above zero.</p>"
    )
    table = page.captioned_table("Transfer removed and utility lost by defence", header, rows, prose=("state",))
    return page.section("defences", "What each defence removes, and what it costs", lead + table)


def _sized(value: float, limits: Sequence[float] | None) -> str:
    return f"{100 * value:+.1f}" + ("" if limits is None else f" {interval(limits)}")


def _missing(document: Document) -> str:
    if not document["missing"]:
        return page.section("missing", "What is missing", "<p>Nothing: every cell of every level is there.</p>")
    rows = [
        page.table_row(line["level"], [str(line["seed"]), line["model"], line["why"]], prose=(1, 2))
        for line in document["missing"]
    ]
    header = ("level", "seed", "model", "why")
    lead = "<p>Nothing is averaged over a hole: a seed that lacks a model is left out of every level that wants it.</p>"
    table = page.captioned_table("Missing evaluations", header, rows, prose=("model", "why"))
    return page.section("missing", "What is missing", lead + table)


def _provenance(document: Document, config: Mapping[str, Any] | None) -> str:
    rows = []
    for line in document["levels"]:
        changed = ", ".join(f"{field}={value}" for field, value in line["overrides"].items()) or "nothing"
        cells = [changed, line["pair"], line["arm"], line["models"][line["students"]["student"]], line["protocol"]]
        rows.append(page.table_row(line["label"], cells, prose=(0, 3)))
    header = ("level", "changed", "pair", "arm", "its student's cell", "protocol")
    levels = page.captioned_table("What each level is", header, rows, prose=("changed", "its student's cell"))
    seconds = [page.table_row(name, [_hours(value)]) for name, value in document["seconds"].items()]
    versions = [
        sections.versions_table(each, "Versions" if len(document["versions"]) == 1 else f"Versions {place}")
        for place, each in enumerate(document["versions"], 1)
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in document["notes"])
    departed = dict.fromkeys(text for line in document["levels"] for text in line["deviations"])
    body = (
        f"{notes}{levels}"
        + (f"<p>Departures from the protocols:</p>{page.bullets(list(departed))}" if departed else "")
        + f"<h3>Machines</h3>{page.bullets([str(machine) for machine in document['machines']])}"
        f'<div class="columns">{page.captioned_table("Time, all cells", ("what", "time"), seconds)}{"".join(versions)}</div>'
        + (page.json_block("Reference configuration", config) if config else "")
    )
    return page.section("provenance", "How it was made", body)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
