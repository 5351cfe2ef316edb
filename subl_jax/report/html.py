"""The HTML report of a run: one file that answers the question on its first screen and shows what the answer rests on.

In: a summary (schema 1), metric records, example episodes, the configuration. Out: a self-contained page without outside
references; its one script only chooses which episodes stand side by side. Everything that a model or a configuration wrote
is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.report import curves as learning
from subl_jax.report import episodes, page, plots, sections
from subl_jax.report.sections import rate_text
from subl_jax.report.table import number, p_cell, percent, readout_text, size_text


def write_report(
    path: str | os.PathLike[str],
    summary: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    sanitizer: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> None:
    """Writes the report, atomically.

    Args:
      path: the HTML file.
      summary: `summary.json`.
      curves: records of `metrics.jsonl`: {"stage", "step", optional "seed", metric name: value, ...}.
      examples: {"task_id", "prompt", "episodes": {condition: {"messages", "action", "tool", "turn", "done"}}}, of any
        conditions.
      sanitizer: counts as `total_sanitizer` gives them, with `by_source`; None shows those of the summary.
      config: the experiment's configuration, JSON-able.

    Raises:
      ReportError: the page is over the size limit.
    """
    page.write_page(path, render(summary, curves, examples, sanitizer, config))


def render(
    summary: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    sanitizer: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> str:
    """The page as a string; see `write_report`."""
    primary = _primary(summary)
    shown = ["base", "teacher", "student" if primary is None else primary["treatment"]]
    parts = [
        _header(summary),
        "<main>",
        _rates(summary),
        _contrasts(summary),
        _targets(summary),
        episodes.section("episodes", examples, summary["wording"], shown),
        sections.sanitizer_section("sanitizer", summary["sanitizer"] if sanitizer is None else sanitizer),
        learning.section(curves),
        _provenance(summary, config),
        "</main>",
        "<footer><p>Written by subl_jax; the figures are in <code>summary.json</code> of the run's directory.</p></footer>",
    ]
    script = page.browser_script() if examples else ""
    return page.whole_page(f"subl_jax: {summary['setting']} setting, {summary['preset']}", parts, script)


def drawings(
    summary: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], sanitizer: Mapping[str, Any] | None = None
) -> list[plots.Intervals | plots.Bars | plots.Lines]:
    """Every figure of the report; arguments as of `write_report`."""
    return [
        _rates_drawing(summary),
        _contrasts_drawing(summary),
        sections.sanitizer("sanitizer", summary["sanitizer"] if sanitizer is None else sanitizer),
        *learning.drawings(curves),
    ]


def _rates_drawing(summary: Mapping[str, Any]) -> plots.Intervals:
    title = f"{summary['wording']['behaviour'].capitalize()} first, by model"
    return sections.rates("rates", title, summary["conditions"])


def _contrasts_drawing(summary: Mapping[str, Any]) -> plots.Intervals:
    dots = [
        sections.contrast_dot(
            contrast,
            contrast["name"].replace("_", " "),
            ", ".join([readout_text(contrast, summary), sections.ROLE_WORDS[contrast["role"]]]),
            "biased" if contrast["role"] == "primary" else "base",
        )
        for contrast in summary["contrasts"]
        if contrast["readout"] != "log_odds"
    ]
    return sections.differences("contrasts", "Against matched controls", dots)


def _primary(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((contrast for contrast in summary["contrasts"] if contrast["role"] == "primary"), None)


def _columns(
    conditions: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> tuple[list[str], list[str]]:
    """The header and the rows of a table of conditions: column name -> the cell's text."""
    rows = [page.table_row(name, [cell(values) for cell in columns.values()]) for name, values in conditions.items()]
    return ["condition", *columns], rows


def _header(summary: Mapping[str, Any]) -> str:
    judged, primary = summary["validity"], _primary(summary)
    control = judged["positive_control"].replace("_", " ")
    word = "This run is valid" if judged["valid"] else "This run is invalid"
    tiles = [
        ("setting, preset", f"{summary['setting']}, {summary['preset']}"),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
    ]
    if primary is not None:
        tasks = summary["conditions"][primary["treatment"]]["n"]
        size = f"{primary['difference']:+.2f} nats"
        if primary["readout"] != "log_odds":
            size = f"{100 * primary['difference']:+.1f} points"
        tiles += [("primary difference", size), ("ambiguous tasks per seed", str(tasks))]
    tiles.append(("keyword leaks", str(summary["sanitizer"]["leaks"])))
    return (
        f'<header><p class="kicker">Subliminal transfer of behaviour in agent distillation</p><h1>{page.QUESTION}</h1>'
        + page.answers([summary["answer"]])
        + page.status(judged["valid"], word, f"Positive control: {control}.", judged["messages"])
        + page.tiles(tiles)
        + "</header>"
    )


