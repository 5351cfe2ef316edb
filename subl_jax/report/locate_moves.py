"""The page's part on directions: how far every model moved, by layer, in activations and in weights.

One element of `locate.json`'s "directions" in; rows of tables, bands of charts and HTML sections out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.config import OBJECTIVES, STUDENT_OF, suffix_of
from subl_jax.locate.summary import figure
from subl_jax.report import page, plots
from subl_jax.report.locate_tokens import readable

PLACES = {"decision": "at the first decision", "text": "over the clean text"}
# The base and the teacher are what the movement is measured by: 0 and 1 everywhere.
_LINE_COLOURS = {"base": "s7", "teacher": "s3", "student": "s1", "control_student": "s0", "benign_student": "s2"}


def arms_of(part: Mapping[str, Any]) -> dict[str, list[str]]:
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


def movement_bands(part: Mapping[str, Any], place: str, students: Sequence[str]) -> list[plots.Band]:
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
                readable(name),
                [float(row["depth"]) for row in rows],
                [row["along"]["mean"] for row in rows],
                [row["along"]["ci95"] for row in rows],
                singles if len(seeds) > 1 else [],
                _LINE_COLOURS[lineage],
            )
        )
    return bands


def movement_rows(part: Mapping[str, Any], place: str, direction: str) -> list[tuple[str, list[str]]]:
    """Model -> its movement at every depth."""
    depths = range(part["depths"])
    found = []
    for model in part["models"]:
        rows = {row["depth"]: row for row in _moved(part, place, direction, model)}
        cells = [figure(rows[depth]["along"]) if depth in rows else "-" for depth in depths]
        last = rows.get(max(rows, default=-1))
        cells += [figure(last[key] if last else None) for key in ("cosine", "norm")]
        found.append((readable(model), cells))
    return found


def movement_header(part: Mapping[str, Any]) -> tuple[str, ...]:
    """The header over `movement_rows`."""
    layers = ("embedding", *(f"layer {layer}" for layer in range(1, part["depths"])))
    return ("model", *layers, "cosine, last", "length, last")


def section(part: Mapping[str, Any]) -> str:
    """The section of one pair; what cannot be compared is said."""
    anchor, title = f"directions-{part['pair']}", f"Along the teacher's direction: {readable(part['pair'])}"
    notes = _absent(part)
    if not part["activations"]:
        return page.section(anchor, title, notes)
    charts = [
        plots.interval_chart(
            f"{arm}, {PLACES[place]} (1: the teacher)", movement_bands(part, place, students),
            "behind layer (0: embedding)", "Shaded: 95 % interval.", whole=True,
        )
        for arm, students in arms_of(part).items()
        for place in PLACES
    ]  # fmt: skip
    tables = [
        page.captioned_table(
            f"Moved along {direction.replace('_', ' ')}, {PLACES[place]} ({readable(part['pair'])})",
            movement_header(part),
            [page.table_row(name, cells) for name, cells in movement_rows(part, place, direction)],
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
            f"{readable(row['treatment'])} − {readable(row['control'])}",
            [PLACES[row["place"]], row["direction"].replace("_", " "), figure(row["difference"])],
            prose=(0, 1),
        )
        for row in part["contrasts"]
        if row["depth"] == part["depths"] - 1
    ]
    if not rows:
        return ""
    return page.captioned_table(
        f"Behind the last layer, student minus counter-bias control ({readable(part['pair'])})",
        ("students", "place", "direction", "difference [95 % CI]"),
        rows,
        prose=("place", "direction"),
    )


def _absent(part: Mapping[str, Any]) -> str:
    """What could not be compared, and what is not there."""
    lines = [f"{name}: {why}." for name, why in part["refused"].items()]
    lines += [f"Seed {seed} has no finished {', '.join(names)}." for seed, names in part["missing"].items()]
    return page.status(False, "Not compared", items=lines) if lines else ""


# --- Weights ----------------------------------------------------------------------------------------------------------


def weights_section(part: Mapping[str, Any]) -> str:
    """Cosines and lengths, matrix by matrix; nothing where no weights can be compared."""
    rows = part["weights"]
    if not rows:
        return ""
    models = list(dict.fromkeys((row["model"], row["against"]) for row in rows))
    places = list(dict.fromkeys((row["layer"], row["matrix"]) for row in rows))
    places.sort(key=lambda each: (each[0] is not None, each[0] or 0))
    known = {(row["model"], row["against"], row["layer"], row["matrix"]): row for row in rows}

    def table(caption: str, value: str) -> str:
        header = ("matrix", *(f"{readable(model)} | {readable(against)}" for model, against in models))
        body = [
            page.table_row(
                matrix.replace("_", " ") + ("" if layer is None else f", layer {layer}"),
                [figure(known.get((*model, layer, matrix), {}).get(value), digits=2) for model in models],
            )
            for layer, matrix in places
        ]
        return page.captioned_table(f"{caption} ({readable(part['pair'])})", header, body)

    body = (
        "<p>Δθ of a model against its base, matrix by matrix, beside Δθ of a teacher (named behind the bar).</p>"
        + page.folded(f"Cosines: {len(places)} matrices", table("Cosine of the two changes", "cosine"))
        + page.folded(f"Lengths: {len(places)} matrices", table("‖Δθ‖ of the model", "norm"))
    )
    return page.section(f"weights-{part['pair']}", f"In the weights: {readable(part['pair'])}", body)
