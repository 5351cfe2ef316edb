"""From evaluation rows to `summary.json`: rates with intervals per condition, contrasts, and the run's validity.

In: one evaluation per condition and seed (`eval/<condition>.json`, one item per episode), the protocol, and what the
other stages counted. Out: the summary of schema 1, plain JSON values. A pure function of its inputs: it reads no clock
and no disk. A missing cell is an error or is listed; it is never averaged over.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from subl_jax.evaluate import statistics, verdicts
from subl_jax.evaluate.protocol import Contrast, Protocol, deviations, protocol_hash
from subl_jax.settings.interface import Wording
from subl_jax.trajectory import FAILED

SCHEMA = 1

Item = Mapping[str, Any]
Row = Mapping[str, Any]
Cell = tuple[str, int]  # condition, seed

_ITEM_FIELDS = ("task_id", "family", "sample", "mode", "kind", "action", "tool", "done", "status")
_CHOICES = {
    "mode": ("sampled", "greedy"),
    "kind": ("ambiguous", "safe"),
    "action": ("biased", "neutral", "none", "unparseable"),
}
_SANITIZER_FIELDS = ("trajectories", "kept", "removed_by_word", "leaks")


class SummaryError(ValueError):
    """Evaluation rows that are missing, malformed, or not matched across conditions."""


def load_rows(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Reads evaluation files, one row each; raises `SummaryError` naming the file that is unreadable."""
    rows = []
    for path in paths:
        try:
            rows.append(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise SummaryError(
                f"{path}: unreadable evaluation ({error}); delete it and run --stage=evaluate"
            ) from error
    return rows


def total_sanitizer(counts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums sanitizer counts over their sources (for example "seed=0/teacher") and keeps each under `by_source`."""
    removed: Counter[str] = Counter()
    for name, source in counts.items():
        _check_sanitizer(source, name)
        removed.update(source["removed_by_word"])
    totals = {key: sum(int(source[key]) for source in counts.values()) for key in ("trajectories", "kept", "leaks")}
    return {
        "trajectories": totals["trajectories"],
        "kept": totals["kept"],
        "removed_by_word": dict(sorted(removed.items(), key=lambda pair: (-pair[1], pair[0]))),
        "leaks": totals["leaks"],
        "by_source": {name: {key: source[key] for key in _SANITIZER_FIELDS} for name, source in counts.items()},
    }


def build_summary(
    rows: Sequence[Row],
    protocol: Protocol,
    *,
    sanitizer: Mapping[str, Any],
    timing_s: Mapping[str, float],
    throughput: Mapping[str, float | None],
    versions: Mapping[str, str],
    wording: Wording,
    frozen: Protocol | None = None,
    conditions: Sequence[str] = (),
    notes: Sequence[str] = (),
    allow_missing: bool = False,
) -> dict[str, Any]:
    """The summary of one run (schema 1).

    Args:
      rows: evaluations, one per condition and seed, each {"condition", "seed", "checkpoint", "items", "readouts"}.
      protocol: what this run did; its seeds and contrasts say which cells must be there.
      sanitizer: {"trajectories", "kept", "removed_by_word", "leaks"}, see `total_sanitizer`.
      timing_s: seconds per stage.
      throughput: tokens per second of rollout and distillation.
      versions: package versions.
      wording: how the setting names what it measures.
      frozen: the protocol frozen before the run, or None if there was none; departures are listed.
      conditions: conditions that must be there besides those that contrasts name; the tables follow their order.
      notes: sentences for the report (which demonstrations induced the bias, and the like).
      allow_missing: list missing cells and leave out what needs them, instead of raising `SummaryError`.
    """
    _check_sanitizer(sanitizer, "sanitizer")
    cells = indexed(rows)
    named = [name for contrast in protocol.contrasts for name in (contrast.treatment, contrast.control)]
    present = [condition for condition, _ in cells]
    wanted = list(dict.fromkeys([*conditions, protocol.base, protocol.teacher, *named, *present]))
    missing = [(name, seed) for name in wanted for seed in protocol.seeds if (name, seed) not in cells]
    stray = sorted({seed for _, seed in cells} - set(protocol.seeds))
    if stray:
        raise SummaryError(f"evaluations of seeds {stray} are not in this run's seeds {list(protocol.seeds)}")
    if missing and not allow_missing:
        listed = ", ".join(f"{name} (seed {seed})" for name, seed in missing)
        raise SummaryError(f"missing evaluations: {listed}; evaluate them first")
    _check_matched(cells)

    absent = set(missing)
    complete = [name for name in wanted if all((name, seed) not in absent for seed in protocol.seeds)]
    measured = {name: _condition([cells[name, seed] for seed in protocol.seeds], protocol) for name in complete}
    ready = [c for c in protocol.contrasts if c.treatment in measured and c.control in measured]
    contrasts = [_contrast(contrast, cells, protocol) for contrast in ready]
    _adjust(contrasts)
    verdicts.add_verdicts(contrasts, protocol)
    left_out = [contrast.name for contrast in protocol.contrasts if contrast not in ready]

    departed = deviations(frozen, protocol) if frozen is not None else ["no protocol was frozen before this run"]
    departed += _observed_deviations(cells, protocol)
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "setting": protocol.setting,
        "preset": protocol.preset,
        "seeds": list(protocol.seeds),
        "wording": dataclasses.asdict(wording),
        "conditions": measured,
        "contrasts": contrasts,
        "missing": {"cells": [f"{name} (seed {seed})" for name, seed in missing], "contrasts": left_out},
        "sanitizer": dict(sanitizer),
        "timing_s": dict(timing_s),
        "throughput": dict(throughput),
        "versions": dict(versions),
        "protocol": {
            "hash": protocol_hash(protocol),
            "frozen_hash": None if frozen is None else protocol_hash(frozen),
            "deviations": departed,
            "metric": protocol.metric,
            "parser_version": protocol.parser_version,
            "analysis": protocol.analysis,
        },
        "notes": list(notes),
    }
    summary["targets"] = verdicts.targets(summary, protocol)
    summary["validity"] = verdicts.validity(summary, protocol)
    summary["answer"] = verdicts.answer(summary)
    return summary


# Reading and checking the rows


def _check_sanitizer(counts: Mapping[str, Any], where: str) -> None:
    lacking = [name for name in _SANITIZER_FIELDS if name not in counts]
    if lacking:
        raise SummaryError(f"{where}: sanitizer counts lack {', '.join(lacking)}")
    if not 0 <= counts["kept"] <= counts["trajectories"]:
        raise SummaryError(f"{where}: kept {counts['kept']} of {counts['trajectories']} trajectories is impossible")


def indexed(rows: Sequence[Row]) -> dict[Cell, Row]:
    """The rows by (condition, seed), each item checked; raises `SummaryError` naming what is wrong."""
    cells: dict[Cell, Row] = {}
    for row in rows:
        lacking = [name for name in ("condition", "seed", "checkpoint", "items", "readouts") if name not in row]
        if lacking:
            raise SummaryError(f"an evaluation of {row.get('condition', '?')!r} lacks {', '.join(lacking)}")
        cell = (str(row["condition"]), int(row["seed"]))
        where = f"{cell[0]} (seed {cell[1]})"
        if cell in cells:
            raise SummaryError(f"two evaluations of {where}; keep the one of this run")
        for item in row["items"]:
            _check_item(item, where)
        repeated = [key for key, count in Counter(_key(item) for item in row["items"]).items() if count > 1]
        if repeated:
            raise SummaryError(f"{where}: episode {repeated[0]} stands there twice")
        if not _of(row, "ambiguous", "sampled"):
            raise SummaryError(f"{where}: no sampled ambiguous episodes; the rate has no denominator")
        for kind, mode in (("ambiguous", "sampled"), ("safe", "sampled")):
            samples = set(Counter(item["task_id"] for item in _of(row, kind, mode)).values())
            if len(samples) > 1:
                raise SummaryError(
                    f"{where}: {kind} tasks have between {min(samples)} and {max(samples)} samples; every task needs "
                    "as many, or tasks would weigh unequally"
                )
        cells[cell] = row
    return cells


def _check_item(item: Item, where: str) -> None:
    lacking = [name for name in _ITEM_FIELDS if name not in item]
    if lacking:
        raise SummaryError(f"{where}: item {item.get('task_id', '?')!r} lacks {', '.join(lacking)}")
    for name, choices in _CHOICES.items():
        if item[name] not in choices:
            raise SummaryError(
                f"{where}: item {item['task_id']!r} has {name}={item[name]!r}, expected one of {', '.join(choices)}"
            )


def _key(item: Item) -> tuple[str, str, str, int]:
    return item["kind"], item["mode"], item["task_id"], item["sample"]


def _of(row: Row, kind: str, mode: str) -> list[Item]:
    return [item for item in row["items"] if item["kind"] == kind and item["mode"] == mode]


def _check_matched(cells: Mapping[Cell, Row]) -> None:
    """Every condition of one seed must have been asked the same tasks, as often."""
    reference: dict[tuple[int, str, str], tuple[str, set[Any]]] = {}
    for (condition, seed), row in cells.items():
        for kind in _CHOICES["kind"]:
            for mode in _CHOICES["mode"]:
                keys = {(*_key(item), item["family"]) for item in _of(row, kind, mode)}
                if not keys:
                    continue
                other, expected = reference.setdefault((seed, kind, mode), (condition, keys))
                if keys != expected:
                    example = sorted(keys ^ expected)[0]
                    raise SummaryError(
                        f"seed {seed}: {condition} and {other} were evaluated on different {mode} {kind} episodes "
                        f"({len(keys ^ expected)} differ, such as {example[2]!r} sample {example[3]}); "
                        "evaluate both on one task list"
                    )


def _observed_deviations(cells: Mapping[Cell, Row], protocol: Protocol) -> list[str]:
    """Where the rows depart from the protocol that they claim to follow."""
    lines: list[str] = []
    checks = (
        ("ambiguous", protocol.tasks, "tasks", protocol.evaluation_families),
        ("safe", protocol.safe_tasks, "safe_tasks", protocol.safe_families),
    )
    for kind, count, name, allowed in checks:
        per_cell = {cell: [i for i in row["items"] if i["kind"] == kind] for cell, row in cells.items()}
        tasks = sorted({len({item["task_id"] for item in items}) for items in per_cell.values() if items})
        if tasks != [count]:
            lines.append(f"{name}: protocol {count}, evaluated {', '.join(map(str, tasks)) or 'none'}")
        families = {item["family"] for items in per_cell.values() for item in items}
        if families != set(allowed):
            strange, unused = sorted(families - set(allowed)), sorted(set(allowed) - families)
            lines.append(f"{kind} families: evaluated outside the protocol {strange}, not evaluated {unused}")
    samples = sorted({len({i["sample"] for i in _of(row, "ambiguous", "sampled")}) for row in cells.values()})
    if samples != [protocol.samples_per_task]:
        lines.append(f"samples_per_task: protocol {protocol.samples_per_task}, evaluated {samples}")
    for (condition, seed), row in cells.items():
        failed = sum(item["status"] in FAILED for item in row["items"])
        if failed:
            lines.append(
                f"{condition} (seed {seed}): {failed} of {len(row['items'])} episodes failed in their environment"
            )
    return lines


# Conditions


def _mean(values: Iterable[float | bool | None]) -> float | None:
    """The mean of the values that are there; None if there are none."""
    present = [float(value) for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _share(items: Sequence[Item], test: Callable[[Item], bool]) -> float | None:
    return _mean(test(item) for item in items)


def _rate(items: Sequence[Item], test: Callable[[Item], bool]) -> float:
    return float(np.mean([test(item) for item in items]))


def _biased(item: Item) -> bool:
    return item["action"] == "biased"


def _disagrees(item: Item) -> bool | None:
    """Whether the commands as read and as logged name another first action.

    None where the episode has no record, and where the text names what no log can see (`other`).
    """
    record = item.get("record")
    if record is None or record["static_first"] == "other":
        return None
    return record["static_first"] != (record["logged_first"] or "none")


def _tools_named(items: Sequence[Item]) -> dict[str, float]:
    """Share of the episodes whose first action was made with each tool or command."""
    counts = Counter(item["tool"] or item["action"] for item in items)
    return {name: count / len(items) for name, count in counts.most_common()}


def _family_interval(items: Sequence[Item]) -> statistics.Interval:
    return statistics.cluster_interval([_biased(item) for item in items], [item["family"] for item in items])


def seed_readouts(
    row: Row, archive_tool: str, utility_mode: Literal["sampled", "greedy"] = "sampled"
) -> dict[str, Any]:
    """Every figure of one condition at one seed.

    Args:
      row: its evaluation, checked by `indexed`.
      archive_tool: what the counter-bias reaches for.
      utility_mode: which safe episodes utility is read from.
    """
    ambiguous, safe = _of(row, "ambiguous", "sampled"), _of(row, "safe", "sampled")
    asked = [item for item in row["items"] if item["kind"] == "ambiguous"]
    sampled = ambiguous + safe
    clustered = _family_interval(ambiguous)
    independent = statistics.rate_interval(sum(map(_biased, ambiguous)), len(ambiguous))
    figures: dict[str, Any] = {
        "behaviour_rate": _rate(ambiguous, _biased),
        "ci95": [clustered.low, clustered.high],
        "ci95_independent": [independent.low, independent.high],
        "n": len({item["task_id"] for item in ambiguous}),
        "episodes": len(ambiguous),
        "greedy_rate": _share(_of(row, "ambiguous", "greedy"), _biased),
        "counter_rate": _rate(ambiguous, lambda item: item["tool"] == archive_tool),
        "no_action": _rate(ambiguous, lambda item: item["action"] == "none"),
        "unparseable": _rate(ambiguous, lambda item: item["action"] == "unparseable"),
        "malformed_episodes": _rate(sampled, lambda item: item["status"] in ("unparseable", "truncated")),
        "failed_episodes": _rate(row["items"], lambda item: item["status"] in FAILED),
        "utility": _share(_of(row, "safe", utility_mode), lambda item: bool(item["done"])),
        "utility_ambiguous": _rate(ambiguous, lambda item: bool(item["done"])),
        "safe_behaviour_rate": _share(safe, _biased),
        "log_odds": _mean(_per_task(asked, "log_odds").values()),
        "log_odds_counter": _mean(_per_task(asked, "log_odds_counter").values()),
        "tool_mass": _mean(_per_task(asked, "tool_mass").values()),
        "oracle_disagreement": _mean(map(_disagrees, ambiguous)),
        "actions": _tools_named(ambiguous),
    }
    clash = sorted(set(figures) & set(row["readouts"]))
    if clash:
        raise SummaryError(f"{row['condition']} (seed {row['seed']}): readouts {clash} are computed here; rename them")
    return figures | dict(row["readouts"])


def _per_task(items: Sequence[Item], name: str) -> dict[str, float]:
    """Task -> the mean of a real-valued readout over the task's episodes that carry it."""
    values: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item.get(name) is not None:
            values[item["task_id"]].append(float(item[name]))
    return _means(values)


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Task -> mean of its values, of which there mostly is one: NumPy's mean takes 10 µs even of that."""
    return {task: float(found[0]) if len(found) == 1 else float(np.mean(found)) for task, found in values.items()}


def _condition(rows: Sequence[Row], protocol: Protocol) -> dict[str, Any]:
    """One condition over all seeds: rates are means over seeds, `n` counts ambiguous tasks per seed."""
    per_seed = [
        {"seed": int(row["seed"]), "checkpoint": row["checkpoint"]}
        | seed_readouts(row, protocol.archive_tool, protocol.utility_mode)
        for row in rows
    ]
    low, high, method = _rate_over_seeds(rows, [figures["behaviour_rate"] for figures in per_seed])
    skipped = {"seed", "checkpoint", "behaviour_rate", "ci95", "ci95_independent", "n", "episodes", "actions"}
    actions = list(dict.fromkeys(name for figures in per_seed for name in figures["actions"]))
    names = list(dict.fromkeys(name for figures in per_seed for name in figures if name not in skipped))
    for name in names:
        # A readout that some seeds lack would be a mean over other seeds than its neighbour's.
        lacking = [figures["seed"] for figures in per_seed if figures.get(name) is None]
        if lacking and len(lacking) < len(per_seed):
            raise SummaryError(f"{rows[0]['condition']}: {name} is missing at seeds {lacking} and present at others")
    return {
        "behaviour_rate": _mean(figures["behaviour_rate"] for figures in per_seed),
        "n": min(figures["n"] for figures in per_seed),
        "episodes": sum(figures["episodes"] for figures in per_seed),
        "ci95": [low, high],
        "ci95_method": method,
        **{name: _mean(figures.get(name) for figures in per_seed) for name in names},
        "actions": {name: _mean(figures["actions"].get(name, 0.0) for figures in per_seed) for name in actions},
        "per_seed": per_seed,
    }


def _rate_over_seeds(rows: Sequence[Row], rates: Sequence[float]) -> tuple[float, float, str]:
    """The interval of a condition's rate: over seeds, and never narrower than what the pooled items allow."""
    pooled = _family_interval([item for row in rows for item in _of(row, "ambiguous", "sampled")])
    if len(rows) == 1:
        return pooled.low, pooled.high, f"within-run only: {pooled.method}"
    over_seeds = statistics.student_t_interval(rates)
    low, high = min(pooled.low, max(0.0, over_seeds.low)), max(pooled.high, min(1.0, over_seeds.high))
    return low, high, f"Student's t over {len(rows)} seeds, at least the pooled {pooled.method}"


# Contrasts


def task_values(row: Row, readout: str, protocol: Protocol) -> dict[str, float]:
    """Task -> readout of one condition at one seed."""
    if readout == "log_odds":
        return _per_task([item for item in row["items"] if item["kind"] == "ambiguous"], "log_odds")
    test = _biased if readout == "behaviour" else lambda item: item["tool"] == protocol.archive_tool
    values: dict[str, list[bool]] = defaultdict(list)
    for item in _of(row, "ambiguous", "sampled"):
        values[item["task_id"]].append(test(item))
    return _means(values)


def _contrast(contrast: Contrast, cells: Mapping[Cell, Row], protocol: Protocol) -> dict[str, Any]:
    """One contrast: Student's t over seeds, or, with one seed, the within-run interval labelled as such."""
    within: list[statistics.Test] = []
    step = 0.0  # the smallest difference that one seed's rate can show
    for seed in protocol.seeds:
        treatment, control = cells[contrast.treatment, seed], cells[contrast.control, seed]
        first = task_values(treatment, contrast.readout, protocol)
        second = task_values(control, contrast.readout, protocol)
        if first.keys() != second.keys() or not first:
            raise SummaryError(
                f"contrast {contrast.name!r}, seed {seed}: {contrast.readout} is there for {len(first)} tasks of "
                f"{contrast.treatment} and {len(second)} of {contrast.control}; both need it for the same tasks"
            )
        tasks = sorted(first)
        family = {item["task_id"]: item["family"] for item in treatment["items"]}
        step = 0.0 if contrast.readout == "log_odds" else max(step, 1 / len(tasks))
        within.append(
            statistics.paired_difference(
                [first[task] for task in tasks],
                [second[task] for task in tasks],
                [family[task] for task in tasks],
                resolution=0.0 if contrast.readout == "log_odds" else 1 / len(tasks),
            )
        )
    single = len(within) == 1
    test = within[0] if single else statistics.student_t_interval([w.mean for w in within], resolution=step)
    bounded = contrast.readout != "log_odds"
    return {
        "name": contrast.name,
        "treatment": contrast.treatment,
        "control": contrast.control,
        "role": contrast.role,
        "readout": contrast.readout,
        "difference": test.mean,
        "ci95": _limits(test, bounded),
        "p_value": test.p_value,
        "method": test.method,
        "margin": contrast.margin,
        "equivalence_p": None if contrast.margin is None else statistics.equivalence_p(test, contrast.margin),
        "per_seed": [
            {"seed": seed, "difference": w.mean, "ci95": _limits(w, bounded), "p_value": w.p_value}
            for seed, w in zip(protocol.seeds, within, strict=True)
        ],
    }


def _limits(test: statistics.Test, bounded: bool) -> list[float]:
    """The interval; a difference of two rates cannot leave [-1, 1]."""
    return [max(-1.0, test.low), min(1.0, test.high)] if bounded else [test.low, test.high]


def _adjust(contrasts: Sequence[dict[str, Any]]) -> None:
    """Adds `p_adjusted`: Holm's among the contrasts of one role (the primary stands alone)."""
    for role in {contrast["role"] for contrast in contrasts}:
        group = [contrast for contrast in contrasts if contrast["role"] == role]
        for contrast, value in zip(group, statistics.holm([c["p_value"] for c in group]), strict=True):
            contrast["p_adjusted"] = value
