"""From cells to the grid document: every pair judged as a single run is, then the pairs beside each other.

A directory of cells and the grid's protocol in; `grid.json` of schema 1 out, plain JSON values. A pure function of the files
and its arguments. A seed that lacks a condition of a pair is left out of that pair; what is missing is listed, with why.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax.evaluate import statistics, verdicts
from subl_jax.evaluate.summary import SummaryError, build_summary, total_sanitizer
from subl_jax.grid import between, document
from subl_jax.grid import protocol as grid_protocol
from subl_jax.grid.between import Measured
from subl_jax.grid.cells import Key, Loaded, load, load_sanitizers
from subl_jax.grid.document import Pair
from subl_jax.grid.pairs import CONTROL, PairSpec
from subl_jax.grid.protocol import GridProtocol
from subl_jax.settings.interface import Wording
from subl_jax.settings.registry import get_setting

SCHEMA = 1


def analyse(
    directory: Path,
    protocol: GridProtocol,
    *,
    frozen: GridProtocol | None = None,
    hashes: Mapping[Key, str] | None = None,
    wordings: Mapping[str, Wording] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The grid document.

    Args:
      directory: holds the cells, see `grid.cells`.
      protocol: what this grid measures: settings, pairs, arms, seeds.
      frozen: the protocol that was frozen before, or None; departures are listed.
      hashes: (setting, seed, model) -> output hash that the evaluation must have; None: any.
      wordings: setting -> how it names what it measures; by default as the setting says.
      notes: sentences for the report.

    Returns:
      `grid.json`, schema 1.
    """
    loaded = load(directory, grid_protocol.wanted_cells(protocol, hashes))
    counts, uncounted = load_sanitizers(directory, grid_protocol.wanted_sanitizers(protocol, hashes))
    wordings = {name: get_setting(name).wording for name in protocol.settings} | dict(wordings or {})
    told = list(notes)
    pairs = [
        _pair(setting, spec, protocol, loaded, counts, uncounted, wordings[setting], told)
        for setting in protocol.settings
        for spec in protocol.pairs(setting)
    ]
    _share_positive_controls(pairs)
    contrasts = [line for pair in pairs for line in _contrasts(pair)]
    _adjust(contrasts)
    for pair in pairs:
        for arm, summary in pair.summaries.items():
            # After the adjustment, which the verdict of a secondary contrast looks at.
            verdicts.add_verdicts(summary["contrasts"], pair.measured.protocols[arm])
    lines, claims = _between(pairs, protocol)
    rows = [row for setting in protocol.settings for row in document.rows(pairs, setting, wordings[setting])]
    contrasts += [line for setting in protocol.settings for line in document.control_contrast(contrasts, setting)]
    missing = loaded.missing + uncounted + [line for pair in pairs for line in pair.missing if line["seed"] is None]
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
        "power": [_power(line, protocol) for line in contrasts if line["role"] == "primary"],
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
        "notes": [*dict.fromkeys(told), *document.mixed(used)],
    }


# One pair


def _pair(
    setting: str, spec: PairSpec, protocol: GridProtocol, loaded: Loaded, counts: Mapping[Key, Mapping[str, Any]],
    uncounted: Sequence[Mapping[str, Any]], wording: Wording, notes: list[str],
) -> Pair:  # fmt: skip
    """Judges each arm of a pair over the seeds that have all its conditions."""
    missing = [line for line in loaded.missing if (line["setting"], line["pair"]) == (setting, spec.name)]
    holes = {line["seed"] for line in missing}
    seeds = tuple(seed for seed in protocol.seeds if seed not in holes)
    own = {arm: protocol.protocols[setting, spec.name, arm] for arm in spec.arms}
    rows = {
        (condition, seed): loaded.rows[setting, seed, spec.model(condition)]
        for seed in seeds
        for condition in spec.conditions()
    }
    _even_readouts(setting, spec, rows, notes)
    summaries = {}
    filtered = {
        f"seed={seed}/{teacher}": arm
        for seed in seeds
        for teacher, arm in counts.get((setting, seed, spec.sanitizer), {}).items()
    }
    if seeds:
        own = {arm: dataclasses.replace(each, seeds=seeds) for arm, each in own.items()}
        try:
            for arm, each in own.items():
                summaries[arm] = build_summary(
                    [rows[condition, seed] for condition in spec.conditions(arm) for seed in seeds],
                    each,
                    sanitizer=total_sanitizer(filtered),
                    timing_s={},
                    throughput={},
                    versions={},
                    wording=wording,
                    frozen=each,  # what was frozen is the grid; here only what the rows themselves depart in is looked for
                    conditions=spec.conditions(arm),
                )
        except SummaryError as error:
            seeds, rows, summaries = (), {}, {}
            named = {"setting": setting, "pair": spec.name, "seed": None, "condition": "all", "model": "all"}
            missing.append({**named, "why": f"corrupted: {error}"})
    unknown = [line["seed"] for line in uncounted if (line["setting"], line["pair"]) == (setting, spec.name)]
    leaks_unknown = [seed for seed in unknown if seed in seeds]
    return Pair(setting, Measured(spec, seeds, rows, own), missing, summaries, leaks_unknown)


