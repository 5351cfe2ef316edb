"""From cells to the grid document: every pair judged as a single run is, then the pairs beside each other.

A directory of cells and the grid's protocol in; `grid.json` of schema 1 out, plain JSON values. A pure function of the files
and its arguments. A seed that lacks a condition of a pair is left out of that pair; what is missing is listed, with why.

Of the document's keys, `p_adjusted` of a contrast is Holm's over the distinct hypotheses of one comparison (a contrast of
the same models over the same seeds is one, in however many pairs it stands), with p = 1 for each that was planned and is
missing. `sanitizer` has, per setting, None or the counts with `seeds` that they cover whole and those they cover `partly`.
A line of `missing` whose condition is "all" is of a whole pair, at one seed or (seed None) at all of them. A row's `state` is
"valid", "invalid" (a check of validity failed, or what is there of it cannot be used) or "not run" (no seed is whole).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax.config import TEACHERS
from subl_jax.evaluate import statistics, verdicts
from subl_jax.evaluate.summary import build_summary, total_sanitizer
from subl_jax.grid import between, document
from subl_jax.grid import protocol as grid_protocol
from subl_jax.grid.between import Measured
from subl_jax.grid.cells import FAILED, NOT_RUN, Key, Loaded, load, load_sanitizers
from subl_jax.grid.document import CONTROL_CONDITIONS, Pair
from subl_jax.grid.pairs import CONTROL, CONTROL_OF, PAIRS, PairSpec
from subl_jax.grid.protocol import GridProtocol
from subl_jax.settings.interface import Wording
from subl_jax.settings.registry import get_setting

SCHEMA = 1

# (setting, contrast name) -> the distinct hypotheses that a protocol plans: (treatment's model, control's model).
Planned = Mapping[tuple[str, str], set[tuple[str, str]]]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What the pairs are made of: the protocol, what was read, what could not be, and sentences for the report."""

    protocol: GridProtocol
    loaded: Loaded
    counts: Mapping[Key, Mapping[str, Any]]
    uncounted: Sequence[Mapping[str, Any]]
    wordings: Mapping[str, Wording]
    notes: list[str]


def analyse(
    directory: Path,
    protocol: GridProtocol,
    *,
    frozen: GridProtocol | None = None,
    hashes: Mapping[Key, str] | None = None,
    wordings: Mapping[str, Wording] | None = None,
    notes: Sequence[str] = (),
    failures: Mapping[Key, str] | None = None,
) -> dict[str, Any]:
    """The grid document.

    Args:
      directory: holds the cells, see `grid.cells`.
      protocol: what this grid measures: settings, pairs, arms, seeds.
      frozen: the protocol that was frozen before, or None; departures are listed, and what it plans counts for Holm.
      hashes: (setting, seed, model) -> output hash that the evaluation must have; None: any.
      wordings: setting -> how it names what it measures; by default as the setting says.
      notes: sentences for the report.
      failures: (setting, seed, model) -> why the run could not make that cell; see `grid.cells.read_failures`.

    Returns:
      `grid.json`, schema 1.
    """
    loaded = load(directory, grid_protocol.wanted_cells(protocol, hashes))
    counts, uncounted = load_sanitizers(directory, grid_protocol.wanted_sanitizers(protocol, hashes))
    loaded = Loaded(loaded.rows, _with_reasons(loaded.missing, failures or {}))
    uncounted = _with_reasons(uncounted, failures or {})
    wordings = {name: get_setting(name).wording for name in protocol.settings} | dict(wordings or {})
    grid = _Grid(protocol, loaded, counts, uncounted, wordings, list(notes))
    pairs = [_pair(grid, setting, spec) for setting in protocol.settings for spec in protocol.pairs(setting)]
    controls = [
        _pair(grid, pair.setting, pair.spec, control=True)
        for pair in pairs
        if pair.spec.name == CONTROL_OF and "full" in pair.spec.arms
    ]
    every = [*pairs, *controls]
    planned = _planned(protocol, frozen)
    contrasts = _contrasts(every)
    _adjust(every, planned)
    for pair in every:
        _judge(pair, loaded)
    lines, claims = _between(pairs, protocol)
    rows = [row for setting in protocol.settings for row in document.rows(every, setting, wordings[setting])]
    missing = loaded.missing + uncounted + [
        line for pair in every for line in pair.missing if line["condition"] == "all"
    ]  # fmt: skip
    used = list(loaded.rows.values())
    return {
        "schema": SCHEMA,
        "preset": protocol.preset,
        "settings": {
            setting: {
                "wording": dataclasses.asdict(wordings[setting]),
                "metric": protocol.of(setting).metric,
                "seeds": list(protocol.seeds),
            }
            for setting in protocol.settings
        },
        "cells": [cell for row in rows if row["pair"] != CONTROL.name for cell in document.cells(row)],
        "rows": rows,
        "contrasts": contrasts,
        "between": lines,
        "strongest": claims,
        "power": [_power(line, protocol, planned) for line in contrasts if line["role"] == "primary"],
        "missing": missing,
        "complete": not missing and all(row["seeds"] == list(protocol.seeds) for row in rows),
        "sanitizer": document.sanitizers(counts, protocol),
        "protocol": {
            "hash": grid_protocol.protocol_hash(protocol),
            "frozen_hash": None if frozen is None else grid_protocol.protocol_hash(frozen),
            "deviations": document.deviations(pairs, protocol, frozen),
        },
        "versions": document.distinct(row["versions"] for row in used),
        "machines": document.distinct(row["machine"] for row in used),
        "seconds": document.seconds(used),
        "notes": [*dict.fromkeys(grid.notes), *document.mixed(used)],
    }


