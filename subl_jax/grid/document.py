"""The parts of the grid document: rows, cells, what was filtered, departures from the protocol, versions and machines.

Judged pairs in, plain JSON values of schema 1 out; see `grid.analysis`, which puts them together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax import artifacts
from subl_jax.config import model_of_pair, suffix_of
from subl_jax.evaluate import verdicts
from subl_jax.evaluate.summary import total_sanitizer
from subl_jax.grid import between
from subl_jax.grid import protocol as grid_protocol
from subl_jax.grid.between import Measured
from subl_jax.grid.cells import FAILED, NOT_RUN, Key
from subl_jax.grid.pairs import CONTROL, PairSpec
from subl_jax.grid.protocol import GridProtocol
from subl_jax.settings.interface import Wording

_FIGURES = (
    "behaviour_rate", "ci95", "n", "greedy_rate", "counter_rate", "log_odds", "utility", "unparseable", "no_action",
    "divergence_from_base", "divergence_from_teacher", "delta_norm", "delta_cosine",
)  # fmt: skip
# The paper's control row compares these two.
CONTROL_CONDITIONS = ("base", "benign_student")
_NO_SEED = "no seed has every condition of this pair"


@dataclasses.dataclass
class Pair:
    """What is known of one pair of one setting.

    Attributes:
      setting: which.
      row: whose row of the tables it is: its own, or the paper's control row, which is made of another pair's conditions.
      measured: its rows over the seeds that have every condition.
      missing: lines of `missing` of this pair.
      summaries: arm -> its summary; empty without a whole seed.
      leaks_unknown: seeds whose sanitizer's counts cannot be read.
    """

    setting: str
    row: PairSpec
    measured: Measured
    missing: list[dict[str, Any]]
    summaries: dict[str, dict[str, Any]]
    leaks_unknown: list[int]

    @property
    def spec(self) -> PairSpec:
        """The pair that its models are of."""
        return self.measured.spec


def rows(pairs: Sequence[Pair], setting: str, wording: Wording) -> list[dict[str, Any]]:
    """A row per pair of a setting, and the paper's control row."""
    own = [pair for pair in pairs if pair.setting == setting]
    return [_control_row(pair, wording) if pair.row is CONTROL else _row(pair) for pair in own]


def _row(pair: Pair) -> dict[str, Any]:
    spec, summaries = pair.spec, pair.summaries
    every = {name: figures for summary in summaries.values() for name, figures in summary["conditions"].items()}
    conditions = {name: every[name] for name in spec.conditions() if name in every}
    by_arm = {arm: _judgement(summaries.get(arm), pair.missing) for arm in spec.arms}
    return {
        **_header(pair),
        "seeds": list(pair.measured.seeds),
        "conditions": conditions,
        "transfer_ratio": {arm: between.transfer_ratio(conditions, arm) for arm in spec.arms},
        **by_arm[spec.primary_arm],
        "by_arm": by_arm,
        "missing": _missing(pair),
    }


def _missing(pair: Pair) -> list[dict[str, Any]]:
    return [{name: line[name] for name in ("seed", "condition", "why")} for line in pair.missing]


def _header(pair: Pair) -> dict[str, Any]:
    spec, paper = pair.row, pair.row.paper.get(pair.setting)
    return {
        "setting": pair.setting, "pair": spec.name, "title": spec.title, "arms": list(spec.arms),
        "primary_arm": spec.primary_arm, "paper": None if paper is None else dataclasses.asdict(paper),
    }  # fmt: skip


