"""What a person reads of the on-policy study: a table in the terminal and one self-contained page with its figures.

In: the study's result, as `on_policy.json` holds it. Out: text, HTML without scripts and outside references, or drawings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from subl_jax.artifacts import write_text_atomic
from subl_jax.report import plots
from subl_jax.report.page import captioned_table, table_row, whole_page
from subl_jax.report.table import MISSING, aligned, p_cell, percent, wrapped

QUESTION = (
    "At equal student tokens, does a student come closer to its teacher when it is trained on what it says itself than "
    "when it is trained on what the teacher says?"
)
_COLOURS = {"off_policy": "s0", "mixed": "s2", "on_policy": "s1"}
_TITLES = {
    "student": "Student's states: reverse KL, nats per token",
    "teacher": "Teacher's states: reverse KL, nats per token",
}


def arm_word(arm: str) -> str:
    """An arm's name for readers."""
    return arm.replace("_", "-")


def size_text(value: float, limits: Sequence[float] | None, sign: bool = False) -> str:
    """A figure in nats with its interval, where it has one."""
    style = "+.4f" if sign else ".4f"
    return f"{value:{style}}" + ("" if limits is None else f" [{limits[0]:{style}}, {limits[1]:{style}}]")


def _end_cells(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Arm -> cells at its end: loss tokens, both divergences, how its own episodes went. The start and the teacher besides."""
    found = []
    points: dict[tuple[str, str], Any] = {(each["arm"], each["states"]): each["points"] for each in result["curves"]}
    arms = list(dict.fromkeys(each["arm"] for each in result["curves"]))
    for name, arm, place in [("before training", arms[0], 0), *((arm_word(arm), arm, -1) for arm in arms)]:
        own, theirs = points[arm, "student"][place], points[arm, "teacher"][place]
        cells = [
            f"{own['loss_tokens'] / 1000:.1f}",
            size_text(own["reverse_kl"], own["ci95"]),
            size_text(theirs["reverse_kl"], theirs["ci95"]),
        ]
        found.append((name, [*cells, *_episode_cells(own)]))
    return [*found, ("teacher", [MISSING, MISSING, MISSING, *_episode_cells(result["teacher"])])]


def _episode_cells(figures: Mapping[str, float]) -> list[str]:
    return [percent(figures["done"]), percent(figures["cut_off"]), f"{figures['episode_tokens']:.1f}"]


_END_HEADER = (
    "arm", "loss tokens, k", "reverse KL, student's states", "reverse KL, teacher's states", "done %", "cut off %",
    "tokens",
)  # fmt: skip
_CONTRAST_HEADER = ("at equal loss tokens", "states", "treatment", "control", "difference [95% CI]", "p", "p (Holm)")


def _contrast_cells(contrast: Mapping[str, Any]) -> list[str]:
    p, adjusted = contrast["p_value"], contrast["p_adjusted"]
    return [
        f"{contrast['states']}'s",
        f"{contrast['treatment_kl']:.4f}",
        f"{contrast['control_kl']:.4f}",
        size_text(contrast["difference"], contrast["ci95"], sign=True),
        MISSING if p is None else p_cell(p),
        MISSING if adjusted is None else p_cell(adjusted),
    ]


def table(result: Mapping[str, Any]) -> str:
    """The terminal's table; ends with a newline."""
    seeds = ", ".join(map(str, result["seeds"]))
    tokens = result["contrasts"][0]["loss_tokens"]
    header = (_END_HEADER[0], _END_HEADER[1], "KL, own states", "KL, teacher's states", *_END_HEADER[4:])
    blocks = [
        [f"on-policy study, preset {result['preset']}, seed{'s' if ',' in seeds else ''} {seeds}"],
        aligned(header, [(name, *cells) for name, cells in _end_cells(result)]),
        [
            f"reverse KL in nats per token at {tokens / 1000:.1f} k loss tokens",
            *aligned(
                _CONTRAST_HEADER,
                [(_contrast_name(each), *_contrast_cells(each)) for each in result["contrasts"]],
            ),
        ],
        wrapped(result["answer"]),
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _contrast_name(contrast: Mapping[str, Any]) -> str:
    return f"{arm_word(contrast['treatment'])} - {arm_word(contrast['control'])}"


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the page, atomically."""
    write_text_atomic(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page as a string."""
    sections = [
        _header(result),
        "<main>",
        _curves(result),
        _equal_tokens(result),
        _ends(result),
        _provenance(result),
        "</main>",
        "<footer><p>Written by subl_jax; every row is in <code>on_policy.json</code> beside this file.</p></footer>",
    ]
    return whole_page(f"subl_jax: on-policy study, {result['preset']}", sections)


def _header(result: Mapping[str, Any]) -> str:
    first = result["contrasts"][0]
    tiles = [
        ("preset", result["preset"]),
        ("seeds", ", ".join(map(str, result["seeds"]))),
        ("objective", result["study"]["loss"]),
        ("loss tokens compared, k", f"{first['loss_tokens'] / 1000:.1f}"),
    ]
    tiles += [
        (f"{_contrast_name(each)}, {each['states']}'s states", f"{each['difference']:+.4f}")
        for each in result["contrasts"]
        if each["treatment"] == first["treatment"]
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in tiles)
    return (
        f'<header><p class="kicker">On-policy distillation</p><h1>{QUESTION}</h1>'
        f'<p class="answer">{escape(result["answer"])}</p><dl class="tiles">{cells}</dl></header>'
    )


def drawings(result: Mapping[str, Any]) -> list[plots.Bands]:
    """Every figure of the page."""
    several = len(result["seeds"]) > 1
    note = (
        "Points: means over seeds. Shaded: 95 % interval, Student's t over seeds. Thin lines: single seeds. " * several
    )
    note += "Dashed: where the arms are compared."
    found = [
        _drawing(result, f"reverse-kl-{states}", states, title, "reverse_kl", note) for states, title in _TITLES.items()
    ]
    solved = "Share of held-out tasks that the student solves"
    return [*found, _drawing(result, "solved", "student", solved, "done", "")]


def _curves(result: Mapping[str, Any]) -> str:
    charts = [
        plots.interval_chart(each.title, each.bands, each.x_label, each.note, each.marked_x)
        for each in drawings(result)
    ]
    return (
        '<section aria-labelledby="curves"><h2 id="curves">Along the way</h2>'
        "<p>KL(student ‖ teacher) at temperature 1, mean over assistant tokens of held-out safe tasks. The student's states: "
        "conversations that this very student has just had. The teacher's states: those that the teacher had, the same at "
        "every point.</p>"
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def _drawing(result: Mapping[str, Any], name: str, states: str, title: str, value: str, note: str) -> plots.Bands:
    bands = []
    for each in result["curves"]:
        if each["states"] != states:
            continue
        points = each["points"]
        singles = []
        for place in range(len(result["seeds"]) if len(result["seeds"]) > 1 else 0):
            own = [point["per_seed"][place] for point in points]
            singles.append(([one["loss_tokens"] / 1000 for one in own], [one[value] for one in own]))
        bands.append(
            plots.Band(
                arm_word(each["arm"]),
                [point["loss_tokens"] / 1000 for point in points],
                [point[value] for point in points],
                [point["ci95"] if value == "reverse_kl" else None for point in points],
                singles,
                _COLOURS.get(each["arm"], "s7"),
            )
        )
    marked = result["contrasts"][0]["loss_tokens"] / 1000
    return plots.Bands(name, title, bands, "loss tokens trained on, thousands", note, marked)


def _equal_tokens(result: Mapping[str, Any]) -> str:
    rows = [table_row(_contrast_name(each), _contrast_cells(each)) for each in result["contrasts"]]
    tokens = result["contrasts"][0]["loss_tokens"]
    methods = "; ".join(dict.fromkeys(each["method"] for each in result["contrasts"]))
    return (
        '<section aria-labelledby="equal"><h2 id="equal">At equal student tokens</h2>'
        f"<p>All arms make equally many steps of equally many rows, but a row of one holds more loss tokens than a row of "
        f"another. They are compared at {tokens:,.0f} loss tokens, the most that every arm and seed has reached, on the "
        f"straight line between neighbouring points. Paired by seed: {escape(methods)}.</p>"
        + captioned_table("Reverse KL in nats per token; negative: closer to the teacher", _CONTRAST_HEADER, rows)
        + "</section>"
    )


def _ends(result: Mapping[str, Any]) -> str:
    rows = [table_row(name, cells) for name, cells in _end_cells(result)]
    return (
        '<section aria-labelledby="ends"><h2 id="ends">Is closer also as able?</h2>'
        "<p>How the held-out episodes went, and what was reached, at each arm's own end. A student on its own states may "
        "come close to its teacher by saying little: its length and its tasks stand beside.</p>"
        + captioned_table(
            "Means over seeds; done, cut off and assistant tokens per episode are of the model's own episodes",
            _END_HEADER,
            rows,
        )
        + "</section>"
    )


def _provenance(result: Mapping[str, Any]) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in result["notes"])
    study = [table_row(name, [str(value)]) for name, value in result["study"].items()]
    timing = [table_row(name, [f"{seconds:.1f}"]) for name, seconds in result["timing_s"].items()]
    versions = [table_row(name, [str(version)]) for name, version in result["versions"].items()]
    settings = escape(json.dumps(result["config"], indent=2, sort_keys=True, default=str))
    return (
        f'<section aria-labelledby="provenance"><h2 id="provenance">How it was made</h2>{notes}<div class="columns">'
        + captioned_table("The study", ("setting", "value"), study)
        + captioned_table("Time per kind of stage, all seeds", ("stage", "seconds"), timing)
        + captioned_table("Versions", ("package", "version"), versions)
        + f"</div><details><summary>Configuration</summary><pre>{settings}</pre></details></section>"
    )
