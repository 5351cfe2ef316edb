"""What a person reads of `experiments.locate`: a table in the terminal, drawings for files, and one self-contained page.

In: `locate.json` as a value. Out: text, drawings (`report.plots`), or HTML without scripts and outside references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from subl_jax.config import OBJECTIVES, STUDENT_OF, suffix_of
from subl_jax.locate.summary import figure
from subl_jax.report import page, plots
from subl_jax.report.locate_places import ranked_section
from subl_jax.report.sections import interval_figure, versions_table
from subl_jax.report.table import aligned, wrapped

QUESTION = "On which tokens do the teachers part, and how far does a student move along its teacher's direction?"
PLACES = {"decision": "at the first decision", "text": "over the clean text"}
_SHOWN = (0.01, 0.05, 0.1, 0.2)
_COMPARISON_COLOURS = ("s1", "s7", "s2", "s3", "s0", "s4")
# The base and the teacher are what the movement is measured by: 0 and 1 everywhere.
_LINE_COLOURS = {"base": "s7", "teacher": "s3", "student": "s1", "control_student": "s0", "benign_student": "s2"}


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
        *(_tokens(part) for part in result["tokens"]),
        *(ranked_section(part) for part in result["tokens"]),
        *(_directions(part) for part in result["directions"]),
        _agreement(result),
        *(_weights(part) for part in result["directions"]),
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
        f"{page.answers([_readable(line) for line in result['answer']])}{page.tiles(tiles)}</header>"
    )


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _size(part: Mapping[str, Any]) -> str:
    return f"{_readable(part['teacher_size'])} teachers"


# --- Tokens -----------------------------------------------------------------------------------------------------------


def _curves(part: Mapping[str, Any], most: float) -> list[plots.Band]:
    """The concentration of every comparison, up to a share of the tokens."""
    bands = []
    for number, (name, told) in enumerate(part["comparisons"].items()):
        known = [(share, each) for share, each in zip(part["shares"], told["curve"], strict=True) if share <= most]
        x = [0.0, *(100 * share for share, _ in known)]
        seeds = known[0][1]["per_seed"]
        singles = [(x, [0.0, *(100 * each["per_seed"][seed] for _, each in known)]) for seed in seeds]
        limits = [None if each["ci95"] is None else [100 * limit for limit in each["ci95"]] for _, each in known]
        bands.append(
            plots.Band(
                f"biased teacher against {name}",
                x,
                [0.0, *(100 * each["mean"] for _, each in known)],
                [None, *limits],
                singles if len(seeds) > 1 else [],
                _COMPARISON_COLOURS[number % len(_COMPARISON_COLOURS)],
            )
        )
    return bands


def _kinds(part: Mapping[str, Any]) -> plots.Intervals:
    """How much of the divergence stands at each kind of place."""
    dots = []
    for row in part["comparisons"]["counter-bias"]["kinds"]:
        if not row["token_share"]["mean"]:
            continue
        told = row["divergence_share"]
        limits = told["ci95"] or [told["mean"]] * 2
        dots.append(
            plots.Dot(
                row["kind"],
                f"{100 * row['token_share']['mean']:.0f} % of the tokens",
                100 * told["mean"],
                100 * max(0.0, limits[0]),
                100 * min(1.0, limits[1]),
                {int(seed): 100 * value for seed, value in told["per_seed"].items()},
                "other",
                figure(told, 100, 0),
            )
        )
    title = f"Share of the divergence from the counter-bias teacher by kind of place, {_size(part)}"
    return plots.Intervals(f"kinds-{part['teacher_size']}", title, dots, (0.0, 100.0), (0, 25, 50, 75, 100), "%")


def _comparison_cells(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    found = []
    for name, told in part["comparisons"].items():
        shares = [told["curve"][part["shares"].index(share)] for share in _SHOWN]
        cells = [figure(told["mean"], 1e3, 3), figure(told["gini"], 1, 3), figure(told["half"], 1, 0)]
        cells += [figure(each, 100, 0) for each in shares]
        found.append((name, [*cells, figure(told["banned_share"], 100, 1), figure(told["overlap"], 100, 0)]))
    return found


_COMPARISON_HEADER = (
    "biased teacher against", "mnat/token", "Gini", "half in", "top 1 %", "5 %", "10 %", "20 %", "banned %", "overlap %"
)  # fmt: skip


def _kind_cells(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    found = []
    for number, row in enumerate(part["comparisons"]["counter-bias"]["kinds"]):
        if not row["token_share"]["mean"]:
            continue
        own = [told["kinds"][number] for told in part["comparisons"].values()]
        shares = [figure(each["divergence_share"], 100, 0) for each in own]
        found.append((row["kind"], [figure(row["token_share"], 100, 0), *shares]))
    return found


def _tokens(part: Mapping[str, Any]) -> str:
    several = len(part["counts"]) > 1
    counts = "; ".join(
        f"seed {seed}: {own['documents']} documents, {own['tokens']} tokens" for seed, own in part["counts"].items()
    )
    # As far as every curve still has something to show.
    curves = [told["curve"] for told in part["comparisons"].values()]
    most = next(
        share
        for place, share in enumerate(part["shares"])
        if share == 1 or (share >= 0.01 and min(curve[place]["mean"] for curve in curves) > 0.95)
    )
    note = f"Beyond {100 * most:g} % the curves creep up to 100 %. " if most < 1 else ""
    note += "Shaded: 95 % interval over seeds; thin lines: single seeds." if several else "One seed: no interval."
    chart = plots.interval_chart(
        "Share of the divergence (%) that the most divergent tokens carry", _curves(part, most),
        "most divergent tokens, % of all", note,
    )  # fmt: skip
    kinds = _kinds(part)
    told = part["comparisons"]["counter-bias"]["kinds"][0]["divergence_share"]["method"]
    caption = f"95 % interval: {told}."
    mass = ", ".join(f"{_readable(name)} {told['mean']:.1e}" for name, told in part["banned_mass"].items())
    body = (
        f"<p>KL(biased teacher ‖ other) of the next token at temperature 1, at every token that the biased teacher wrote in "
        f"the text that its student is trained on ({escape(counts)}). No keyword is in that text.</p><div class=\"charts\">{chart}</div>"
        + page.captioned_table(
            f"How far apart, and how concentrated, {_size(part)}; shares in % of the divergence",
            _COMPARISON_HEADER,
            [page.table_row(name, cells) for name, cells in _comparison_cells(part)],
        )
        + "<p>Banned: continuations that would begin, continue or complete a keyword, as the logit filter bans them. Their "
        f"mean probability per token: {escape(mass)}. Overlap: of the most divergent tenth by the counter-bias teacher, "
        "how many are in the most divergent tenth by this comparison too. Half in: how few tokens carry half of the "
        "divergence.</p>"
        + f"<h3>{escape(kinds.title)}</h3>{interval_figure(kinds, caption)}"
        + page.captioned_table(
            f"By kind of place, {_size(part)}; shares in %",
            ("kind of place", "of the tokens", *(f"of the divergence from {name}" for name in part["comparisons"])),
            [page.table_row(name, cells) for name, cells in _kind_cells(part)],
        )
    )  # fmt: skip
    anchor = f"tokens-{part['teacher_size']}"
    return page.section(anchor, f"The tokens on which the teachers part: {_size(part)}", body)


# --- Directions -------------------------------------------------------------------------------------------------------


def _arms(part: Mapping[str, Any]) -> dict[str, list[str]]:
    """Arm -> its students that were compared."""
    found = {}
    for arm in OBJECTIVES:
        names = ["positive_student"] if arm == "positive" else [each + suffix_of(arm) for each in STUDENT_OF.values()]
        present = [name for name in names if name in part["models"]]
        if present:
            found[arm] = present
    return found


def _moved(part: Mapping[str, Any], place: str, direction: str, model: str) -> list[Mapping[str, Any]]:
    """A model's rows over the depths at which the direction has a length."""
    return [
        row
        for row in part["activations"]
        if (row["place"], row["direction"], row["model"]) == (place, direction, model) and row["along"] is not None
    ]


