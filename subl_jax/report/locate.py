"""What a person reads of `experiments.locate`: a table in the terminal, drawings for files, and one self-contained page.

In: `locate.json` as a value. Out: text, drawings (`report.plots`), or HTML without scripts and outside references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from subl_jax.locate.summary import figure
from subl_jax.report import locate_moves, locate_tokens, page, plots
from subl_jax.report.locate_moves import PLACES
from subl_jax.report.locate_places import ranked_section
from subl_jax.report.locate_tokens import readable, teachers_of
from subl_jax.report.sections import versions_table
from subl_jax.report.table import aligned, wrapped

QUESTION = "On which tokens do the teachers part, and how far does a student move along its teacher's direction?"

# Of the table of kinds: the page has the other temperatures too.
_TERMINAL_COLUMNS = 5


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the page, atomically.

    Raises:
      ReportError: it is over the size limit; show fewer places (--shown).
    """
    page.write_page(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page as a string."""
    parts = [
        _header(result),
        "<main>",
        *(locate_tokens.section(part) for part in result["tokens"]),
        *(ranked_section(part) for part in result["tokens"]),
        *(locate_moves.section(part) for part in result["directions"]),
        _agreement(result),
        *(locate_moves.weights_section(part) for part in result["directions"]),
        _provenance(result),
        "</main>",
        "<footer><p>Written by subl_jax; every figure is in <code>locate.json</code> beside this file.</p></footer>",
    ]
    return page.whole_page(f"subl_jax: where it sits, {result['setting']}", parts)


def _header(result: Mapping[str, Any]) -> str:
    tiles = [
        ("setting, preset", f"{result['setting']}, {result['preset']}"),
        ("seeds", ", ".join(map(str, result["seeds"]))),
        ("pairs", ", ".join(result["pairs"]).replace("_", " ")),
    ]
    return (
        f'<header><p class="kicker">Where it sits</p><h1>{QUESTION}</h1>'
        f"{page.answers([readable(line) for line in result['answer']])}{page.tiles(tiles)}</header>"
    )


def _agreement(result: Mapping[str, Any]) -> str:
    rows = [
        page.table_row(
            f"{readable(row['pair'])}, {PLACES[row['place']]}, "
            f"{'embedding' if row['depth'] == 0 else 'layer ' + str(row['depth'])}",
            [figure(row["correlation"]), ", ".join(map(str, row["students"].values()))],
        )
        for row in result["agreement"]
    ]
    if not rows:
        return ""
    body = (
        "<p>Rank correlation (Spearman), over the students of a pair, of the movement along teacher − base with the "
        "shift of the mean log-odds of the bias from the base's, as the evaluation measured it. Students of one seed "
        "share teachers and base: the correlation of a seed is one figure, without an interval of its own.</p>"
        + page.captioned_table(
            "Does the movement go with the behaviour?", ("where", "correlation [95 % CI over seeds]", "students"), rows
        )
    )
    return page.section("agreement", "Movement and behaviour", body)


def _provenance(result: Mapping[str, Any]) -> str:
    options = [page.table_row(name, [str(value)]) for name, value in result["options"].items()]
    body = (
        f"<p>Read from <code>{escape(result['workdir'])}</code>; nothing was trained.</p>"
        '<div class="columns">'
        + page.captioned_table("Options", ("option", "value"), options)
        + versions_table(result["versions"])
        + "</div>"
    )
    return page.section("provenance", "How it was made", body)


# --- Files and the terminal -------------------------------------------------------------------------------------------


def drawings(result: Mapping[str, Any]) -> list[plots.Intervals | plots.Bars | plots.Lines]:
    """Every figure for files: concentration, kinds of places, movement by layer for every condition."""
    found: list[plots.Intervals | plots.Bars | plots.Lines] = []
    for part in result["tokens"]:
        size = part["teacher_size"]
        title = f"Share of the divergence (%) that the most divergent tokens carry, {teachers_of(part)}"
        found += [
            _lines(f"concentration-{size}", title, locate_tokens.curves(part, 1.0), "tokens, %"),
            *locate_tokens.kinds_drawings(part),
        ]
    for part in result["directions"]:
        for arm, students in locate_moves.arms_of(part).items():
            for place in PLACES:
                title = f"{readable(part['pair'])}, {arm}: moved {PLACES[place]} (1 = teacher)"
                bands = locate_moves.movement_bands(part, place, students)
                found.append(_lines(f"movement-{part['pair']}-{arm}-{place}", title, bands, "behind layer"))
    return found


def _lines(name: str, title: str, bands: Sequence[plots.Band], x_label: str) -> plots.Lines:
    series = [plots.Series(band.label, band.x, band.y, band.colour) for band in bands]
    return plots.Lines(name, title, series, x_label)


def table(result: Mapping[str, Any]) -> str:
    """The terminal's table; ends with a newline."""
    seeds = ", ".join(map(str, result["seeds"]))
    blocks = [
        [f"where it sits: {result['setting']} setting, preset {result['preset']}, seed{'s' * (',' in seeds)} {seeds}"]
    ]
    for part in result["tokens"]:
        rows = [(name, *cells) for name, cells in locate_tokens.comparison_rows(part)]
        blocks.append(
            [f"{teachers_of(part)}: divergence on the clean text", *aligned(locate_tokens.COMPARISON_HEADER, rows)]
        )
        header = ("kind of place", "tokens %", *(f"{name} %" for name in part["comparisons"]))[:_TERMINAL_COLUMNS]
        kinds = [(name, *cells)[:_TERMINAL_COLUMNS] for name, cells in locate_tokens.kind_rows(part)]
        blocks.append(aligned(header, kinds))
    for part in result["directions"]:
        lines = [f"{name}: {why}" for name, why in part["refused"].items()]
        lines += [f"seed {seed}: no finished {', '.join(names)}" for seed, names in part["missing"].items()]
        if lines:
            blocks.append([f"{part['pair']}: not compared", *(each for line in lines for each in wrapped(line, "  "))])
        for place in PLACES if part["activations"] else ():
            rows = [(name, *cells) for name, cells in locate_moves.movement_rows(part, place, "teacher - base")]
            blocks.append(
                [
                    f"{part['pair']}: moved along teacher - base {PLACES[place]}",
                    *aligned(locate_moves.movement_header(part), rows),
                ]
            )
    blocks.append([line for sentence in result["answer"] for line in wrapped(sentence)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"
