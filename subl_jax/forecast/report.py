"""What an audit prints and writes: a table and a sentence for candidates; correlations, files and figures for a grid."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.config import STUDENT_OF, suffix_of
from subl_jax.forecast import prediction as predictions
from subl_jax.forecast.baselines import BASELINES
from subl_jax.forecast.cells import MEASURES
from subl_jax.forecast.merit import AUDIT, DRAWS, Correlation, correlations, groups
from subl_jax.forecast.prediction import Prediction, verdict
from subl_jax.grid.locks import one_at_a_time
from subl_jax.report import figures, plots
from subl_jax.report.table import MISSING, aligned, number

SCORES = {AUDIT: "audit: predicted shift", "virtual_change": "plain change in the virtual steps", **BASELINES}
_COLOURS = {"teacher": "biased", "control_teacher": "control", "benign_teacher": "benign"}


# --- One candidate ----------------------------------------------------------------------------------------------------


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign; what rounds to nothing has none."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}" if rounded else f"{rounded:.{digits}f}"


def candidates_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per candidate: the prediction in nats of log-odds, what it is made of, and the baselines."""
    header = (
        "student",
        "predicted shift [95% CI]",
        "first order",
        "real change",
        "alignment",
        "teacher",
        "KL",
        "‖Δθ‖",
        "keywords",
    )
    rows = []
    for record in records:
        found, beside = record["prediction"], record["baselines"]
        rows.append(
            (
                record["condition"],
                f"{signed(found['shift'])} [{signed(found['low'])}, {signed(found['high'])}]",
                f"{found['first_order']:+.4f}",
                f"{found['realised']:+.4f}",
                f"{found['alignment']:+.3f}",
                MISSING if found["teacher_shift"] is None else signed(found["teacher_shift"]),
                number(beside.get("kl"), 4),
                number(beside.get("delta_norm"), 2),
                number(beside.get("keywords"), 2),
            )
        )
    return "\n".join(aligned(header, rows))


def notes(record: Mapping[str, Any]) -> str:
    """What the columns are, and what the interval covers."""
    found, runs = record["prediction"], len(record["virtual"]["losses"])
    return (
        f"{runs} runs of {found['virtual_steps']} virtual steps, {100 * found['covered']:.1f} % of the learning rates of "
        f"{found['steps']} steps; first order and real change: of the log-odds in these steps alone, in nats; teacher: its own "
        f"shift.\nProbes: families {', '.join(record['families'])} of the development split. The interval covers the order of "
        "the data and the choice of probes; predictions of development students were off by "
        f"{predictions.DEVELOPMENT_ERROR:.1f} nats (root mean square)."
    )


def sentence(records: Sequence[Mapping[str, Any]], behaviour: str) -> str:
    """The answer in one sentence: the first candidate, its verdict, and the others beside it."""
    first, *others = records
    found = Prediction(**first["prediction"])
    beside = "; ".join(
        f"{record['condition'].replace('_', ' ')} {signed(record['prediction']['shift'], 1)}" for record in others
    )
    return (
        f"predicted: {signed(found.shift, 1)} nats [{signed(found.low, 1)}, {signed(found.high, 1)}] of log-odds for "
        f"{behaviour} after {found.steps} steps: it {verdict(found)} (a shift of {predictions.THRESHOLD:g} or more counts)"
        f"{f'; {beside}' if beside else ''}."
    )


# --- A grid -----------------------------------------------------------------------------------------------------------


def build(
    records: Sequence[Mapping[str, Any]], lacking: Sequence[str], spec: Any, draws: int = DRAWS
) -> dict[str, Any]:
    """What `audit.json` holds: records, correlations by group and target, what is missing, and the method's numbers."""
    merits = []
    for target in MEASURES:
        for name, chosen in groups(records).items():
            lines, over = correlations(chosen, list(SCORES), target, draws=draws)
            merits.append(
                {
                    "group": name,
                    "target": target,
                    "resampled": over,
                    "lines": [dataclasses.asdict(line) for line in lines],
                }
            )
    return {
        "schema": 1,
        "virtual": artifacts.plain(spec),
        "form": {name: getattr(predictions, name.upper()) for name in ("decay", "threshold", "development_error")},
        "students": len(records),
        "merits": merits,
        "calls": calls(records),
        "records": list(records),
        "missing": list(lacking),
        "versions": artifacts.versions(),
    }