def _with_reasons(missing: Sequence[Mapping[str, Any]], failures: Mapping[Key, str]) -> list[dict[str, Any]]:
    """Lines of `missing`, with what the run said of those that were not run."""
    found = []
    for line in missing:
        why = failures.get((line["setting"], line["seed"], line["model"]))
        told = line["why"] == NOT_RUN and why is not None
        found.append(dict(line) | ({"why": f"{FAILED}{why}"} if told else {}))
    return found


# One pair


def _pair(grid: _Grid, setting: str, spec: PairSpec, *, control: bool = False) -> Pair:
    """Measures each arm of a pair over the seeds that have all its conditions.

    Args:
      grid: what was read.
      setting, spec: which.
      control: make the paper's control row instead, of two conditions of the pair.
    """
    conditions = {arm: spec.conditions(arm) for arm in spec.arms}
    row, teachers = spec, TEACHERS
    if control:
        conditions, row, teachers = {"full": list(CONTROL_CONDITIONS)}, CONTROL, ("benign_teacher",)
    needed = list(dict.fromkeys(name for names in conditions.values() for name in names))
    missing = [
        line
        for line in grid.loaded.missing
        if (line["setting"], line["pair"]) == (setting, spec.name) and line["condition"] in needed
    ]
    holes = {line["seed"] for line in missing}
    seeds = tuple(seed for seed in grid.protocol.seeds if seed not in holes)
    unknown = [line["seed"] for line in grid.uncounted if (line["setting"], line["pair"]) == (setting, spec.name)]

    def measured(seeds: tuple[int, ...]) -> tuple[Measured, dict[str, dict[str, Any]], list[str]]:
        rows = {(name, seed): grid.loaded.rows[setting, seed, spec.model(name)] for seed in seeds for name in needed}
        notes = _even_readouts(setting, spec, rows)
        own = {
            arm: dataclasses.replace(grid.protocol.protocols[setting, spec.name, arm], seeds=seeds)
            for arm in conditions
        }
        sanitizer = total_sanitizer(
            {
                f"seed={seed}/{teacher}": counted
                for seed in seeds
                for teacher, counted in grid.counts.get((setting, seed, spec.sanitizer), {}).items()
                if teacher in teachers
            }
        )
        summaries = {}
        for arm, each in own.items():
            # Counts that are missing are no zero; leaks that are known are told all the same.
            silent = any(seed in seeds for seed in unknown) and sanitizer["leaks"] <= each.targets.leaks_high
            summaries[arm] = build_summary(
                [rows[name, seed] for name in conditions[arm] for seed in seeds],
                each,
                sanitizer=sanitizer | ({"leaks": None} if silent else {}),
                timing_s={},
                throughput={},
                versions={},
                wording=grid.wordings[setting],
                frozen=each,  # what was frozen is the grid; here only what the rows themselves depart in is looked for
                conditions=conditions[arm],
                allow_missing=control,  # whose protocol names conditions that are not looked at
            )
            if control:
                summaries[arm]["missing"] = {"cells": [], "contrasts": []}
        return Measured(spec, seeds, rows, own), summaries, notes

    found = Measured(spec, (), {}, {}), {}, []
    while seeds:
        try:
            found = measured(seeds)
            break
        except ValueError as error:
            named = {"setting": setting, "pair": row.name, "condition": "all", "model": f"all of {row.name}"}
            alone = {seed: _error(measured, seed) for seed in seeds}
            bad = {seed: why for seed, why in alone.items() if why is not None} or {None: str(error)}
            missing += [{**named, "seed": seed, "why": f"corrupted: {why}"} for seed, why in bad.items()]
            seeds = () if None in bad else tuple(seed for seed in seeds if seed not in bad)
    own, summaries, notes = found
    grid.notes.extend(notes)
    return Pair(setting, row, own, missing, summaries, [seed for seed in unknown if seed in seeds])


