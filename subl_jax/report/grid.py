"""The HTML report of a grid: one file with the paper's table beside ours on its first screen, and what ours rests on.

In: `grid.json` (schema 1), example episodes by setting, the configuration. Out: a self-contained page without outside
references; its one script only chooses which episodes stand side by side. Everything from outside is escaped.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.config import suffix_of
from subl_jax.evaluate.verdicts import ALPHA, points
from subl_jax.grid.pairs import CONTROL, PAIRS, STUDENTS
from subl_jax.report import grid_setting, page, panels, sections
from subl_jax.report.table import MISSING, counted, interval, number, p_over_seeds, percent, size_text

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
        *(_overview(document, setting) for setting in document["settings"]),
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
    run = [row for row in rows if row["state"] != "not run"]
    invalid = [row for row in run if row["state"] == "invalid"]
    valid = f"{len(invalid)} of {counted(len(run), 'row')} {'is' if len(invalid) == 1 else 'are'} invalid"
    if not invalid:
        valid = f"All {counted(len(run), 'row')} that were run are valid" if run else "No row has been run"
    departed = len(document["protocol"]["deviations"])
    seeds = {", ".join(map(str, each["seeds"])) for each in document["settings"].values()}
    models = {(cell["setting"], cell["seed"], cell["model"]) for cell in document["cells"]}
    return (
        f'<header><p class="kicker">Subliminal transfer of behaviour in agent distillation, every pair of teacher and student'
        f"</p><h1>{page.QUESTION}</h1>"
        + page.answers([answer(document, setting) for setting in document["settings"]])
        + _completeness(document, rows)
        + page.status(bool(run) and not invalid, valid, "", _reasons(invalid))
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


def _completeness(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the grid is whole; else how many rows have no seed, or not all of them, and how many files are missing."""
    if document["complete"]:
        return page.status(True, "The grid is complete")
    planned = {setting: len(known["seeds"]) for setting, known in document["settings"].items()}
    kinds = Counter(
        row["state"]
        if not row["seeds"]
        else f"on only {len(row['seeds'])} of {counted(planned[row['setting']], 'seed')}"
        for row in rows
        if len(row["seeds"]) < planned[row["setting"]]
    )
    told = [
        f"{count} of {counted(len(rows), 'row')} {'is' if count == 1 else 'are'} {kind}"
        for kind, count in kinds.items()
    ]
    lost = len({(line["setting"], line["seed"], line["model"]) for line in document["missing"]})
    told.append(
        f"{counted(lost, 'evaluation or count', 'evaluations or counts')} {'is' if lost == 1 else 'are'} missing"
    )
    text = "; ".join(told) + ". A seed that lacks one is left out of the pair."
    return page.status(False, "The grid is incomplete", text)


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
    behaviour = document["settings"][setting]["wording"]["behaviour"]
    single = {pair: line for pair, line in judged.items() if len(line["seeds"]) == 1}
    several = {pair: line for pair, line in judged.items() if pair not in single}
    # What one seed shows is no finding about seeds: it is never counted with what several show.
    shown = several or single
    most = max(shown, key=lambda pair: shown[pair]["difference"])
    size = f"most in “{named[most]}”, {points(shown[most]['difference'])} {interval(shown[most]['ci95'])} against its control"
    if several:
        text = f"{name}: {behaviour} comes along in {_moved(several)} (p < {ALPHA} over seeds, after Holm's adjustment), {size}"
        text += f"; within one run, which shows nothing of other seeds, in {_moved(single)} more" if single else ""
    else:
        text = (
            f"{name}: within one run, which shows nothing of other seeds, {behaviour} comes along in {_moved(single)} "
            f"(p < {ALPHA} over the tasks of that run, after Holm's adjustment), {size}"
        )
    for state in ("invalid", "not run"):
        count = sum(row["state"] == state for row in rows)
        text += f"; {count} more {'is' if count == 1 else 'are'} {state}" if count else ""
    for claim in document["strongest"]:
        if claim["setting"] == setting and claim["arm"] == PAIRS[claim["pair"]].primary_arm:
            text += "; " + panels.with_titles(f"{claim['pair']} is {claim['verdict']}", document)
    return f"{text}."


def _moved(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """In how many pairs the student shows more of the behaviour than its control, for sure."""
    moved = sum(line["difference"] > 0 and line["p_adjusted"] < ALPHA for line in lines.values())
    return f"{moved} of {counted(len(lines), 'pair')}"


def _overview(document: Mapping[str, Any], setting: str) -> str:
    """The setting in one picture."""
    figures = "".join(
        sections.interval_figure(
            plot, f"{plot.subtitle} Percentage points: student minus counter-bias control of the same arm.", heading=""
        )
        for plot in panels.overview(document, setting)
    )
    title = f"{panels.setting_word(setting)}: every pair at a glance"
    return page.section(f"{setting}-overview", title, figures or page.NOTHING)


def _beside_the_paper(document: Mapping[str, Any], setting: str) -> str:
    known = document["settings"][setting]
    header = (
        "pair", "paper %", "base %", "teacher %", "arm", "student % [95\u00a0%\u00a0CI]", "control %", "benign %",
        "difference [95\u00a0%\u00a0CI]", "p (Holm)", "seeds",
    )  # fmt: skip
    caption = (
        f"{setting}: {known['wording']['behaviour']} rates in %, differences in points. Paper: arXiv 2604.15559, before → "
        "after distillation, second-hand figures of one tally. The control row's student is that of the benign teacher."
    )
    rows = panels.rows_of(document, setting)
    caption += panels.one_run_note([line for row in rows for line in panels.primaries(document, row).values()])
    groups = [_table_group(document, row, len(known["seeds"])) for row in rows]
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
    state = {"valid": "", "invalid": '<br><span class="miss">invalid</span>', "not run": "<br><small>not run</small>"}
    told = f"{paper['baseline']} → {paper['student']}" if paper else MISSING
    lead = (
        f'<th scope="rowgroup"{span}>{escape(row["title"])}{small}{state[row["state"]]}</th><td{span}>{escape(told)}</td>'
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
            *([MISSING] * 2 if line is None else [size_text(line), p_over_seeds(line, "p_adjusted")]),
            f"{len(row['seeds'])} of {planned}",
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
        lead + (table if len(rows) <= _SHOWN_AT_ONCE else page.folded(counted(len(rows), "model"), table)),
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