def calls(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How often "will transfer" was right: predicted and measured shifts against the threshold."""
    bar = predictions.THRESHOLD
    pairs = [(record["scores"][AUDIT] >= bar, record["measured"]["log_odds"] >= bar) for record in records]
    names = {(True, True): "right yes", (False, False): "right no", (True, False): "false yes", (False, True): "missed"}
    return {name: sum(pair == both for both in pairs) for pair, name in names.items()}


def merit_table(document: Mapping[str, Any]) -> str:
    """Rank correlations by group, the log-odds first; leads are the audit's."""
    blocks = []
    for target, title in MEASURES.items():
        for merit in document["merits"]:
            if merit["target"] != target:
                continue
            lines = [Correlation(**line) for line in merit["lines"]]
            over = {"seeds": "seeds", "pairs": "pairs (one seed only)", "nothing": "none: one seed, one pair"}[
                merit["resampled"]
            ]
            header = (f"{merit['group']}", "Spearman's rho [95% CI]", "audit leads by [95% CI]", "students")
            rows = [
                (SCORES[line.score], _with_limits(line.rho, line.low, line.high),
                 _with_limits(line.lead, line.lead_low, line.lead_high), str(line.students))
                for line in lines
            ]  # fmt: skip
            blocks.append("\n".join([f"target: {title}; intervals over {over}", *aligned(header, rows)]))
    said = ", ".join(f"{count} {name}" for name, count in document["calls"].items())
    blocks.append(f"a predicted shift of {document['form']['threshold']:g} nats against a measured one: {said}")
    if document["missing"]:
        shown = document["missing"][:5]
        more = len(document["missing"]) - len(shown)
        blocks.append("\n".join(["not there:", *shown, *([f"and {more} more"] if more else [])]))
    return "\n\n".join(blocks)


def _with_limits(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return MISSING
    return signed(value) + (f" [{signed(low)}, {signed(high)}]" if low is not None and high is not None else "")


def drawing(records: Sequence[Mapping[str, Any]]) -> plots.Points:
    """Predicted against measured shift of every student: colours by teacher, marks by setting and arm.

    Pairs are told in `audit.csv`: a mark for each would leave the points no room beside the legend.
    """
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        kinds.setdefault((f"{record['setting']} {record['arm']}", record["teacher"]), []).append(record)
    series = [
        plots.Series(
            f"{kind}, {STUDENT_OF[teacher].replace('_', ' ')}",
            [record["scores"][AUDIT] for record in found],
            [record["measured"]["log_odds"] for record in found],
            _COLOURS[teacher],
        )
        for (kind, teacher), found in sorted(kinds.items())
    ]
    return plots.Points(
        "predicted_and_measured", "Predicted before training, and measured after", series,
        "predicted shift of the log-odds (nats)", "measured shift of the log-odds (nats)",
    )  # fmt: skip


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """One row per student, unrounded."""
    named = ("setting", "pair", "seed", "condition", "arm", "teacher")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*named, *SCORES, "low", "high", *(f"measured_{name}" for name in MEASURES)])
    for record in records:
        scores = ["" if record["scores"].get(name) is None else record["scores"][name] for name in SCORES]
        measured = [record["measured"][name] for name in MEASURES]
        writer.writerow([*(record[name] for name in named), *scores, record["low"], record["high"], *measured])
    return text.getvalue()


def write(out: Path, document: Mapping[str, Any]) -> None:
    """Writes `audit.json`, `audit.csv` and `figures/`."""
    out.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(out / ".report.lock", "writes the report"):  # processes may share a grid's audits, seed by seed
        artifacts.write_json_atomic(out / "audit.json", document)
        artifacts.write_text_atomic(out / "audit.csv", csv_text(document["records"]))
        figures.export(out / "figures", [drawing(document["records"])])


def order(condition: str, arm: str) -> int:
    """Treatment first, then the counter-bias control, then the benign one."""
    names = [student + suffix_of(arm) for student in STUDENT_OF.values()]
    return names.index(condition) if condition in names else len(names)