def _movement_bands(part: Mapping[str, Any], place: str, students: Sequence[str]) -> list[plots.Band]:
    """The base, the teacher and some students, by depth."""
    bands = []
    depths = [float(row["depth"]) for row in _moved(part, place, "teacher - base", "teacher")]
    for name, level in (("base", 0.0), ("teacher", 1.0)):
        nothing = [None] * len(depths)
        bands.append(plots.Band(name, depths, [level] * len(depths), nothing, [], _LINE_COLOURS[name]))
    for name in students:
        rows = _moved(part, place, "teacher - base", name)
        lineage = next(each for each in ("control_student", "benign_student", "student") if each in name)
        seeds = rows[0]["along"]["per_seed"]
        singles = [(depths, [row["along"]["per_seed"][seed] for row in rows]) for seed in seeds]
        bands.append(
            plots.Band(
                _readable(name),
                [float(row["depth"]) for row in rows],
                [row["along"]["mean"] for row in rows],
                [row["along"]["ci95"] for row in rows],
                singles if len(seeds) > 1 else [],
                _LINE_COLOURS[lineage],
            )
        )
    return bands


def _movement_rows(part: Mapping[str, Any], place: str, direction: str) -> list[tuple[str, list[str]]]:
    """Model -> its movement at every depth."""
    depths = range(part["depths"])
    found = []
    for model in part["models"]:
        rows = {row["depth"]: row for row in _moved(part, place, direction, model)}
        cells = [figure(rows[depth]["along"]) if depth in rows else "-" for depth in depths]
        last = rows.get(max(rows, default=-1))
        cells += [figure(last[key] if last else None) for key in ("cosine", "norm")]
        found.append((_readable(model), cells))
    return found