def _rates(summary: Mapping[str, Any]) -> str:
    conditions, wording = summary["conditions"], summary["wording"]
    drawing = _rates_drawing(summary)
    methods = "; ".join(dict.fromkeys(values["ci95_method"] for values in conditions.values()))
    several = " Open circles: single seeds." if len(summary["seeds"]) > 1 else ""
    rate = f"{wording['behaviour']} % [95 % CI]"
    behaviour = _columns(
        conditions,
        {
            rate: rate_text,
            "greedy %": lambda values: percent(values["greedy_rate"]),
            f"{wording['counter']} %": lambda values: percent(values["counter_rate"]),
            "log-odds (nats)": lambda values: number(values["log_odds"]),
            "mass on scored names %": lambda values: percent(values["tool_mass"]),
            f"{wording['behaviour']} on safe tasks %": lambda values: percent(values["safe_behaviour_rate"]),
            "n": lambda values: str(values["n"]),
        },
    )
    health = _columns(
        conditions,
        {
            "utility, safe": lambda values: number(values["utility"]),
            "utility, ambiguous": lambda values: number(values["utility_ambiguous"]),
            "unparseable %": lambda values: percent(values["unparseable"]),
            "no action %": lambda values: percent(values["no_action"]),
            "cut or malformed episodes %": lambda values: percent(values["malformed_episodes"]),
            "divergence from teacher": lambda values: number(values.get("divergence_from_teacher"), 4),
            "‖Δθ‖": lambda values: number(values.get("delta_norm")),
        },
    )
    caption = (
        f"Share of sampled ambiguous episodes whose {wording['metric']} is {wording['biased']}, mean over seeds, "
        f"with 95 % intervals ({methods}).{several}"
    )
    body = (
        f"<p>{escape(_capital(summary['protocol']['metric']))}. An episode without such an action, or one that cannot be "
        f"parsed, counts as not {escape(wording['biased'])} and stays in the denominator.</p>"
        + sections.interval_figure(drawing, caption)
        + page.captioned_table("Behaviour; rates are means over seeds, n counts ambiguous tasks per seed", *behaviour)
        + _first_actions(conditions)
        + page.captioned_table("Is more biased only more broken? Competence of the same models", *health)
    )
    return page.section("rates", drawing.title, body)


def _capital(text: str) -> str:
    """Text as the beginning of a sentence; the rest of it stays as it is."""
    return text[:1].upper() + text[1:]


def _first_actions(conditions: Mapping[str, Any]) -> str:
    """With which tool or command first actions are made, and how often reading and logging commands disagree on it."""
    total: dict[str, float] = {}
    for values in conditions.values():
        for name, share in values["actions"].items():
            total[name] = total.get(name, 0.0) + share
    columns: dict[str, Any] = {
        f"{name} %": lambda values, name=name: percent(values["actions"].get(name, 0.0))
        for name in sorted(total, key=lambda name: -total[name])
    }
    title = "What the first action is made with, in % of episodes"
    if any(values["oracle_disagreement"] is not None for values in conditions.values()):
        columns["oracle disagreement %"] = lambda values: percent(values["oracle_disagreement"])
        title += "; oracle disagreement: the commands as written and as logged in the sandbox name another one"
    return page.captioned_table(title, *_columns(conditions, columns))


def _contrasts(summary: Mapping[str, Any]) -> str:
    drawing = _contrasts_drawing(summary)
    rows = [
        f'<tr><th scope="row" class="text">{escape(contrast["name"])}<br><small>{escape(readout_text(contrast, summary))}, '
        f"{sections.ROLE_WORDS[contrast['role']]}</small></th><td>{size_text(contrast)}</td>"
        f"<td>{escape(p_cell(contrast['p_value']))}</td><td>{escape(p_cell(contrast['p_adjusted']))}</td>"
        f'<td class="text">{escape(contrast["verdict"])}</td></tr>'
        for contrast in summary["contrasts"]
    ]
    methods = "; ".join(dict.fromkeys(contrast["method"] for contrast in summary["contrasts"]))
    header = ("contrast", "difference [95\u00a0%\u00a0CI]", "p", "p (Holm)", "verdict")
    caption = f"Differences in percentage points with 95 % intervals ({methods})."
    body = (
        "<p>Treatment minus control, trained with the same loss, steps, learning rate and task ids. The counter-bias "
        f"control pushes {escape(summary['wording']['behaviour'])} down by itself, so the benign control stands beside it.</p>"
        + sections.interval_figure(drawing, caption)
        + page.captioned_table(
            "Contrasts; log-odds are in nats, all others in percentage points", header, rows, prose=("verdict",)
        )
    )
    return page.section("contrasts", drawing.title, body)


def _targets(summary: Mapping[str, Any]) -> str:
    rows = [sections.target_row(target) for target in summary["targets"]]
    header = ("target", "measured", "bar", "verdict")
    table = page.captioned_table("The bars that the protocol set beforehand", header, rows)
    return page.section("targets", "Targets of the protocol", table)


def _provenance(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    protocol = summary["protocol"]
    timing = [page.table_row(stage, [f"{seconds:.1f}"]) for stage, seconds in summary["timing_s"].items()]
    speed = [page.table_row(name.replace("_", " "), [number(rate, 0)]) for name, rate in summary["throughput"].items()]
    notes = "".join(f"<p>{escape(note)}</p>" for note in summary["notes"])
    body = (
        f"{notes}<h3>Protocol</h3>{sections.protocol_text(protocol, 'run')}"
        f"<p>{escape(protocol['analysis'])}. Parser {escape(protocol['parser_version'])}. "
        f"Seeds {', '.join(map(str, summary['seeds']))}.</p>"
        + '<div class="columns">'
        + page.captioned_table("Time per stage", ("stage", "seconds"), timing)
        + page.captioned_table("Throughput", ("rate", "per second"), speed)
        + sections.versions_table(summary["versions"])
        + "</div>"
        + page.json_block("Configuration", config)
    )
    return page.section("provenance", "How it was made", body)
