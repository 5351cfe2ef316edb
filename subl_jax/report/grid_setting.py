"""What the report of a grid says of one setting: panels of pairs, contrasts, the claim between pairs, competence, episodes.

`grid.json` (schema 1) and the setting's example episodes in, an HTML section out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from subl_jax.config import suffix_of
from subl_jax.grid.pairs import CONTROL, PAIRS, STUDENTS
from subl_jax.report import episodes as browsing
from subl_jax.report import page, panels, sections
from subl_jax.report.table import (
    MISSING,
    counted,
    interval,
    number,
    p_cell,
    p_over_seeds,
    percent,
    readout_text,
    size_text,
)

_DIFFERENCE = "difference [95\u00a0%\u00a0CI]"


def section(document: Mapping[str, Any], setting: str, episodes: Mapping[str, Any] | None) -> str:
    """The section of a setting.

    Args:
      document: `grid.json`.
      setting: which.
      episodes: its example episodes, {"seed", "tasks"}; None where there are none.
    """
    known = document["settings"][setting]
    wording = known["wording"]
    seeds = f"Seed{'s' * (len(known['seeds']) > 1)} {', '.join(map(str, known['seeds']))}"
    body = f"<p>{escape(known['metric'].capitalize())}. {seeds}.</p>"
    body += _panels(document, setting) + _contrasts(document, setting) + _between(document, setting)
    body += _competence(document, setting) + _targets(document, setting)
    if document["sanitizer"].get(setting):
        counts = document["sanitizer"][setting]
        body += sections.sanitizer_section(f"{setting}-sanitizer", counts, 3, f", {setting}")
    pairs = [row["pair"] for row in panels.rows_of(document, setting) if row["pair"] in PAIRS]
    groups = {PAIRS[pair].title: [PAIRS[pair].model(name) for name in PAIRS[pair].conditions()] for pair in pairs}
    tasks = () if episodes is None else episodes["tasks"]
    title = f"{panels.setting_word(setting)}: {browsing.TITLE}"
    shown = ("base", "teacher", "student")
    body += browsing.section(f"{setting}-episodes", tasks, wording, shown, groups=groups, title=title, level=3)
    return page.section(f"{setting}-setting", f"{panels.setting_word(setting)}: {wording['behaviour']}", body)


def _panels(document: Mapping[str, Any], setting: str) -> str:
    rows = [row for row in panels.rows_of(document, setting) if row["conditions"]]
    methods = dict.fromkeys(values["ci95_method"] for row in rows for values in row["conditions"].values())
    figures = [
        sections.interval_figure(plot, row["answer"], "compact", f"<h4>{escape(plot.title)}</h4>")
        for row in rows
        for plot in [panels.panel(row)]
    ]
    marks = panels.seeds_text([values for row in rows for values in row["conditions"].values()])
    lead = f"{marks} Intervals: {'; '.join(methods)}. Adjusted p-values: by Holm's method over the pairs."
    body = f'<p>{escape(lead)}</p><div class="charts">{"".join(figures)}</div>'
    return page.section(
        f"{setting}-panels", "Every pair: base, teachers, controls and students", body if rows else page.NOTHING, 3
    )


def _contrasts(document: Mapping[str, Any], setting: str) -> str:
    lines = [line for line in document["contrasts"] if line["setting"] == setting and line["pair"] != CONTROL.name]
    named, known = panels.titles(document), document["settings"][setting]
    signs = [line for line in lines if line["role"] == "sign" and line["readout"] == "behaviour"]
    figures = "".join(
        sections.interval_figure(
            plot, f"Percentage points. {panels.seeds_text(signs)}", heading=f"<h4>{escape(plot.title)}</h4>"
        )
        for plot in panels.against_benign(document, setting)
    )
    header = ("contrast", "pair", _DIFFERENCE, "bootstrap", "p", "p (Holm)", "sign-flip p", "verdict")
    rows = [
        page.table_row(
            line["name"],
            [
                named[line["pair"]],
                size_text(line),
                MISSING if not line["bootstrap"] else interval([line["bootstrap"][end] for end in ("low", "high")]),
                p_over_seeds(line, "p_value"),
                p_over_seeds(line, "p_adjusted"),
                # Of one seed it is 1, whatever was measured.
                MISSING if line["sign_flip_p"] is None or len(line["seeds"]) == 1 else p_cell(line["sign_flip_p"]),
                line["verdict"],
            ],
            detail=f"{sections.ROLE_WORDS[line['role']]}, {readout_text(line, known)}",
            prose=(0, 6),
        )
        for line in lines
    ]
    methods = "; ".join(dict.fromkeys(line["method"] for line in lines))
    caption = (
        f"{setting}: all contrasts; log-odds in nats, all others in points. Interval and p: {methods}. Holm: across the pairs. "
        "Bootstrap (hierarchical) and sign-flip test decide nothing."
    ) + panels.one_run_note(lines)
    table = page.folded(
        f"All contrasts: {len(rows)}", page.captioned_table(caption, header, rows, prose=("pair", "verdict"))
    )
    return page.section(
        f"{setting}-contrasts", "Against matched controls", figures + table if rows else page.NOTHING, 3
    )


def _between(document: Mapping[str, Any], setting: str) -> str:
    named = panels.titles(document)
    verdicts = page.bullets(
        [
            panels.with_titles(f"{claim['arm']}: {claim['pair']} is {claim['verdict']}.", document)
            for claim in document["strongest"]
            if claim["setting"] == setting
        ]
    )
    own = [line for line in document["between"] if line["setting"] == setting and line["difference"] is not None]
    figures = "".join(
        sections.interval_figure(
            plot, f"Percentage points: difference of the pairs' differences. {panels.seeds_text(own)}",
            heading=f"<h4>{escape(plot.title)}</h4>",
        )
        for plot in panels.between(document, setting)
    )  # fmt: skip
    rows = [
        page.table_row(
            f"{named[line['pair']]} − {named[line['other']]}",
            [
                line["arm"],
                *(
                    [MISSING] * 3
                    if line["difference"] is None
                    else [
                        size_text({**line, "readout": "behaviour"}),
                        p_over_seeds(line, "p_value"),
                        p_over_seeds(line, "p_adjusted"),
                    ]
                ),
                ", ".join(map(str, line["seeds"])) or MISSING,
            ],
        )
        for line in document["between"]
        if line["setting"] == setting
    ]
    header = ("pairs", "arm", _DIFFERENCE, "p, one-sided", "p (Holm)", "seeds")
    table = page.captioned_table(f"{setting}: between pairs, in points.{panels.one_run_note(own)}", header, rows)
    lead = (
        "<p>One pair is claimed to be the strongest if it exceeds every other one: the largest of the one-sided p-values "
        "decides (intersection-union).</p>"
    )
    return page.section(
        f"{setting}-between",
        "Which pair transfers most",
        lead + verdicts + figures + table if rows else page.NOTHING,
        3,
    )


def _competence(document: Mapping[str, Any], setting: str) -> str:
    """How far students went of their teacher's way, and whether more biased is only more broken."""
    header = (
        "pair", "model", "transfer ratio", "utility", "unparseable %", "no action %", "log-odds (nats)",
        "divergence from teacher", "‖Δθ‖", "cosine of the changes",
    )  # fmt: skip
    rows = []
    for row in panels.rows_of(document, setting):
        for condition, values in row["conditions"].items():
            arm = next((arm for arm in row["arms"] if condition == STUDENTS[0] + suffix_of(arm)), None)
            ratio = None if arm is None else row["transfer_ratio"].get(arm, {}).get("estimate")
            cells = [condition, number(ratio), number(values["utility"]), percent(values["unparseable"])]
            cells += [percent(values["no_action"]), number(values["log_odds"])]
            cells += [number(values.get("divergence_from_teacher"), 4), number(values.get("delta_norm"))]
            rows.append(page.table_row(row["title"], [*cells, number(values.get("delta_cosine"))], prose=(0,)))
    if not rows:
        return ""
    defined = {ratio["definition"] for row in document["rows"] for ratio in row["transfer_ratio"].values()}
    caption = f"{setting}: means over seeds. Transfer ratio: {'; '.join(sorted(defined))}."
    table = page.captioned_table(caption, header, rows, prose=("model",))
    return page.section(
        f"{setting}-competence", "Is more biased only more broken?", page.folded(f"Every model: {len(rows)}", table), 3
    )


def _targets(document: Mapping[str, Any], setting: str) -> str:
    rows, missed = [], 0
    for row in panels.rows_of(document, setting):
        for arm, judged in row.get("by_arm", {}).items():
            missed += sum(target["met"] is False for target in judged["targets"])
            rows += [sections.target_row(target, (row["title"], arm)) for target in judged["targets"]]
    if not rows:
        return ""
    header = ("target", "pair", "arm", "measured", "bar", "verdict")
    table = page.captioned_table(f"{setting}: the bars that the protocol set beforehand", header, rows)
    summary = f"{counted(len(rows), 'target')}, {missed} not met"
    return page.section(f"{setting}-targets", "Targets of the protocol", page.folded(summary, table), 3)
