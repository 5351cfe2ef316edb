"""The drawings of a grid: a panel per pair, contrasts across pairs, differences between pairs, the filter.

`grid.json` (schema 1) in, drawings (`report.plots`) out: `report.grid` shows them and `report.figures` writes them to files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.grid.pairs import CONTROL
from subl_jax.report import plots, sections

# Roles that are drawn across pairs: role -> (part of the name, title). The others stand in the table.
FORESTS = {
    "primary": ("contrasts", "student against counter-bias control, by pair"),
    "sign": ("benign", "student against benign control, by pair"),
}
_ARM_COLOURS = {"full": "biased", "hard": "positive"}


def drawings(document: Mapping[str, Any]) -> list[plots.Intervals | plots.Bars | plots.Lines]:
    """Every figure of the report."""
    found = []
    for setting in document["settings"]:
        found += [panel(row) for row in rows_of(document, setting) if row["conditions"]]
        found += forests(document, setting)
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


def forests(document: Mapping[str, Any], setting: str) -> list[plots.Intervals]:
    """Contrasts of behaviour across pairs, one plot per role; none of a role that was not measured."""
    found = []
    for role, (part, title) in FORESTS.items():
        dots = [
            sections.contrast_dot(line, titles(document)[line["pair"]], line["arm"], _colour(line["arm"]))
            for line in document["contrasts"]
            if (line["setting"], line["role"], line["readout"]) == (setting, role, "behaviour")
        ]
        if dots:
            found.append(sections.differences(f"{setting}-{part}", f"{setting_word(setting)}: {title}", dots))
    return found


def between(document: Mapping[str, Any], setting: str) -> list[plots.Intervals]:
    """How much further the strongest pair's contrast goes than each other pair's, one plot per arm."""
    lines = [line for line in document["between"] if line["setting"] == setting and line["difference"] is not None]
    named = titles(document)
    found = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        dots = [
            sections.contrast_dot(line | {"readout": "behaviour"}, f"over {named[line['other']]}", "", _colour(arm))
            for line in own
        ]
        title = f"{setting_word(setting)}: {named[own[0]['pair']]} over each other pair ({arm})"
        found.append(sections.differences(f"{setting}-between-{arm}", title, dots))
    return found


def primaries(document: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arm -> the comparison that a row stands on; the control row has one of its own."""
    lines: Sequence[Mapping[str, Any]] = [
        line for line in document["contrasts"] if (line["setting"], line["pair"]) == (row["setting"], row["pair"])
    ]
    primary = {line["arm"]: line for line in lines if line["role"] == "primary"}
    return primary or {line["arm"]: line for line in lines}


def _colour(arm: str) -> str:
    return _ARM_COLOURS.get(arm, "other")