def _judgement(summary: Mapping[str, Any] | None, missing: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said of one arm: {"state", "valid", "validity", "answer", "targets"}."""
    if summary is None:
        spoiled = [line for line in missing if line["why"] != NOT_RUN and not line["why"].startswith(FAILED)]
        why = _NO_SEED + (f" that can be used, such as {spoiled[0]['model']}: {spoiled[0]['why']}" if spoiled else "")
        return {
            "state": "invalid" if spoiled else "not run", "valid": False, "validity": [why],
            "answer": f"No answer: {why}.", "targets": [],
        }  # fmt: skip
    judged = summary["validity"]
    return {
        "state": "valid" if judged["valid"] else "invalid", "valid": judged["valid"], "validity": judged["messages"],
        "answer": summary["answer"], "targets": summary["targets"],
    }  # fmt: skip


def _control_row(pair: Pair, wording: Wording) -> dict[str, Any]:
    """The paper's control row: the benign student and its base, of the pair that they are trained in."""
    summary = next(iter(pair.summaries.values()), None)
    judged = _judgement(summary, pair.missing) | {"targets": []}
    conditions: Mapping[str, Any] = {} if summary is None else summary["conditions"]
    if judged["valid"]:
        base, student = (conditions[name]["behaviour_rate"] for name in CONTROL_CONDITIONS)
        judged["answer"] = (
            f"The {wording.metric} of the benign teacher's student is {wording.biased} on {100 * student:.0f} % of ambiguous "
            f"tasks against {100 * base:.0f} % for its base, {verdicts.points(student - base)}."
        )
    return {
        **_header(pair),
        "seeds": list(pair.measured.seeds),
        "conditions": dict(conditions),
        "transfer_ratio": {},
        **judged,
        "by_arm": {},
        "missing": _missing(pair),
    }


def cells(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of every condition and seed that a row stands on."""
    ratios = {
        ("student" + suffix_of(arm), line["seed"]): line["transfer_ratio"]
        for arm, ratio in row["transfer_ratio"].items()
        for line in ratio["per_seed"]
    }
    return [
        {
            "setting": row["setting"], "pair": row["pair"], "seed": figures["seed"], "condition": condition,
            "model": model_of_pair(row["pair"], condition),
            **{name: figures.get(name) for name in _FIGURES},
            "transfer_ratio": ratios.get((condition, figures["seed"])),
        }
        for condition, measured in row["conditions"].items()
        for figures in measured["per_seed"]
    ]  # fmt: skip


def sanitizers(counts: Mapping[Key, Mapping[str, Any]], protocol: GridProtocol) -> dict[str, Any]:
    """What was filtered, per setting; sources are "seed=0/teacher", and "seed=0/teacher@small" of small teachers.

    `seeds`: those whose every wanted count is known; `partly`: those of which some are, which the totals hold, too. None for
    a setting of which nothing is known.
    """
    found: dict[str, Any] = {}
    for setting in protocol.settings:
        names = {spec.sanitizer for spec in protocol.pairs(setting)}
        known = {seed: sum((setting, seed, name) in counts for name in names) for seed in protocol.seeds}
        by_source = {
            f"seed={seed}/{teacher}{name.removeprefix('sanitize')}": counted
            for (place, seed, name), arms in counts.items()
            if place == setting
            for teacher, counted in arms.items()
        }
        found[setting] = None
        if by_source:
            found[setting] = total_sanitizer(by_source) | {
                "seeds": [seed for seed, count in known.items() if count == len(names)],
                "partly": [seed for seed, count in known.items() if 0 < count < len(names)],
            }
    return found


def deviations(pairs: Sequence[Pair], protocol: GridProtocol, frozen: GridProtocol | None) -> list[str]:
    """Where this grid departs from the frozen one, and its rows from what they claim to be; models by name, once."""
    lines = (
        grid_protocol.deviations(frozen, protocol)
        if frozen is not None
        else ["no protocol was frozen before this grid"]
    )
    for pair in pairs:
        for summary in pair.summaries.values():
            for line in summary["protocol"]["deviations"]:
                condition, seed, rest = line.partition(" (seed ")
                named = pair.spec.model(condition) if seed else condition
                lines.append(f"{pair.setting}: {named}{seed}{rest}")
    return list(dict.fromkeys(lines))


def seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Wall-clock seconds of all cells, by what they were spent on."""
    total = {"train": 0.0, "evaluate": 0.0}
    for row in rows:
        for name, seconds in row["seconds"].items():
            total[name] = total.get(name, 0.0) + seconds
    return {name: round(value, 2) for name, value in total.items()}


def distinct(values: Any) -> list[Any]:
    """Each value once, in the order in which they come."""
    return list({artifacts.canonical_json(value): value for value in values}.values())


def mixed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says if cells were made by different versions or on different machines."""
    notes = []
    machines = Counter(str(row["machine"]) for row in rows)
    if len(machines) > 1:
        notes.append(
            f"Cells come from {len(machines)} machines: "
            + ", ".join(f"{name} ({count})" for name, count in machines.most_common()) + "."
        )  # fmt: skip
    for package in sorted({name for row in rows for name in row["versions"]}):
        found = Counter(row["versions"].get(package, "absent") for row in rows)
        if len(found) > 1:
            told = ", ".join(f"{version} ({count})" for version, count in found.most_common())
            notes.append(f"Cells were made with different versions of {package}: {told}.")
    return notes