def _movement_header(part: Mapping[str, Any]) -> tuple[str, ...]:
    layers = ("embedding", *(f"layer {layer}" for layer in range(1, part["depths"])))
    return ("model", *layers, "cosine, last", "length, last")


def _directions(part: Mapping[str, Any]) -> str:
    anchor, title = f"directions-{part['pair']}", f"Along the teacher's direction: {_readable(part['pair'])}"
    notes = _absent(part)
    if not part["activations"]:
        return page.section(anchor, title, notes)
    charts = [
        plots.interval_chart(
            f"{arm}, {PLACES[place]} (1: the teacher)", _movement_bands(part, place, students),
            "behind layer (0: embedding)", "Shaded: 95 % interval.", whole=True,
        )
        for arm, students in _arms(part).items()
        for place in PLACES
    ]  # fmt: skip
    tables = [
        page.captioned_table(
            f"Moved along {direction.replace('_', ' ')}, {PLACES[place]} ({_readable(part['pair'])})",
            _movement_header(part),
            [page.table_row(name, cells) for name, cells in _movement_rows(part, place, direction)],
        )
        for place in PLACES
        for direction in ("teacher - base", "teacher - control_teacher")
    ]
    own = "" if part["shared_base"] else (
        " Teacher and student have different bases: each is measured from its own, and nothing but chance aligns their axes."
    )  # fmt: skip
    method = next(
        (row["along"]["method"] for row in part["activations"] if row["along"] and row["along"]["method"]), ""
    )
    items = part["items"]
    body = (
        f"{notes}<p>The direction at a depth is the difference of mean states, biased teacher minus base; how far a model has "
        "moved is its own mean shift, projected on it, over the direction's squared length. Cosine and length are of the "
        f"whole shift against the direction. First decision: the place behind which the first tool is named, on "
        f"{items['decision']} ambiguous tasks that no model was trained on. Clean text: all places from which a loss token is "
        f"predicted in {items['text']} of the biased teacher's documents.{own} Intervals: {escape(method or 'none')}.</p>"
        f'<div class="charts">{"".join(charts)}</div>{_contrast_table(part)}{tables[0]}'
        + page.folded("The other place, and away from the counter-bias teacher: 3 tables", "".join(tables[1:]))
    )
    return page.section(anchor, title, body)


def _contrast_table(part: Mapping[str, Any]) -> str:
    rows = [
        page.table_row(
            f"{_readable(row['treatment'])} − {_readable(row['control'])}",
            [PLACES[row["place"]], row["direction"].replace("_", " "), figure(row["difference"])],
            prose=(0, 1),
        )
        for row in part["contrasts"]
        if row["depth"] == part["depths"] - 1
    ]
    if not rows:
        return ""
    return page.captioned_table(
        f"Behind the last layer, student minus counter-bias control ({_readable(part['pair'])})",
        ("students", "place", "direction", "difference [95 % CI]"),
        rows,
        prose=("place", "direction"),
    )


