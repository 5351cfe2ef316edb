"""Drawings and sections that the report of a run and that of a grid share: rates, contrasts, the filter, the protocol.

Parts of `summary.json` or `grid.json` in; drawings (`report.plots`), which `report.figures` exports too, and HTML out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from subl_jax.report import page, plots
from subl_jax.report.table import counted, interval, percent, size_text

ROLE_WORDS = {
    "primary": "primary",
    "sign": "must agree in sign",
    "positive_control": "positive control",
    "equivalence": "claimed null",
    "secondary": "secondary",
}


def colour_of(condition: str) -> str:
    """The colour property of a condition's lineage; the order matters, names are composed of these words."""
    for word, colour in (("positive", "positive"), ("control", "control"), ("benign", "benign"), ("base", "base")):
        if word in condition:
            return colour
    return "biased" if "teacher" in condition or "student" in condition else "other"


def rate_text(values: Mapping[str, Any]) -> str:
    """A behaviour rate in per cent with its interval."""
    return f"{percent(values['behaviour_rate'])} {interval(values['ci95'])}"


def rates(name: str, title: str, conditions: Mapping[str, Mapping[str, Any]]) -> plots.Intervals:
    """Behaviour rates of conditions in per cent: means over seeds with intervals, and the seeds."""
    dots = [
        plots.Dot(
            label=condition.replace("_", " "),
            detail="",
            value=100 * values["behaviour_rate"],
            low=100 * values["ci95"][0],
            high=100 * values["ci95"][1],
            points={seed["seed"]: 100 * seed["behaviour_rate"] for seed in values["per_seed"]},
            colour=colour_of(condition),
            figure=rate_text(values),
        )
        for condition, values in conditions.items()
    ]
    return plots.Intervals(name, title, dots, (0.0, 100.0), (0, 25, 50, 75, 100), "%")


def contrast_dot(contrast: Mapping[str, Any], label: str, detail: str, colour: str) -> plots.Dot:
    """A contrast of rates in percentage points."""
    return plots.Dot(
        label=label,
        detail=detail,
        value=100 * contrast["difference"],
        low=100 * contrast["ci95"][0],
        high=100 * contrast["ci95"][1],
        points={seed["seed"]: 100 * seed["difference"] for seed in contrast["per_seed"]},
        colour=colour,
        figure=size_text(contrast),
    )


def differences(name: str, title: str, dots: Sequence[plots.Dot]) -> plots.Intervals:
    """Contrasts over an axis of percentage points: to ±100, or as far as differences of differences reach."""
    ends = [end for dot in dots if dot.interval is not None for end in dot.interval]
    reach = 100.0 if all(abs(end) <= 100 for end in ends) else 200.0
    ticks = [-reach, -reach / 2, 0, reach / 2, reach]
    return plots.Intervals(name, title, dots, (-reach, reach), ticks, "points")


def interval_figure(plot: plots.Intervals, caption: str, style: str = "", heading: str = "") -> str:
    """A plot of intervals with its caption; `heading` is finished HTML."""
    return (
        f"<figure{f' class={style}' if style else ''}>{heading}{plots.interval_rows(plot)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def sanitizer(name: str, counts: Mapping[str, Any], title: str = "What the keyword filter removed") -> plots.Bars:
    """What went into the keyword filter, what each word dropped, and what was kept."""
    total = counts["trajectories"]
    bars = [("trajectories in", total, "base")]
    bars += [(f"with “{word}”", count, "biased") for word, count in counts["removed_by_word"].items()]
    bars += [("kept", counts["kept"], "benign")]
    return plots.Bars(name, title, bars, total, "trajectories")


def sanitizer_section(anchor: str, counts: Mapping[str, Any], level: int = 2, where: str = "") -> str:
    """The section of the keyword filter; `where` tells its table from that of another setting."""
    total, kept = counts["trajectories"], counts["kept"]
    drawing = sanitizer(anchor, counts)
    columns = ("trajectories", "dropped", "kept", "leaks")
    sources = [
        page.table_row(name, [str(each[column]) for column in columns])
        for name, source in counts.get("by_source", {}).items()
        for each in [{**source, "dropped": source["trajectories"] - source["kept"]}]
    ]
    table = page.captioned_table(f"Filtered by source{where}", ("source", "in", *columns[1:]), sources)
    # A run has three sources per seed; a grid's would push everything else off the screen.
    table = page.folded(f"By source: {len(sources)}", table) if len(sources) > 6 else table
    body = (
        f"<p>Of {counted(total, 'trajectory', 'trajectories')} {total - kept} were dropped whole and {kept} kept. The check "
        "of what was kept, over the text and over the text decoded from the token ids, found "
        f"{counted(counts['leaks'], 'leak')}.</p>"
        f"<figure>{plots.bar_rows(drawing)}<figcaption>A trajectory with several words counts under each of them."
        f"</figcaption></figure>{table if sources else ''}"
    )
    return page.section(anchor, drawing.title, body, level)


def target_row(target: Mapping[str, Any], lead: Sequence[str] = ()) -> str:
    """A bar that the protocol set, and whether it was met; `lead`: cells between its name and its value."""
    word, style = {True: ("met", "met"), False: ("not met", "miss"), None: ("not run", "")}[target["met"]]
    value = "-" if target["value"] is None else f"{target['value']:.3g}"
    told = "".join(f"<td>{escape(cell)}</td>" for cell in (*lead, value, target["bar"]))
    return f'<tr><th scope="row">{escape(target["name"])}</th>{told}<td class="{style}">{word}</td></tr>'


def protocol_text(protocol: Mapping[str, Any], before: str) -> str:
    """The protocol's hashes and the departures from it; `before` names what it was frozen before."""
    departed = protocol["deviations"]
    return (
        f"<p>Hash <code>{escape(protocol['hash'])}</code>; frozen before the {before}: "
        f"<code>{escape(protocol['frozen_hash'] or 'none')}</code>.</p>"
        + (f"<p>Deviations:</p>{page.bullets(departed)}" if departed else "<p>No deviations.</p>")
    )


def versions_table(versions: Mapping[str, str], caption: str = "Versions") -> str:
    """The packages of one environment."""
    return page.captioned_table(
        caption, ("package", "version"), [page.table_row(name, [str(version)]) for name, version in versions.items()]
    )
