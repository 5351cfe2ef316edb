"""The terminal table of a run: conditions, contrasts, sanitizer counts, targets and validity as aligned plain text.

In: a `summary.json` value (schema 1). Out: a string whose lines hold at most 110 columns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.evaluate.protocol import COUNTER_READOUT
from subl_jax.evaluate.verdicts import p_text

WIDTH = 110
_NAME_WIDTH = 30
MISSING = "-"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage without the sign, or a dash where it was not measured."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int = 2) -> str:
    """A real number, or a dash where it was not measured."""
    return MISSING if value is None else f"{value:.{digits}f}"


def interval(limits: Sequence[float], scale: float = 100.0) -> str:
    """Confidence limits in brackets; rates are scaled to per cent."""
    digits = 0 if scale == 100.0 else 2
    # Zero is added: what rounds to nothing has no sign.
    low, high = (round(scale * limit, digits) + 0.0 for limit in limits)
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def _shorten(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 2] + ".."


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header and a rule: the first column to the left, the others to the right, two spaces between."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def conditions_table(summary: Mapping[str, Any]) -> list[str]:
    """One line per condition; rates in per cent, means over seeds."""
    wording = summary["wording"]
    header = ("condition", f"{wording['behaviour']} % [95% CI]", "greedy %", f"{wording['counter']} %", "log-odds")
    header += ("utility", "unparsed %", "n")
    rows = [
        (
            _shorten(name, _NAME_WIDTH),
            f"{percent(values['behaviour_rate'])} {interval(values['ci95']):>9}",
            percent(values["greedy_rate"]),
            percent(values["counter_rate"]),
            number(values["log_odds"]),
            number(values["utility"]),
            percent(values["unparseable"]),
            str(values["n"]),
        )
        for name, values in summary["conditions"].items()
    ]
    return aligned(header, rows)


def readout_text(contrast: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """How a contrast's readout is called; the counter-bias's is stored under one name, whatever the setting calls it."""
    readout = contrast["readout"]
    return summary["wording"]["counter"] if readout == COUNTER_READOUT else readout


def size_text(contrast: Mapping[str, Any]) -> str:
    """A contrast's difference with its interval: points for rates, nats for log-odds."""
    if contrast["readout"] == "log_odds":
        return f"{contrast['difference']:+.2f} {interval(contrast['ci95'], 1.0)}"
    return f"{100 * contrast['difference']:+.1f} {interval(contrast['ci95'])}"


def contrasts_table(summary: Mapping[str, Any]) -> list[str]:
    """One line per contrast and its verdict beneath; differences in percentage points (log-odds in nats)."""
    header = ("contrast", "readout", "role", "difference [95% CI]", "p", "p (Holm)")
    rows = [
        (
            _shorten(contrast["name"], 40),
            readout_text(contrast, summary),
            contrast["role"].replace("_", " "),
            size_text(contrast),
            p_cell(contrast["p_value"]),
            p_cell(contrast["p_adjusted"]),
        )
        for contrast in summary["contrasts"]
    ]
    title, rule, *lines = aligned(header, rows)
    body = []
    for line, contrast in zip(lines, summary["contrasts"], strict=True):
        body += [line, *wrapped(contrast["verdict"], "    ")]
    return [title, rule, *body]


def p_cell(value: float) -> str:
    """A p-value for a column of p-values."""
    return p_text(value).removeprefix("p ").removeprefix("= ")


# Behind a p-value that is no p over seeds, and what it means.
ONE_RUN = "†"
ONE_RUN_NOTE = (
    f"{ONE_RUN} within one run: interval and p are over the tasks of its one seed, and show nothing of other seeds"
)


def p_over_seeds(line: Mapping[str, Any], name: str) -> str:
    """A p-value of a contrast (`name`: which) for a column; marked where it stands on one seed, a dash where there is none."""
    if line[name] is None:
        return MISSING
    return p_cell(line[name]) + (f" {ONE_RUN}" if len(line["per_seed"]) == 1 else "")


def counted(number: int, thing: str, things: str = "") -> str:
    """A number of things, as "1 seed" or "2 seeds"; `things`: a plural that does not end in s alone."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of at most `WIDTH` columns."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def sanitizer_line(summary: Mapping[str, Any]) -> list[str]:
    """Trajectories in, dropped by word, kept, and leaks."""
    counts = summary["sanitizer"]
    words = ", ".join(f"{word} {count}" for word, count in counts["removed_by_word"].items()) or "none"
    dropped = counts["trajectories"] - counts["kept"]
    return wrapped(
        f"sanitizer: {counted(counts['trajectories'], 'trajectory', 'trajectories')}, {dropped} dropped (by word: {words}), "
        f"{counts['kept']} kept, {counted(counts['leaks'], 'leak')}",
    )


def targets_table(summary: Mapping[str, Any]) -> list[str]:
    """The protocol's bars against what was measured."""
    words = {True: "met", False: "NOT MET", None: "not run"}
    rows = [
        (target["name"], f"{target['value']:.3g}" if target["value"] is not None else MISSING, target["bar"])
        + (words[target["met"]],)
        for target in summary["targets"]
    ]
    return aligned(("target", "measured", "bar", "verdict"), rows)


def validity_lines(summary: Mapping[str, Any]) -> list[str]:
    """Whether the run is valid, the positive control, what limits it, and the protocol."""
    judged, protocol = summary["validity"], summary["protocol"]
    lines = [f"run: {'valid' if judged['valid'] else 'INVALID'}; positive control: {judged['positive_control']}"]
    lines[0] = lines[0].replace("not_run", "not run")
    for message in judged["messages"]:
        lines += wrapped(f"- {message}", "  ")
    departed = protocol["deviations"]
    lines.append(
        f"protocol: {protocol['hash']}, {counted(len(departed), 'deviation') if departed else 'no deviations'}"
    )
    for deviation in departed:
        lines += wrapped(f"- {deviation}", "  ")
    return lines


def render(summary: Mapping[str, Any]) -> str:
    """The whole table, as the commands print it; ends with a newline."""
    seeds = ", ".join(map(str, summary["seeds"]))
    blocks = [
        [f"{summary['setting']} setting, preset {summary['preset']}, seed{'s' if ',' in seeds else ''} {seeds}"],
        conditions_table(summary),
        contrasts_table(summary),
        targets_table(summary),
        sanitizer_line(summary) + validity_lines(summary),
        wrapped(summary["answer"]),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"
