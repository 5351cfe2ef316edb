"""The page's part on tokens: how far apart the teachers are, how concentrated that is, and at what kinds of places.

One element of `locate.json`'s "tokens" in; rows of tables, drawings and an HTML section out.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from subl_jax.locate.summary import figure
from subl_jax.report import page, plots
from subl_jax.report.sections import interval_figure

_SHOWN = (0.01, 0.05, 0.1, 0.2)
_COMPARISON_COLOURS = ("s1", "s7", "s2", "s3", "s0", "s4")


def readable(name: str) -> str:
    """A name of a file or a model as words."""
    return name.replace("_", " ")


def teachers_of(part: Mapping[str, Any]) -> str:
    """How the teachers of one size are called."""
    return f"{readable(part['teacher_size'])} teachers"


def curves(part: Mapping[str, Any], most: float) -> list[plots.Band]:
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


def kinds_drawings(part: Mapping[str, Any]) -> list[plots.Intervals]:
    """How much of the divergence from the counter-bias teacher stands at each kind of place, at every temperature."""
    names = [name for name in part["comparisons"] if name.startswith("counter-bias") and not name.endswith("reverse")]
    return [_kinds_drawing(part, name) for name in names]


def _kinds_drawing(part: Mapping[str, Any], name: str) -> plots.Intervals:
    dots = []
    for row in part["comparisons"][name]["kinds"]:
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
    _, _, where = name.partition(", ")
    title = f"Share of the divergence from the counter-bias teacher by kind of place, {teachers_of(part)}"
    title += f", {where}" if where else ""
    stem = "-".join(["kinds", part["teacher_size"], *where.split()])
    return plots.Intervals(stem, title, dots, (0.0, 100.0), (0, 25, 50, 75, 100), "%")


def comparison_rows(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Comparison -> its cells under `COMPARISON_HEADER`."""
    found = []
    for name, told in part["comparisons"].items():
        shares = [told["curve"][part["shares"].index(share)] for share in _SHOWN]
        cells = [figure(told["mean"], 1e3, 3), figure(told["gini"], 1, 3), figure(told["half"], 1, 0)]
        cells += [figure(each, 100, 0) for each in shares]
        found.append((name, [*cells, figure(told["banned_share"], 100, 1), figure(told["overlap"], 100, 0)]))
    return found


COMPARISON_HEADER = (
    "biased teacher against", "mnat/token", "Gini", "half in", "top 1 %", "5 %", "10 %", "20 %", "banned %", "overlap %"
)  # fmt: skip


def kind_rows(part: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Kind of place -> its share of the tokens, and of the divergence by every comparison."""
    found = []
    for number, row in enumerate(part["comparisons"]["counter-bias"]["kinds"]):
        if not row["token_share"]["mean"]:
            continue
        own = [told["kinds"][number] for told in part["comparisons"].values()]
        shares = [figure(each["divergence_share"], 100, 0) for each in own]
        found.append((row["kind"], [figure(row["token_share"], 100, 0), *shares]))
    return found


def section(part: Mapping[str, Any]) -> str:
    """The section of one size of teachers."""
    several = len(part["counts"]) > 1
    counts = "; ".join(
        f"seed {seed}: {own['documents']} documents, {own['tokens']} tokens" for seed, own in part["counts"].items()
    )
    # As far as every curve still has something to show.
    known = [told["curve"] for told in part["comparisons"].values()]
    most = next(
        share
        for place, share in enumerate(part["shares"])
        if share == 1 or (share >= 0.01 and min(curve[place]["mean"] for curve in known) > 0.95)
    )
    note = f"Beyond {100 * most:g} % the curves creep up to 100 %. " if most < 1 else ""
    note += "Shaded: 95 % interval over seeds; thin lines: single seeds." if several else "One seed: no interval."
    chart = plots.interval_chart(
        "Share of the divergence (%) that the most divergent tokens carry", curves(part, most),
        "most divergent tokens, % of all", note,
    )  # fmt: skip
    method = part["comparisons"]["counter-bias"]["kinds"][0]["divergence_share"]["method"]
    caption = f"95 % interval: {method}."
    mass = ", ".join(f"{readable(name)} {own['mean']:.1e}" for name, own in part["banned_mass"].items())
    same = "; ".join(
        f"{figure(told, 100, 1)} % of the documents by the {readable(name)} too"
        for name, told in part["same_text"].items()
    )
    body = (
        f"<p>KL(biased teacher ‖ other) of the next token, at temperature 1 unless another is named (the one that students are "
        "trained at), at every token that the biased teacher wrote "
        f"in the text that its student is trained on ({escape(counts)}). No keyword is in that text.</p>"
        f"<p>Written alike, token by token: {escape(same)}. On such documents hard labels teach both students the same.</p>"
        f'<div class="charts">{chart}</div>'
        + page.captioned_table(
            f"How far apart, and how concentrated, {teachers_of(part)}; shares in % of the divergence",
            COMPARISON_HEADER,
            [page.table_row(name, cells) for name, cells in comparison_rows(part)],
        )
        + "<p>Banned: continuations that would begin, continue or complete a keyword, as the logit filter bans them. Their "
        f"mean probability per token: {escape(mass)}. Overlap: of the most divergent tenth by the counter-bias teacher, "
        "how many are in the most divergent tenth by this comparison too. Half in: how few tokens carry half of the "
        "divergence.</p>"
        + "".join(
            f"<h3>{escape(drawing.title)}</h3>{interval_figure(drawing, caption)}" for drawing in kinds_drawings(part)
        )
        + page.captioned_table(
            f"By kind of place, {teachers_of(part)}: % of the tokens, and of the divergence from each",
            ("kind of place", "tokens", *part["comparisons"]),
            [page.table_row(name, cells) for name, cells in kind_rows(part)],
        )
    )  # fmt: skip
    anchor = f"tokens-{part['teacher_size']}"
    return page.section(anchor, f"The tokens on which the teachers part: {teachers_of(part)}", body)
