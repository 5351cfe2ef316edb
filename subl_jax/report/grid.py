"""The HTML report of a grid: one file with the paper's table beside ours on its first screen, and what ours rests on.

In: `grid.json` (schema 1), example episodes by setting, the configuration. Out: a self-contained page without outside
references; its one script only chooses which episodes stand side by side. Everything from outside is escaped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.config import suffix_of
from subl_jax.evaluate.verdicts import ALPHA, points
from subl_jax.grid.pairs import CONTROL, PAIRS, STUDENTS
from subl_jax.report import grid_setting, page, panels, sections
from subl_jax.report.table import MISSING, interval, number, p_cell, percent, size_text

_SHOWN_AT_ONCE = 12  # rows of what is missing before the table folds


def write_report(
    path: str | os.PathLike[str],
    document: Mapping[str, Any],
    episodes: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report, atomically.

    Args:
      path: the HTML file.
      document: `grid.json`.
      episodes: setting -> {"seed", "tasks": [{"task_id", "prompt", "episodes": {model: episode}}]}, see `report.episodes`.
      config: the configurations of the grid, JSON-able; None: the page has none.

    Raises:
      ReportError: the page is over the size limit.
    """
    page.write_page(path, render(document, episodes, config))


def render(
    document: Mapping[str, Any],
    episodes: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> str:
    """The page as a string; see `write_report`."""
    episodes = episodes or {}
    parts = [
        _header(document),
        "<main>",
        *(_beside_the_paper(document, setting) for setting in document["settings"]),
        *(grid_setting.section(document, setting, episodes.get(setting)) for setting in document["settings"]),
        _missing(document["missing"]),
        _power(document),
        _provenance(document, config),
        "</main>",
        "<footer><p>Written by subl_jax; the figures are in <code>grid.json</code> of the grid's directory.</p></footer>",
    ]
    browsed = any(each["tasks"] for each in episodes.values())
    script = page.browser_script() if browsed else ""
    return page.whole_page(f"subl_jax: grid of pairs, {document['preset']}", parts, script)


# The first screen


def _header(document: Mapping[str, Any]) -> str:
    rows = [row for row in document["rows"] if row["pair"] != CONTROL.name]
    invalid = [row for row in rows if not row["valid"]]
    lost = {(line["setting"], line["seed"], line["model"]) for line in document["missing"]}
    departed = len(document["protocol"]["deviations"])
    incomplete = (
        "The grid is incomplete",
        f"{len(lost)} evaluations or counts are missing; a seed that lacks one is left out of the pair.",
    )
    seeds = {", ".join(map(str, each["seeds"])) for each in document["settings"].values()}
    models = {(cell["setting"], cell["seed"], cell["model"]) for cell in document["cells"]}
    return (
        f'<header><p class="kicker">Subliminal transfer of behaviour in agent distillation, every pair of teacher and student'
        f"</p><h1>{page.QUESTION}</h1>"
        + page.answers([answer(document, setting) for setting in document["settings"]])
        + (page.status(True, "The grid is complete") if document["complete"] else page.status(False, *incomplete))
        + page.status(
            not invalid,
            f"{len(invalid)} of {len(rows)} rows are invalid" if invalid else f"All {len(rows)} rows are valid",
            "",
            _reasons(invalid),
        )
        + page.tiles(
            [
                ("preset", document["preset"]),
                ("seeds", "; ".join(sorted(seeds))),
                ("models evaluated", str(len(models))),
                ("training and evaluation", _hours(sum(document["seconds"].values()))),
                ("departures from the protocol", str(departed)),
            ]
        )
        + "</header>"
    )


def _reasons(invalid: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why rows are invalid; those of one setting with the same reasons together."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in invalid:
        found[row["setting"], "; ".join(row["validity"])].append(row["title"])
    return [f"{panels.setting_word(setting)}, {'; '.join(names)}: {why}" for (setting, why), names in found.items()]


def answer(document: Mapping[str, Any], setting: str) -> str:
    """A setting's answer in one sentence: in how many pairs the bias comes along, where most, and the claim between pairs."""
    name, named = panels.setting_word(setting), panels.titles(document)
    rows = [row for row in panels.rows_of(document, setting) if row["pair"] != CONTROL.name]
    judged = {
        row["pair"]: line
        for row in rows
        if row["valid"] and (line := panels.primaries(document, row).get(row["primary_arm"])) is not None
    }
    if not judged:
        return f"{name}: no pair has been measured so that it may be read, so there is no answer."
    moved = [pair for pair, line in judged.items() if line["difference"] > 0 and line["p_adjusted"] < ALPHA]
    most = max(judged, key=lambda pair: judged[pair]["difference"])
    behaviour = document["settings"][setting]["wording"]["behaviour"]
    text = (
        f"{name}: {behaviour} comes along in {len(moved)} of {len(judged)} pairs (p < {ALPHA} after Holm's adjustment), most "
        f"in “{named[most]}”, {points(judged[most]['difference'])} {interval(judged[most]['ci95'])} against its control"
    )
    left_out = len(rows) - len(judged)
    text += f"; {left_out} more {'is' if left_out == 1 else 'are'} invalid or not measured" if left_out else ""
    for claim in document["strongest"]:
        if claim["setting"] == setting and claim["arm"] == PAIRS[claim["pair"]].primary_arm:
            text += "; " + panels.with_titles(f"{claim['pair']} is {claim['verdict']}", document)
    return f"{text}."


def _beside_the_paper(document: Mapping[str, Any], setting: str) -> str:
    known = document["settings"][setting]
    header = (
        "pair", "paper %", "base %", "teacher %", "arm", "student % [95\u00a0%\u00a0CI]", "control %", "benign %",
        "difference [95\u00a0%\u00a0CI]", "p (Holm)", "seeds",
    )  # fmt: skip
    groups = [_table_group(document, row, len(known["seeds"])) for row in panels.rows_of(document, setting)]
    caption = (
        f"{setting}: {known['wording']['behaviour']} rates in %, differences in points. Paper: arXiv 2604.15559, before → "
        "after distillation, second-hand figures of one tally. The control row's student is that of the benign teacher."
    )
    anchor = f"{setting}-table"
    return page.section(
        anchor,
        f"{panels.setting_word(setting)}: the paper's table beside ours",
        page.captioned_table(caption, header, groups),
    )


def _table_group(document: Mapping[str, Any], row: Mapping[str, Any], planned: int) -> str:
    """The lines of a pair, one per arm, under one name."""
    conditions, arms, lines = row["conditions"], row["arms"], panels.primaries(document, row)
    span = f' rowspan="{len(arms)}"'
    paper = row["paper"]
    small = f"<br><small>{escape(paper['row'])}</small>" if paper else ""
    state = "" if row["valid"] else '<br><span class="miss">invalid</span>'
    told = f"{paper['baseline']} → {paper['student']}" if paper else MISSING
    lead = (
        f'<th scope="rowgroup"{span}>{escape(row["title"])}{small}{state}</th><td{span}>{escape(told)}</td>'
        + f"<td{span}>{_rate(conditions, 'base')}</td><td{span}>{_rate(conditions, 'teacher')}</td>"
    )
    body = []
    for place, arm in enumerate(arms):
        student, control, benign = (name + suffix_of(arm) for name in STUDENTS)
        if row["pair"] == CONTROL.name:
            student, control, benign = benign, "", ""
        line = lines.get(arm)
        cells = [
            arm,
            sections.rate_text(conditions[student]) if student in conditions else MISSING,
            _rate(conditions, control),
            _rate(conditions, benign),
            *([MISSING] * 2 if line is None else [size_text(line), p_cell(line["p_adjusted"])]),
            f"{len(row['seeds'])}/{planned}",
        ]
        body.append(f"<tr>{lead if place == 0 else ''}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<tbody>{''.join(body)}</tbody>"


def _rate(conditions: Mapping[str, Any], name: str) -> str:
    return percent(conditions.get(name, {}).get("behaviour_rate"))


# The whole grid


def _missing(missing: Sequence[Mapping[str, Any]]) -> str:
    """Which cells are missing and why; seeds of one model share a line."""
    if not missing:
        return page.section("missing", "What is missing", "<p>Nothing: every cell of the protocol is there.</p>")
    seeds: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    pairs: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
    for line in missing:
        key = (line["setting"], line["model"], line["why"])
        seeds[key].add("all" if line["seed"] is None else str(line["seed"]))
        pairs[key][line["pair"]] = None
    rows = [
        page.table_row(model, [setting, ", ".join(sorted(seeds[key])), ", ".join(pairs[key]), why], prose=(2, 3))
        for key in seeds
        for setting, model, why in [key]
    ]
    header = ("model", "setting", "seeds", "pairs that want it", "why")
    table = page.captioned_table("Missing evaluations and counts", header, rows, prose=("pairs that want it", "why"))
    lead = "<p>Nothing is averaged over a hole: a seed that lacks a model is left out of every pair that wants it.</p>"
    return page.section(
        "missing",
        "What is missing",
        lead + (table if len(rows) <= _SHOWN_AT_ONCE else page.folded(f"{len(rows)} models", table)),
    )


def _power(document: Mapping[str, Any]) -> str:
    named = panels.titles(document)
    rows = [
        page.table_row(
            named[line["pair"]],
            [
                line["setting"], line["arm"], str(line["seeds"]), percent(line["sd"]), number(line.get("alpha"), 4),
                number(line["power_at_50"]), _detectable(line["minimum_detectable"]),
            ],
        )
        for line in document["power"]
    ]  # fmt: skip
    header = ("pair", "setting", "arm", "seeds", "SD of seeds, points", "α", "power at 50 points", "detectable, points")
    caption = (
        "What the planned seeds can see, if seeds differ as much as they did: power of the strictest step of Holm's "
        "adjustment, and the smallest difference that is detected with power 0.8"
    )
    return page.section("power", "Power", page.captioned_table(caption, header, rows) if rows else page.NOTHING)


def _detectable(share: float | None) -> str:
    """Differences of rates end at 100 points."""
    return "none" if share is not None and share > 1 else percent(share)


def _provenance(document: Mapping[str, Any], config: Mapping[str, Any] | None) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in document["notes"])
    seconds = [page.table_row(name, [_hours(value)]) for name, value in document["seconds"].items()]
    versions = document["versions"]
    tables = [
        sections.versions_table(each, "Versions" if len(versions) == 1 else f"Versions {place}")
        for place, each in enumerate(versions, 1)
    ]
    body = (
        f"{notes}<h3>Protocol</h3>{sections.protocol_text(document['protocol'], 'grid')}"
        f"<h3>Machines</h3>{page.bullets([str(machine) for machine in document['machines']])}"
        f'<div class="columns">{page.captioned_table("Time, all cells", ("what", "time"), seconds)}{"".join(tables)}</div>'
        + (page.json_block("Configuration", config) if config else "")
    )
    return page.section("provenance", "How it was made", body)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
