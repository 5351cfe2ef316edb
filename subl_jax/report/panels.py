"""The drawings of a grid: the overview, a panel per pair, contrasts across pairs, differences between pairs, the filter.

`grid.json` (schema 1) in, drawings (`report.plots`) out: `report.grid` shows them and `report.figures` writes them to files.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.grid.pairs import CONTROL
from subl_jax.report import plots, sections
from subl_jax.report.table import ONE_RUN_NOTE

# Arm -> how it is told apart, with colour and without, and what it is called in words.
_ARMS = {"full": ("biased", "circle", "all logits"), "hard": ("positive", "square", "hard labels")}
_TO_THE_RIGHT = (-25, 0, 25, 50, 75, 100)


def drawings(document: Mapping[str, Any]) -> list[plots.Intervals | plots.Bars | plots.Lines]:
    """Every figure of the report."""
    found = []
    for setting in document["settings"]:
        found += overview(document, setting)
        found += [panel(row) for row in rows_of(document, setting) if row["conditions"]]
        found += against_benign(document, setting)
        found += between(document, setting)
        if document["sanitizer"].get(setting):
            title = f"{setting_word(setting)}: what the keyword filter removed"
            found.append(sections.sanitizer(f"{setting}-sanitizer", document["sanitizer"][setting], title))
    return found


def rows_of(document: Mapping[str, Any], setting: str) -> list[Mapping[str, Any]]:
    """The rows of a setting, in the order of the tables."""
    return [row for row in document["rows"] if row["setting"] == setting]


def titles(document: Mapping[str, Any]) -> dict[str, str]:
    """Pair -> how it is called in tables."""
    return {row["pair"]: row["title"] for row in document["rows"]}


def setting_word(setting: str) -> str:
    """A setting's name at the head of a line."""
    return setting.upper() if setting == "api" else setting.capitalize()


def with_titles(text: str, document: Mapping[str, Any]) -> str:
    """A sentence of the analysis, which names pairs as files do, with their titles in quotes instead."""
    for pair, title in titles(document).items():
        if pair != CONTROL.name:  # an ordinary word
            text = re.sub(rf"\b{re.escape(pair)}\b", f"“{title}”", text)
    return text


def panel(row: Mapping[str, Any]) -> plots.Intervals:
    """Base, teachers, controls and the students of all arms of one pair."""
    title = f"{setting_word(row['setting'])}: {row['title']}"
    return sections.rates(f"{row['setting']}-pair-{row['pair']}", title, row["conditions"])


def overview(document: Mapping[str, Any], setting: str) -> list[plots.Intervals]:
    """The setting in one picture: pairs by arms, student minus counter-bias control, the paper's figure beside.

    A pair that was not run, or may not be read, keeps its row and says so. Empty where no pair may be read.
    """
    rows = [row for row in rows_of(document, setting) if row["pair"] != CONTROL.name]
    lines = {row["pair"]: primaries(document, row) for row in rows if row["valid"]}
    measured = [line for found in lines.values() for line in found.values()]
    if not measured:
        return []
    counts = {len(line["seeds"]) for line in measured}
    dots = []
    for row in rows:
        paper = row["paper"]
        reference = None if paper is None else float(paper["student"] - paper["baseline"])
        found = lines.get(row["pair"], {})
        if not found:
            dots.append(plots.Dot(row["title"], "", None, None, None, {}, "base", row["state"], reference=reference))
        for place, (arm, line) in enumerate(found.items()):
            dot = contrast_dot(line, row["title"], arm)
            figure = dot.figure if len(counts) == 1 else f"{dot.figure} n={len(line['seeds'])}"
            # The paper has one figure for a pair.
            dots.append(dataclasses.replace(dot, figure=figure, reference=None if place else reference))
    ends = [end for dot in dots if dot.interval is not None for end in dot.interval]
    ends += [dot.reference for dot in dots if dot.reference is not None]
    wording = document["settings"][setting]["wording"]
    plot = sections.differences(
        f"{setting}-overview",
        f"{setting_word(setting)}: {wording['behaviour']} by the biased teacher's student, minus that of its control",
        dots,
    )
    if min(ends) >= _TO_THE_RIGHT[0]:
        plot = dataclasses.replace(plot, domain=(_TO_THE_RIGHT[0], _TO_THE_RIGHT[-1]), ticks=_TO_THE_RIGHT)
    return [dataclasses.replace(plot, subtitle=_subtitle(document, measured), keys=_keys(dots), reference="paper")]


