"""The report's learning curves, drawn from the records of `metrics.jsonl`.

In: {"stage", "step", optional "seed", metric: value, ...}. Out: an HTML section with one chart per kind of stage and
metric; a stage such as "teachers/deletion" is the line "deletion" in the charts of "teachers".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.report import plots

# What a person watches while training; rates, timings and counters stay in metrics.jsonl and TensorBoard.
_SHOWN = ("loss", "kl", "divergence", "cross_entropy", "accuracy", "agreement")
_COLOURS = 8
# What is measured as a share; everything else that is shown is a loss or a divergence.
_SHARES = ("accuracy", "agreement")


def _lines(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[tuple[str, Any], list[tuple]]]:
    """(kind of stage, metric) -> (line, seed) -> [(step, value)]."""
    charts: dict[tuple[str, str], dict[tuple[str, Any], list[tuple]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        kind, _, line = str(record["stage"]).partition("/")
        for name, value in record.items():
            words = name.lower().replace("/", "_").split("_")
            # The writer records a value that is not finite as null; the chart says how many it left out.
            value = math.nan if value is None else value
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            counted = "tokens" in words  # loss_tokens, loss_tokens_per_s: how much, not how well
            if numeric and not counted and any(shown in words or shown == name for shown in _SHOWN):
                charts[kind, name][line or kind, record.get("seed")].append((record["step"], value))
    return charts


def drawings(records: Sequence[Mapping[str, Any]]) -> list[plots.Lines]:
    """One chart per kind of stage and metric, a line per stage and seed."""
    found = []
    for (kind, metric), lines in _lines(records).items():
        names = list(dict.fromkeys(line for line, _ in lines))
        series = []
        for (line, seed), points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            colour = f"s{names.index(line) % _COLOURS}"
            series.append(
                plots.Series(line, [step for step, _ in points], [value for _, value in points], colour, seed)
            )
        unit = "share" if any(name in metric for name in _SHARES) else "nats per token"
        title = f"{kind}: {metric}".replace("_", " ")
        found.append(plots.Lines(f"curve-{kind}-{metric}", f"{title} ({unit})", series))
    return found


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """The section of learning curves; says so where nothing was recorded."""
    figures = [plots.line_chart(drawing) for drawing in drawings(records)]
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>No training metrics were recorded.</p>"
    seeds = {record.get("seed") for record in records}
    note = "<p>One line per stage and seed; seeds share a colour.</p>" if len(seeds) > 1 else ""
    return f'<section aria-labelledby="curves"><h2 id="curves">Learning curves</h2>{note}{body}</section>'