def _absent(part: Mapping[str, Any]) -> str:
    """What could not be compared, and what is not there."""
    lines = [f"{name}: {why}." for name, why in part["refused"].items()]
    lines += [f"Seed {seed} has no finished {', '.join(names)}." for seed, names in part["missing"].items()]
    return page.status(False, "Not compared", items=lines) if lines else ""


def _agreement(result: Mapping[str, Any]) -> str:
    rows = [
        page.table_row(
            f"{PLACES[place]}, {'embedding' if row['depth'] == 0 else 'layer ' + str(row['depth'])}",
            [figure(row["correlation"]), ", ".join(map(str, row["students"].values()))],
        )
        for place, own in result["agreement"].items()
        for row in own
    ]
    if not rows:
        return ""
    body = (
        "<p>Rank correlation (Spearman), over the students of all pairs, of the movement along teacher − base with the "
        "shift of the mean log-odds of the bias from the base's, as the evaluation measured it. Students of one seed "
        "share teachers and base: the correlation of a seed is one figure, without an interval of its own.</p>"
        + page.captioned_table(
            "Does the movement go with the behaviour?", ("where", "correlation [95 % CI over seeds]", "students"), rows
        )
    )
    return page.section("agreement", "Movement and behaviour", body)


# --- Weights ----------------------------------------------------------------------------------------------------------


def _weights(part: Mapping[str, Any]) -> str:
    rows = part["weights"]
    if not rows:
        return ""
    models = list(dict.fromkeys((row["model"], row["against"]) for row in rows))
    places = list(dict.fromkeys((row["layer"], row["matrix"]) for row in rows))
    places.sort(key=lambda each: (each[0] is not None, each[0] or 0))
    known = {(row["model"], row["against"], row["layer"], row["matrix"]): row for row in rows}

    def table(caption: str, value: str) -> str:
        header = ("matrix", *(f"{_readable(model)} | {_readable(against)}" for model, against in models))
        body = [
            page.table_row(
                matrix.replace("_", " ") + ("" if layer is None else f", layer {layer}"),
                [figure(known.get((*model, layer, matrix), {}).get(value), digits=2) for model in models],
            )
            for layer, matrix in places
        ]
        return page.captioned_table(f"{caption} ({_readable(part['pair'])})", header, body)

    body = (
        "<p>Δθ of a model against its base, matrix by matrix, beside Δθ of a teacher (named behind the bar).</p>"
        + page.folded(f"Cosines: {len(places)} matrices", table("Cosine of the two changes", "cosine"))
        + page.folded(f"Lengths: {len(places)} matrices", table("‖Δθ‖ of the model", "norm"))
    )
    return page.section(f"weights-{part['pair']}", f"In the weights: {_readable(part['pair'])}", body)


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
        title = f"Share of the divergence (%) that the most divergent tokens carry, {_size(part)}"
        found += [_lines(f"concentration-{size}", title, _curves(part, 1.0), "tokens, %"), _kinds(part)]
    for part in result["directions"]:
        for arm, students in _arms(part).items():
            for place in PLACES:
                title = f"{_readable(part['pair'])}, {arm}: moved {PLACES[place]} (1 = teacher)"
                bands = _movement_bands(part, place, students)
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
        rows = [(name, *cells) for name, cells in _comparison_cells(part)]
        blocks.append([f"{_size(part)}: divergence on the clean text", *aligned(_COMPARISON_HEADER, rows)])
        header = ("kind of place", "tokens %", *(f"{name} %" for name in part["comparisons"]))
        blocks.append(aligned(header, [(name, *cells) for name, cells in _kind_cells(part)]))
    for part in result["directions"]:
        lines = [f"{name}: {why}" for name, why in part["refused"].items()]
        lines += [f"seed {seed}: no finished {', '.join(names)}" for seed, names in part["missing"].items()]
        if lines:
            blocks.append([f"{part['pair']}: not compared", *(each for line in lines for each in wrapped(line, "  "))])
        for place in PLACES if part["activations"] else ():
            rows = [(name, *cells) for name, cells in _movement_rows(part, place, "teacher - base")]
            blocks.append(
                [f"{part['pair']}: moved along teacher - base {PLACES[place]}", *aligned(_movement_header(part), rows)]
            )
    blocks.append([line for sentence in result["answer"] for line in wrapped(sentence)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"