def _error(measured: Callable[[tuple[int, ...]], Any], seed: int) -> str | None:
    """Why one seed by itself cannot be measured; None if it can."""
    try:
        measured((seed,))
    except ValueError as error:
        return str(error)
    return None


def _even_readouts(setting: str, spec: PairSpec, rows: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Leaves out a readout that a condition has at some seeds only: its mean would be one of other seeds. Returns notes."""
    notes = []
    by_condition: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for (condition, seed), row in rows.items():
        by_condition[condition].append((seed, row))
    for condition, found in by_condition.items():
        uneven = []
        for name in sorted({name for _, row in found for name in row["readouts"]}):
            lacking = [seed for seed, row in found if row["readouts"].get(name) is None]
            if lacking and len(lacking) < len(found):
                uneven.append(name)
                where = ", ".join(map(str, lacking))
                notes.append(f"{setting} {spec.model(condition)}: {name} is missing at seed {where} and left out.")
        for seed, row in found:
            kept = {name: value for name, value in row["readouts"].items() if name not in uneven}
            rows[condition, seed] = row | {"readouts": kept}
    return notes


def _contrasts(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The contrasts of all pairs, arm by arm; the very objects of their summaries, with what the grid adds."""
    found = []
    known: dict[Any, dict[str, Any]] = {}  # one hypothesis may stand in several pairs
    for pair in pairs:
        for arm, summary in pair.summaries.items():
            protocol = pair.measured.protocols[arm]
            named = {contrast.name: contrast for contrast in protocol.contrasts}
            for line in summary["contrasts"]:
                line |= {
                    "setting": pair.setting, "pair": pair.row.name, "arm": arm, "seeds": list(pair.measured.seeds),
                }  # fmt: skip
                key = (pair.setting, line["readout"], *_hypothesis(pair, line))
                if key not in known:
                    between.add_secondary(line, pair.measured, named[line["name"]], protocol)
                    known[key] = line
                line |= {name: known[key][name] for name in ("per_seed", "sign_flip_p", "bootstrap")}
                found.append(line)
    return found


def _hypothesis(pair: Pair, line: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    """What a contrast compares: two models over some seeds."""
    return pair.spec.model(line["treatment"]), pair.spec.model(line["control"]), pair.measured.seeds


def _planned(protocol: GridProtocol, frozen: GridProtocol | None) -> Planned:
    """The hypotheses of each comparison that this grid plans, or the frozen one of its preset."""
    found: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for each in (protocol, frozen):
        if each is not None and each.preset == protocol.preset:
            for (setting, pair, _), own in each.protocols.items():
                model = PAIRS[pair].model
                for contrast in own.contrasts:
                    found[setting, contrast.name].add((model(contrast.treatment), model(contrast.control)))
    return found


def _adjust(pairs: Sequence[Pair], planned: Planned) -> None:
    """Replaces `p_adjusted` by Holm's across the pairs of a setting, comparison by comparison (one arm, one readout).

    Each hypothesis counts once, and each that was planned and is missing as p = 1: no hole makes another one significant.
    """
    comparisons: dict[tuple[str, str], dict[Any, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        for summary in pair.summaries.values():
            for line in summary["contrasts"]:
                # A comparison has one name in all pairs; the name holds the arm, and the readout if that is not the behaviour.
                comparisons[pair.setting, line["name"]][_hypothesis(pair, line)].append(line)
    for comparison, hypotheses in comparisons.items():
        absent = planned[comparison] - {(treatment, control) for treatment, control, _ in hypotheses}
        p_values = [copies[0]["p_value"] for copies in hypotheses.values()] + [1.0] * len(absent)
        for copies, adjusted in zip(hypotheses.values(), statistics.holm(p_values), strict=False):
            for line in copies:
                line["p_adjusted"] = adjusted


def _judge(pair: Pair, loaded: Loaded) -> None:
    """Verdicts, validity and answer of each arm, from the adjusted p-values and its teacher's positive control."""
    seeds = pair.measured.seeds
    for arm, summary in pair.summaries.items():
        protocol = pair.measured.protocols[arm]
        verdicts.add_verdicts(summary["contrasts"], protocol)
        shared = between.positive_control(pair.setting, pair.spec, seeds, loaded.rows, protocol)
        others = [contrast for contrast in summary["contrasts"] if contrast["role"] != "positive_control"]
        whole = summary | {"contrasts": others + ([] if shared is None else [shared])}
        judged = verdicts.validity(whole, protocol)
        if pair.leaks_unknown:
            told = ", ".join(map(str, pair.leaks_unknown))
            judged["messages"].insert(0, f"what the sanitizer left at seed {told} is not known: its counts are missing")
            judged["valid"] = False
        if shared is not None:
            reached = {each["seed"]: each["difference"] for each in shared["per_seed"]}
            lacking = [seed for seed in seeds if seed not in reached]
            low = [seed for seed, each in reached.items() if each < protocol.targets.positive_control_low]
            if lacking:
                judged["messages"].append(f"the positive control was not run at seed {', '.join(map(str, lacking))}")
            if low and judged["positive_control"] == "passed":
                judged["messages"].append(
                    f"the positive control did not transfer at seed {', '.join(map(str, low))}, though it did over all"
                )
        summary["validity"] = judged
        summary["answer"] = verdicts.answer(summary)


# Between pairs


def _between(pairs: Sequence[Pair], protocol: GridProtocol) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The contrasts between pairs, and the claim, per setting and arm."""
    lines, claims = [], []
    for setting in protocol.settings:
        here = [pair for pair in pairs if pair.setting == setting]
        own = [pair.measured for pair in here]
        first = next((each for each in own if each.spec.name == protocol.strongest), None)
        if first is None:
            continue
        for arm in first.spec.arms:
            others = [each for each in own if each is not first and arm in each.spec.arms]
            found = between.between(setting, arm, first, others)
            lines += found
            invalid = [
                pair.spec.name
                for pair in here
                if arm in pair.summaries and not pair.summaries[arm]["validity"]["valid"]
            ]
            claims.append(between.strongest_line(setting, arm, protocol.strongest, found, len(protocol.seeds), invalid))
    return lines, claims


def _power(line: Mapping[str, Any], protocol: GridProtocol, planned: Planned) -> dict[str, Any]:
    differences = [each["difference"] for each in line["per_seed"]]
    resolution = 1 / protocol.of(line["setting"]).tasks
    tests = len(planned[line["setting"], line["name"]])
    return between.power_line(
        line["setting"], line["pair"], line["arm"], differences, len(protocol.seeds), resolution, tests
    )