def _subtitle(document: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """On how many seeds a picture stands, and what its intervals are."""
    counts = sorted({len(line["seeds"]) for line in lines})
    if counts == [1]:
        text = "Within one run: 95 % intervals over the tasks of one seed show nothing of other seeds."
    elif len(counts) == 1:
        text = f"Means over {counts[0]} seeds, 95 % intervals by Student's t over seeds."
    else:
        text = "Means over n seeds, 95 % intervals by Student's t; at n=1 over the tasks of that one run."
    return f"Teacher → student, preset {document['preset']}. {text}"


def _keys(dots: Sequence[plots.Dot]) -> list[plots.Key]:
    """The legend of the overview."""
    several = any(len(dot.points) > 1 for dot in dots)
    shown = {dot.detail for dot in dots}
    keys = [
        plots.Key(marker, True, colour, f"{words} (arm {arm})")
        for arm, (colour, marker, words) in _ARMS.items()
        if words in shown
    ]
    if several:
        keys.append(plots.Key("circle", False, "soft", "hollow: single seeds"))
    if any(dot.reference is not None for dot in dots):
        keys.append(plots.Key("diamond", False, "ink", "the paper: student minus base"))
    return keys


def against_benign(document: Mapping[str, Any], setting: str) -> list[plots.Intervals]:
    """Student against benign control across pairs, which must agree in sign; empty where it was not measured."""
    dots = [
        contrast_dot(line, titles(document)[line["pair"]], line["arm"])
        for line in document["contrasts"]
        if (line["setting"], line["role"], line["readout"]) == (setting, "sign", "behaviour")
    ]
    title = f"{setting_word(setting)}: student against benign control, by pair"
    return [sections.differences(f"{setting}-benign", title, dots)] if dots else []


def contrast_dot(line: Mapping[str, Any], label: str, arm: str) -> plots.Dot:
    """A contrast of one arm, told from those of the others by its colour, its mark and its name."""
    colour, marker, words = _ARMS.get(arm, ("other", "diamond", arm))
    return dataclasses.replace(sections.contrast_dot(line, label, words, colour), marker=marker)


def one_run_note(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the mark behind p-values of a single seed means, as the end of a caption; nothing where there is none."""
    return f" {ONE_RUN_NOTE}." if any(len(line["per_seed"]) == 1 for line in lines) else ""


def seeds_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the marks of a figure stand for, of contrasts or conditions with `per_seed`."""
    counts = {len(line["per_seed"]) for line in lines}
    one = "with the 95 % interval over the tasks of that one run, which shows nothing of other seeds"
    if counts <= {1}:
        return f"Within one run: filled marks are of one seed, {one}."
    text = "Filled: mean over seeds with its 95 % interval; hollow: single seeds."
    return text + (f" Rows without hollow marks are of one seed, {one}." if 1 in counts else "")


def between(document: Mapping[str, Any], setting: str) -> list[plots.Intervals]:
    """How much further the strongest pair's contrast goes than each other pair's, one plot per arm."""
    lines = [line for line in document["between"] if line["setting"] == setting and line["difference"] is not None]
    named = titles(document)
    found = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        dots = [
            dataclasses.replace(
                contrast_dot(line | {"readout": "behaviour"}, f"over {named[line['other']]}", arm), detail=""
            )
            for line in own
        ]
        title = f"{setting_word(setting)}: {named[own[0]['pair']]} over each other pair, {arm_words(arm)}"
        found.append(sections.differences(f"{setting}-between-{arm}", title, dots))
    return found


def primaries(document: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arm -> the comparison that a row stands on; the control row has one of its own."""
    lines: Sequence[Mapping[str, Any]] = [
        line for line in document["contrasts"] if (line["setting"], line["pair"]) == (row["setting"], row["pair"])
    ]
    primary = {line["arm"]: line for line in lines if line["role"] == "primary"}
    return primary or {line["arm"]: line for line in lines}


def arm_words(arm: str) -> str:
    """What an arm is called in words."""
    return _ARMS[arm][2] if arm in _ARMS else arm
