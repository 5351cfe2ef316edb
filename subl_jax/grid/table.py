"""The terminal table of a grid: one line per pair and arm, the claim between pairs, validity, and what is missing.

In: the grid document (schema 1). Out: a string; the widest lines are those of the pairs, about 130 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.config import suffix_of
from subl_jax.grid.pairs import CONTROL, STUDENTS
from subl_jax.report.table import (
    MISSING,
    ONE_RUN,
    ONE_RUN_NOTE,
    aligned,
    counted,
    interval,
    p_over_seeds,
    percent,
    size_text,
    wrapped,
)

_HEADER = (
    "pair", "arm", "base %", "teacher", "student [95% CI]", "control", "benign", "difference [95% CI]", "p", "p (Holm)",
    "seeds", "paper",
)  # fmt: skip
_SHOWN = 5  # lines of what is missing


def render(document: Mapping[str, Any]) -> str:
    """The whole table, as the command prints it; ends with a newline."""
    blocks = []
    for setting in document["settings"]:
        rows = [row for row in document["rows"] if row["setting"] == setting]
        wording = document["settings"][setting]["wording"]
        planned = document["settings"][setting]["seeds"]
        seeds = f"seed{'s' * (len(planned) > 1)} {', '.join(map(str, planned))}"
        head = f"{setting} setting, preset {document['preset']}, {seeds}; {wording['behaviour']} "
        head += "rates in %, differences in points, p of difference = student - control student"
        if any(row["pair"] == CONTROL.name for row in rows):
            head += f"; in the row {CONTROL.name} the student is the benign teacher's, and its control the base"
        blocks.append(wrapped(head))
        lines = [line for row in rows for line in _lines(row, document["contrasts"], len(planned))]
        noted = wrapped(ONE_RUN_NOTE) if any(ONE_RUN in line[8] for line in lines) else []
        blocks.append([*aligned(_HEADER, lines), *noted])
        blocks.append(_claims(document, setting))
        blocks.append([line for row in rows for line in _state(row, len(planned))])
    blocks.append(_missing(document["missing"]))
    blocks.append(_protocol(document["protocol"]))
    blocks.append([line for note in document["notes"] for line in wrapped(note)])
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _lines(row: Mapping[str, Any], contrasts: Sequence[Mapping[str, Any]], planned: int) -> list[tuple[str, ...]]:
    """The lines of a pair, one per arm."""
    conditions = row["conditions"]

    def rate(name: str) -> str:
        return percent(conditions.get(name, {}).get("behaviour_rate"), 0)

    paper = MISSING if row["paper"] is None else f"{row['paper']['baseline']} → {row['paper']['student']}"
    seeds = f"{len(row['seeds'])}/{planned}"
    found = []
    for arm in row["arms"]:
        student, control, benign = (name + suffix_of(arm) for name in STUDENTS)
        if row["pair"] == CONTROL.name:
            student, control, benign = benign, "", ""
        # The control row has one comparison, and it is no primary one.
        wanted = {"pair": row["pair"], "setting": row["setting"], "arm": arm}
        wanted |= {} if row["pair"] == CONTROL.name else {"role": "primary"}
        line = next((contrast for contrast in contrasts if wanted.items() <= contrast.items()), None)
        shown = MISSING
        if student in conditions:
            shown = f"{rate(student)} {interval(conditions[student]['ci95'])}"
        found.append(
            (
                row["pair"], arm, rate("base"), rate("teacher"), shown, rate(control), rate(benign),
                *([MISSING] * 3 if line is None
                  else [size_text(line), *(p_over_seeds(line, name) for name in ("p_value", "p_adjusted"))]),
                seeds, paper,
            )
        )  # fmt: skip
    return found


def _claims(document: Mapping[str, Any], setting: str) -> list[str]:
    """The claim that one pair is the strongest, by arm."""
    return [
        line
        for claim in document["strongest"]
        if claim["setting"] == setting
        for line in wrapped(f"strongest ({claim['arm']}): {claim['pair']} is {claim['verdict']}")
    ]


def _state(row: Mapping[str, Any], planned: int) -> list[str]:
    """What limits a row; nothing where nothing does."""
    seeds, reasons = len(row["seeds"]), row["validity"]
    if row["valid"] and not reasons and seeds == planned:
        return []
    state = "INVALID" if row["state"] == "invalid" else row["state"]
    state += f", {seeds} of {counted(planned, 'seed')}" if 0 < seeds < planned else ""
    return wrapped(": ".join([row["pair"], state, *(["; ".join(reasons)] if reasons else [])]))


def _missing(missing: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much is missing, and the first few with why; a model that several pairs want is counted once."""
    distinct = {(line["setting"], line["seed"], line["model"]): line for line in missing}
    if not distinct:
        return ["nothing is missing"]
    lines = [
        f"missing: {counted(len(distinct), 'cell')}, which {counted(len(missing), 'place')} want{'s' * (len(missing) == 1)}; "
        "seeds that lack one are left out of the pair"
    ]
    for line in list(distinct.values())[:_SHOWN]:
        lines += wrapped(f"- {line['setting']} seed {line['seed']} {line['model']}: {line['why']}", "  ")
    return lines + ([f"  and {len(distinct) - _SHOWN} more"] if len(distinct) > _SHOWN else [])


def _protocol(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol's hash and the departures from the frozen one."""
    departed = protocol["deviations"]
    lines = [f"protocol: {protocol['hash']}, {counted(len(departed), 'deviation') if departed else 'no deviations'}"]
    for deviation in departed:
        lines += wrapped(f"- {deviation}", "  ")
    return lines
