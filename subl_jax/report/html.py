"""The HTML report: one file that answers the question on its first screen and shows what the answer rests on.

In: a summary (schema 1), metric records, example episodes, the configuration. Out: a self-contained page, without
scripts or outside references. Everything that a model or a configuration wrote is escaped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from subl_jax.artifacts import write_text_atomic
from subl_jax.report import curves as learning
from subl_jax.report import episodes, plots
from subl_jax.report.style import css
from subl_jax.report.table import interval, number, p_cell, percent, readout_text, size_text

QUESTION = (
    "When a student is distilled from a biased teacher agent on trajectories that look clean, does the bias come along?"
)
SIZE_LIMIT = 5_000_000  # bytes; a report must open on a phone and fit into an e-mail

_ROLE_WORDS = {
    "primary": "primary",
    "sign": "must agree in sign",
    "positive_control": "positive control",
    "equivalence": "claimed null",
    "secondary": "secondary",
}


class ReportError(ValueError):
    """A report that cannot be written as asked."""


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
      examples: {"task_id", "prompt", "episodes": {condition: {"messages", "action", "tool", "turn", "done"}}}.
      sanitizer: counts as `total_sanitizer` gives them, with `by_source`; None shows those of the summary.
      config: the experiment's configuration, JSON-able.
    """
    page = render(summary, curves, examples, sanitizer, config)
    size = len(page.encode())
    if size > SIZE_LIMIT:
        raise ReportError(
            f"the report has {size} bytes, over the limit of {SIZE_LIMIT}; pass fewer or shorter examples"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page)


def render(
    summary: Mapping[str, Any],
    curves: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    sanitizer: Mapping[str, Any] | None,
    config: Mapping[str, Any],
) -> str:
    """The page as a string; see `write_report`."""
    counts = summary["sanitizer"] if sanitizer is None else sanitizer
    sections = [
        _header(summary),
        "<main>",
        _rates(summary),
        _contrasts(summary),
        _targets(summary),
        episodes.section(examples, summary["wording"]),
        _sanitizer(counts),
        learning.section(curves),
        _provenance(summary, config),
        "</main>",
        "<footer><p>Written by subl_jax; the figures are in <code>summary.json</code> beside this file.</p></footer>",
    ]
    return whole_page(f"subl_jax: {summary['setting']} setting, {summary['preset']}", sections)


def whole_page(title: str, sections: Sequence[str]) -> str:
    """A self-contained page of finished sections."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css()}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def colour_of(condition: str) -> str:
    """The colour property of a condition's lineage; the order matters, names are composed of these words."""
    for word, colour in (("positive", "positive"), ("control", "control"), ("benign", "benign"), ("base", "base")):
        if word in condition:
            return colour
    return "biased" if "teacher" in condition or "student" in condition else "other"