def _even_readouts(setting: str, spec: PairSpec, rows: dict[tuple[str, int], dict[str, Any]], notes: list[str]) -> None:
    """Leaves out a readout that a condition has at some seeds only, with a note: its mean would be one of other seeds."""
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


def _share_positive_controls(pairs: Sequence[Pair]) -> None:
    """Judges each arm again beside the positive control of its teacher, wherever that was distilled."""
    controls = {
        (pair.setting, pair.spec.name): contrast
        for pair in pairs
        for summary in pair.summaries.values()
        for contrast in summary["contrasts"]
        if contrast["role"] == "positive_control"
    }
    for pair in pairs:
        for arm, summary in pair.summaries.items():
            shared = controls.get((pair.setting, pair.spec.positive_pair))
            has_own = any(contrast["role"] == "positive_control" for contrast in summary["contrasts"])
            whole = summary | {"contrasts": summary["contrasts"] + ([] if shared is None or has_own else [shared])}
            judged = verdicts.validity(whole, pair.measured.protocols[arm])
            if pair.leaks_unknown:
                seeds = ", ".join(map(str, pair.leaks_unknown))
                judged["messages"].insert(
                    0, f"what the sanitizer left at seed {seeds} is not known: its counts are missing"
                )
                judged["valid"] = False
            summary["validity"] = judged
            summary["answer"] = verdicts.answer(summary)


def _contrasts(pair: Pair) -> list[dict[str, Any]]:
    """The contrasts of a pair, arm by arm; the very objects of its summaries, with what the grid adds."""
    found = []
    for arm, summary in pair.summaries.items():
        protocol = pair.measured.protocols[arm]
        named = {contrast.name: contrast for contrast in protocol.contrasts}
        for line in summary["contrasts"]:
            line |= {
                "setting": pair.setting, "pair": pair.spec.name, "arm": arm, "seeds": list(pair.measured.seeds),
            }  # fmt: skip
            between.add_secondary(line, pair.measured, named[line["name"]], protocol)
            found.append(line)
    return found


def _adjust(contrasts: Sequence[dict[str, Any]]) -> None:
    """Replaces `p_adjusted` by Holm's across the pairs of a setting, comparison by comparison (one arm, one readout)."""
    comparisons: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in contrasts:
        # A comparison has one name in all pairs; the name holds the arm, and the readout if that is not the behaviour.
        comparisons[line["setting"], line["name"]].append(line)
    for lines in comparisons.values():
        for line, adjusted in zip(lines, statistics.holm([line["p_value"] for line in lines]), strict=True):
            line["p_adjusted"] = adjusted


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


def _power(line: Mapping[str, Any], protocol: GridProtocol) -> dict[str, Any]:
    differences = [each["difference"] for each in line["per_seed"]]
    resolution = 1 / protocol.of(line["setting"]).tasks
    tests = sum(line["arm"] in spec.arms for spec in protocol.pairs(line["setting"]))
    return between.power_line(
        line["setting"], line["pair"], line["arm"], differences, len(protocol.seeds), resolution, tests
    )
