"""A sweep's numbers as text: the terminal's table, and a CSV with every per-seed value.

`sweep.json` (schema 1) in, strings out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from subl_jax.report.table import MISSING, aligned, number, p_cell, percent, size_text, wrapped

TRANSFER = (
    "level", "student %", "control %", "benign %", "contrast [95% CI]", "p (Holm)", "utility", "verdict",
)  # fmt: skip
AGAINST = ("level", "against", "difference [95% CI]", "p", "p (Holm)")


def transfer_cells(line: Mapping[str, Any]) -> list[str]:
    """The cells of a level behind its name; see `TRANSFER`."""
    conditions, primary = line["conditions"], line["contrasts"].get("primary")
    if primary is None:
        return [MISSING] * 6 + [line["verdict"]["word"]]
    rates = [percent(conditions[name]["behaviour_rate"]) for name in line["students"].values()]
    utility = number(conditions[line["students"]["student"]]["utility"])
    return [*rates, size_text(primary), p_cell(primary["p_adjusted"]), utility, line["verdict"]["word"]]


def difference_text(line: Mapping[str, Any]) -> str:
    """A difference between two levels with its interval, if it has one."""
    nats = line["measure"] == "log_odds"
    if line["ci95"] is not None:
        return size_text({"readout": "log_odds" if nats else "behaviour", **line})
    return f"{line['difference']:+.2f}" if nats else f"{100 * line['difference']:+.1f}"


def render(document: Mapping[str, Any]) -> str:
    """The whole table, as the command prints it; ends with a newline."""
    sweep = document["sweep"]
    seeds = ", ".join(map(str, document["seeds"]))
    head = f"{sweep['name']}: {document['setting']} setting, preset {document['preset']}, seed{'s' * (', ' in seeds)} {seeds}"
    rows = [(line["label"] + " *" * line["reference"], *transfer_cells(line)) for line in document["levels"]]
    blocks = [[head], [*aligned(TRANSFER, rows), "contrast: student minus control, points; * reference"]]
    broken = [line for line in document["levels"] if line["broken"]]
    blocks += [[text for line in broken for text in wrapped(f"broken: {line['label']}: {'; '.join(line['broken'])}")]]
    names = {line["label"]: f"{line['label']}{': broken' * bool(line['broken'])}" for line in document["levels"]}
    compared = [line for line in document["differences"] if line["measure"] == "behaviour"]
    against = {line["against"] for line in compared}
    rows = []
    for line in compared:
        cells = [MISSING if line[name] is None else p_cell(line[name]) for name in ("p_value", "p_adjusted")]
        lead = [names[line["level"]], *([names[line["against"]]] if len(against) > 1 else [])]
        rows.append((*lead, difference_text(line), *cells))
    if rows:
        header = AGAINST if len(against) > 1 else (AGAINST[0], *AGAINST[2:])
        other = "the one that it is compared with" if len(against) > 1 else f"the reference, {names[min(against)]}"
        blocks.append([f"contrast in points, minus that of {other}", *aligned(header, rows)])
    missing = [
        text
        for line in document["missing"]
        for text in wrapped(f"missing: {line['level']}: {line['model']} (seed {line['seed']}): {line['why']}")
    ]
    blocks += [missing, wrapped(document["answer"])]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def csv_text(document: Mapping[str, Any]) -> str:
    """A row per level, condition and seed with every figure; what is missing has a row that says why."""
    stream = io.StringIO()
    axes, figures = document["sweep"]["axes"], document["figures"]
    header = [
        "setting", "sweep", "level", *axes, "pair", "arm", "seed", "condition", "model", "n", *figures, "broken", "missing",
    ]  # fmt: skip
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    for line in document["levels"]:
        lead = [document["setting"], document["sweep"]["name"], line["label"], *line["at"], line["pair"], line["arm"]]
        told = "; ".join(line["broken"])
        for condition, values in line["conditions"].items():
            for each in values["per_seed"]:
                values_told = ["" if each[name] is None else each[name] for name in ("n", *figures)]
                writer.writerow([*lead, each["seed"], condition, line["models"][condition], *values_told, told, ""])
        empty = [""] * (1 + len(figures))
        for hole in document["missing"]:
            if hole["level"] == line["label"]:
                writer.writerow([*lead, hole["seed"], hole["condition"], hole["model"], *empty, told, hole["why"]])
    return stream.getvalue()