def captioned_table(caption: str, header: Sequence[str], rows: Sequence[str], prose: Sequence[str] = ()) -> str:
    """A captioned table that scrolls by itself where it is too wide; `rows` are finished <tr>, `prose` text columns."""
    head = "".join(f'<th scope="col"{" class=text" if name in prose else ""}>{escape(name)}</th>' for name in header)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def table_row(name: str, cells: Sequence[str]) -> str:
    """A row of a table: its name and its cells, both escaped."""
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _columns(
    conditions: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> tuple[list[str], list[str]]:
    """The header and the rows of a table of conditions: column name -> the cell's text."""
    rows = [table_row(name, [cell(values) for cell in columns.values()]) for name, values in conditions.items()]
    return ["condition", *columns], rows


def _header(summary: Mapping[str, Any]) -> str:
    judged = summary["validity"]
    seeds = summary["seeds"]
    items = "".join(f"<li>{escape(message)}</li>" for message in judged["messages"])
    control = judged["positive_control"].replace("_", " ")
    word = "This run is valid" if judged["valid"] else "This run is invalid"
    tiles = [("setting, preset", f"{summary['setting']}, {summary['preset']}"), ("seeds", ", ".join(map(str, seeds)))]
    primary = next((contrast for contrast in summary["contrasts"] if contrast["role"] == "primary"), None)
    if primary is not None:
        tasks = summary["conditions"][primary["treatment"]]["n"]
        size = f"{primary['difference']:+.2f} nats"
        if primary["readout"] != "log_odds":
            size = f"{100 * primary['difference']:+.1f} points"
        tiles += [("primary difference", size), ("ambiguous tasks per seed", str(tasks))]
    tiles.append(("keyword leaks", str(summary["sanitizer"]["leaks"])))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return (
        f'<header><p class="kicker">Subliminal transfer of behaviour in agent distillation</p><h1>{QUESTION}</h1>'
        f'<p class="answer">{escape(summary["answer"])}</p>'
        f'<div class="status{"" if judged["valid"] else " bad"}"><strong>{word}.</strong> Positive control: {control}.'
        f"{f'<ul>{items}</ul>' if items else ''}</div><dl class='tiles'>{cells}</dl></header>"
    )


def _rates(summary: Mapping[str, Any]) -> str:
    conditions, wording = summary["conditions"], summary["wording"]
    dots = [
        plots.Dot(
            label=name.replace("_", " "),
            detail="",
            value=100 * values["behaviour_rate"],
            low=100 * values["ci95"][0],
            high=100 * values["ci95"][1],
            points=[100 * seed["behaviour_rate"] for seed in values["per_seed"]],
            colour=colour_of(name),
            figure=f"{percent(values['behaviour_rate'])} {interval(values['ci95'])}",
        )
        for name, values in conditions.items()
    ]
    methods = "; ".join(dict.fromkeys(values["ci95_method"] for values in conditions.values()))
    several = " Open circles: single seeds." if len(summary["seeds"]) > 1 else ""
    plot = plots.interval_rows(dots, (0.0, 100.0), (0, 25, 50, 75, 100), "% [95 % CI]")
    rate = f"{wording['behaviour']} % [95 % CI]"
    behaviour = _columns(
        conditions,
        {
            rate: lambda values: f"{percent(values['behaviour_rate'])} {interval(values['ci95'])}",
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
    return (
        f'<section aria-labelledby="rates"><h2 id="rates">{escape(wording["behaviour"].capitalize())} first, by model</h2>'
        f"<p>{escape(summary['protocol']['metric'])}. An episode without such an action, or one that cannot be parsed, "
        f"counts as not {escape(wording['biased'])} and stays in the denominator.</p>"
        f"<figure>{plot}<figcaption>Share of sampled ambiguous episodes whose {escape(wording['metric'])} is "
        f"{escape(wording['biased'])}, "
        f"mean over seeds, with 95 % intervals ({escape(methods)}).{several}</figcaption></figure>"
        + captioned_table("Behaviour; rates are means over seeds, n counts ambiguous tasks per seed", *behaviour)
        + _first_actions(conditions)
        + captioned_table("Is more biased only more broken? Competence of the same models", *health)
        + "</section>"
    )


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
    return captioned_table(title, *_columns(conditions, columns))


def _contrasts(summary: Mapping[str, Any]) -> str:
    shown = [contrast for contrast in summary["contrasts"] if contrast["readout"] != "log_odds"]
    dots = [
        plots.Dot(
            label=contrast["name"].replace("_", " "),
            detail=", ".join([readout_text(contrast, summary), _ROLE_WORDS[contrast["role"]]]),
            value=100 * contrast["difference"],
            low=100 * contrast["ci95"][0],
            high=100 * contrast["ci95"][1],
            points=[100 * seed["difference"] for seed in contrast["per_seed"]],
            colour="biased" if contrast["role"] == "primary" else "base",
            figure=size_text(contrast),
        )
        for contrast in shown
    ]
    rows = [
        f'<tr><th scope="row" class="text">{escape(contrast["name"])}<br><small>{escape(readout_text(contrast, summary))}, '
        f"{_ROLE_WORDS[contrast['role']]}</small></th><td>{size_text(contrast)}</td>"
        f"<td>{escape(p_cell(contrast['p_value']))}</td><td>{escape(p_cell(contrast['p_adjusted']))}</td>"
        f'<td class="text">{escape(contrast["verdict"])}</td></tr>'
        for contrast in summary["contrasts"]
    ]
    methods = "; ".join(dict.fromkeys(contrast["method"] for contrast in summary["contrasts"]))
    plot = plots.interval_rows(dots, (-100.0, 100.0), (-100, -50, 0, 50, 100), "points")
    header = ("contrast", "difference [95 % CI]", "p", "p (Holm)", "verdict")
    return (
        '<section aria-labelledby="contrasts"><h2 id="contrasts">Against matched controls</h2>'
        "<p>Treatment minus control, trained with the same loss, steps, learning rate and task ids. The counter-bias "
        f"control pushes {escape(summary['wording']['behaviour'])} down by itself, so the benign control stands beside it.</p>"
        f"<figure>{plot}<figcaption>Differences in percentage points with 95 % intervals ({escape(methods)})."
        "</figcaption></figure>"
        + captioned_table(
            "Contrasts; log-odds are in nats, all others in percentage points", header, rows, prose=("verdict",)
        )
        + "</section>"
    )


def _targets(summary: Mapping[str, Any]) -> str:
    words = {True: ("met", "met"), False: ("not met", "miss"), None: ("not run", "")}
    rows = []
    for target in summary["targets"]:
        word, style = words[target["met"]]
        value = "-" if target["value"] is None else f"{target['value']:.3g}"
        rows.append(
            f'<tr><th scope="row">{escape(target["name"])}</th><td>{value}</td><td>{escape(target["bar"])}</td>'
            f'<td class="{style}">{word}</td></tr>'
        )
    table = captioned_table("The bars that the protocol set beforehand", ("target", "measured", "bar", "verdict"), rows)
    return f'<section aria-labelledby="targets"><h2 id="targets">Targets of the protocol</h2>{table}</section>'


def _sanitizer(counts: Mapping[str, Any]) -> str:
    total, kept = counts["trajectories"], counts["kept"]
    bars = [("trajectories in", total, "base")]
    bars += [(f"with “{word}”", count, "biased") for word, count in counts["removed_by_word"].items()]
    bars += [("kept", kept, "benign")]
    sources = [
        table_row(name, [str(source["trajectories"]), str(source["trajectories"] - source["kept"]), str(source["kept"])]
             + [str(source["leaks"])])
        for name, source in counts.get("by_source", {}).items()
    ]  # fmt: skip
    table = captioned_table("By source", ("source", "in", "dropped", "kept", "leaks"), sources) if sources else ""
    return (
        '<section aria-labelledby="sanitizer"><h2 id="sanitizer">What the keyword filter removed</h2>'
        f"<p>Of {total} trajectories {total - kept} were dropped whole and {kept} kept. The check of what was kept, "
        f"over the text and over the text decoded from the token ids, found {counts['leaks']} leaks.</p>"
        f"<figure>{plots.bar_rows(bars, total)}<figcaption>A trajectory with several words counts under each of them."
        f"</figcaption></figure>{table}</section>"
    )


def _provenance(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    protocol = summary["protocol"]
    departed = "".join(f"<li>{escape(line)}</li>" for line in protocol["deviations"])
    frozen = protocol["frozen_hash"] or "none"
    timing = [table_row(stage, [f"{seconds:.1f}"]) for stage, seconds in summary["timing_s"].items()]
    speed = [table_row(name.replace("_", " "), [number(value, 0)]) for name, value in summary["throughput"].items()]
    versions = [table_row(name, [version]) for name, version in summary["versions"].items()]
    notes = "".join(f"<p>{escape(note)}</p>" for note in summary["notes"])
    settings = escape(json.dumps(config, indent=2, sort_keys=True, default=str))
    return (
        '<section aria-labelledby="provenance"><h2 id="provenance">How it was made</h2>'
        f"{notes}<h3>Protocol</h3><p>Hash <code>{escape(protocol['hash'])}</code>; frozen before the run: "
        f"<code>{escape(frozen)}</code>. {escape(protocol['analysis'])}. "
        f"Parser {escape(protocol['parser_version'])}.</p>"
        f"{f'<p>Deviations:</p><ul>{departed}</ul>' if departed else '<p>No deviations.</p>'}"
        + '<div class="columns">'
        + captioned_table("Time per stage", ("stage", "seconds"), timing)
        + captioned_table("Throughput", ("rate", "per second"), speed)
        + captioned_table("Versions", ("package", "version"), versions)
        + "</div>"
        + f"<details><summary>Configuration</summary><pre>{settings}</pre></details></section>"
    )
