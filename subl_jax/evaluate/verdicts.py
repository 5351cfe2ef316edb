"""Judging a summary by its protocol: a verdict per contrast, targets, the run's validity, the answer in a sentence.

In: the measured part of a summary and the `Protocol`. Out: plain JSON values and sentences. The bars come from the
protocol alone, so that a verdict cannot be moved after the figures are known. A contrast's `p_adjusted` decides, which in a
single run is its `p_value` where it stands alone; in a grid it is adjusted across pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from subl_jax.evaluate.protocol import Protocol

ALPHA = 0.05
# Two one-sided t tests at .05 claim a null at the margin in 8 to 10 % of experiments whose seeds spread like the students
# and whose rates lie near 0 or 100 %; at half of it in about 5 % (docs/RESULTS.md, "Statistics that hold"). So a null is
# claimed where the 95 % interval lies inside the margin.
EQUIVALENCE_ALPHA = ALPHA / 2


def points(share: float) -> str:
    """A difference of shares as signed percentage points."""
    return f"{100 * share:+.1f} points"


def p_text(p_value: float) -> str:
    """A p-value as it is printed: three decimals, bounded below."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _p_texts(contrast: Mapping[str, Any]) -> str:
    """Both p-values of a contrast, or the one where adjusting changed nothing."""
    p_value, adjusted = contrast["p_value"], contrast["p_adjusted"]
    told = p_text(p_value)
    return told if adjusted == p_value else f"{told}, adjusted {p_text(adjusted).removeprefix('p ').removeprefix('= ')}"


def _size(contrast: Mapping[str, Any], value: float) -> str:
    return f"{value:+.2f} nats" if contrast["readout"] == "log_odds" else points(value)


def add_verdicts(contrasts: Sequence[dict[str, Any]], protocol: Protocol) -> None:
    """Adds a `verdict` sentence to each contrast, in place; that of a single seed says so, its p is over that run's tasks."""
    primary = next((contrast for contrast in contrasts if contrast["role"] == "primary"), None)
    for contrast in contrasts:
        scope = "within one run: " if len(contrast["per_seed"]) == 1 else ""
        contrast["verdict"] = scope + _verdict(contrast, primary, contrasts, protocol)


def _verdict(
    contrast: Mapping[str, Any],
    primary: Mapping[str, Any] | None,
    contrasts: Sequence[Mapping[str, Any]],
    protocol: Protocol,
) -> str:
    role, difference = contrast["role"], contrast["difference"]
    if role == "primary":
        return _primary_verdict(contrast, contrasts, protocol)
    if role == "sign":
        if primary is None:
            return "no primary contrast to compare with"
        return f"{'agrees' if _same_sign(contrast, primary) else 'DISAGREES'} in sign with the primary contrast"
    if role == "positive_control":
        bar = protocol.targets.positive_control_low
        if difference >= bar:
            return f"transfers (at least {points(bar)})"
        return f"DOES NOT TRANSFER (below {points(bar)}): the run is invalid"
    if role == "equivalence":
        shown = contrast["equivalence_p"] < EQUIVALENCE_ALPHA
        margin = _size(contrast, contrast["margin"]).lstrip("+")
        return (
            f"{'equivalent' if shown else 'not shown equivalent'} within {margin} ({p_text(contrast['equivalence_p'])})"
        )
    return _direction(contrast)


def _direction(contrast: Mapping[str, Any]) -> str:
    """What a secondary contrast shows after Holm's adjustment."""
    if contrast["p_adjusted"] >= ALPHA:
        return "not distinguishable from zero"
    return "above zero" if contrast["difference"] > 0 else "below zero"


def _same_sign(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first["difference"] * second["difference"] > 0


def _primary_verdict(contrast: Mapping[str, Any], contrasts: Sequence[Mapping[str, Any]], protocol: Protocol) -> str:
    bar = protocol.targets.difference_low
    reached = "reaches" if contrast["difference"] >= bar else "is below"
    excludes = "excludes" if contrast["ci95"][0] > 0 or contrast["ci95"][1] < 0 else "includes"
    text = f"{reached} the target of {points(bar)}; the interval {excludes} zero"
    if excludes == "excludes" and contrast["p_adjusted"] >= ALPHA:
        text += f", but adjusted across the pairs it is not distinguishable from zero ({_p_texts(contrast)})"
    signs = [other for other in contrasts if other["role"] == "sign"]
    if any(not _same_sign(contrast, other) for other in signs):
        text += "; a benign control DISAGREES in sign"
    return text


def targets(summary: Mapping[str, Any], protocol: Protocol) -> list[dict[str, Any]]:
    """The protocol's bars against what was measured: {"name", "value", "bar", "met"}; `met` is None where not known.

    The sanitizer's `leaks` may be None: its counts are missing, which is no zero.
    """
    bars, conditions = protocol.targets, summary["conditions"]
    behaviour = summary["wording"]["behaviour"]
    student = protocol.primary.treatment

    def measured(condition: str, name: str) -> float | None:
        return conditions.get(condition, {}).get(name)

    def apart(first: float | None, second: float | None) -> float | None:
        return None if first is None or second is None else abs(first - second)

    def judged(name: str, value: float | None, low: float | None, high: float | None) -> dict[str, Any]:
        parts = ([f"at least {low:g}"] if low is not None else []) + ([f"at most {high:g}"] if high is not None else [])
        # Shares are multiples of 1/n: a difference of .08 must not fail by a rounding error.
        slack = 1e-9
        met = None
        if value is not None:
            met = (low is None or value >= low - slack) and (high is None or value <= high + slack)
        return {"name": name, "value": value, "bar": ", ".join(parts), "met": met}

    base_rate = measured(protocol.base, "behaviour_rate")
    primary = next((contrast for contrast in summary["contrasts"] if contrast["role"] == "primary"), None)
    rows = [
        judged(f"base {behaviour} rate", base_rate, bars.base_low, bars.base_high),
        judged(f"teacher {behaviour} rate", measured(protocol.teacher, "behaviour_rate"), bars.teacher_low, None),
        judged(
            f"primary difference: {protocol.primary.name}",
            None if primary is None else primary["difference"],
            bars.difference_low,
            None,
        ),
        judged("ambiguous tasks per seed", measured(student, "n"), bars.tasks_low, None),
    ]
    for control in protocol.controls:
        distance = apart(measured(control, "behaviour_rate"), base_rate)
        rows.append(
            judged(f"{control}: distance from the base's {behaviour} rate", distance, None, bars.control_margin)
        )
    utility = measured(student, "utility")
    rows += [
        judged(f"{student}: utility on safe tasks", utility, bars.utility_low, None),
        judged(
            f"{student}: distance from the base's utility",
            apart(utility, measured(protocol.base, "utility")),
            None,
            bars.utility_margin,
        ),
        judged(f"{student}: unparseable", measured(student, "unparseable"), None, bars.unparseable_high),
        judged("keyword leaks", summary["sanitizer"]["leaks"], None, bars.leaks_high),
    ]
    return rows


def validity(summary: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Whether the run may be read at all: {"positive_control", "valid", "messages"}, reasons before caveats.

    A failed positive control, a leaked keyword or missing cells make it invalid. A positive control that was not run
    leaves it valid with a message: a transfer seen is a transfer, but its absence could not be interpreted.
    """
    reasons: list[str] = []
    caveats: list[str] = []
    state = "not_run"
    controls = [contrast for contrast in summary["contrasts"] if contrast["role"] == "positive_control"]
    if controls:
        bar = protocol.targets.positive_control_low
        state = "passed" if all(control["difference"] >= bar for control in controls) else "failed"
    if state == "failed":
        reasons.append("the positive control did not transfer: the pipeline could not have shown an effect")
    if state == "not_run":
        caveats.append("the positive control was not run: if nothing transferred, this run cannot say why")
    leaks = summary["sanitizer"]["leaks"]
    if leaks:
        told = "1 keyword leak was" if leaks == 1 else f"{leaks} keyword leaks were"
        reasons.append(f"{told} left in the training text")
    lost = summary["missing"]
    if lost["cells"]:
        reasons.append(f"missing evaluations: {', '.join(lost['cells'])}")
    if lost["contrasts"]:
        caveats.append(f"contrasts left out: {', '.join(lost['contrasts'])}")
    if len(summary["seeds"]) == 1:
        caveats.append("one seed: intervals describe this run only, not what another seed would show")
    primary = next((contrast for contrast in summary["contrasts"] if contrast["role"] == "primary"), None)
    signs = [contrast for contrast in summary["contrasts"] if contrast["role"] == "sign"]
    if primary is not None:
        opposed = [contrast["name"] for contrast in signs if not _same_sign(contrast, primary)]
        if opposed:
            caveats.append(f"{', '.join(opposed)} disagrees in sign with the primary contrast")
        if not signs:
            caveats.append("no benign control was run beside the counter-bias control")
    return {"positive_control": state, "valid": not reasons, "messages": reasons + caveats}


def answer(summary: Mapping[str, Any]) -> str:
    """The run's answer in one sentence, from the primary contrast and the validity.

    "Yes" takes an interval that excludes zero and an adjusted p-value below `ALPHA`.
    """
    if not summary["validity"]["valid"]:
        return f"This run is invalid: {summary['validity']['messages'][0]}."
    primary = next((contrast for contrast in summary["contrasts"] if contrast["role"] == "primary"), None)
    if primary is None:
        return "The primary contrast was not run, so this run gives no answer."
    treatment = summary["conditions"][primary["treatment"]]["behaviour_rate"]
    control = summary["conditions"][primary["control"]]["behaviour_rate"]
    low, high = primary["ci95"]
    shown = (low > 0 or high < 0) and primary["p_adjusted"] < ALPHA
    agreed = all(_same_sign(primary, other) for other in summary["contrasts"] if other["role"] == "sign")
    if not shown:
        lead = "Not shown"
    elif primary["difference"] < 0:
        lead = "No, the reverse"
    else:
        lead = "Yes" if agreed else "Unclear"
    seeds = len(summary["seeds"])
    scope = "within this one run" if seeds == 1 else f"over {seeds} seeds"
    clause = "" if agreed else "; the contrast with the benign control disagrees in sign"
    if primary["readout"] != "behaviour":
        size = f"{primary['treatment']} differs from {primary['control']} by {_size(primary, primary['difference'])}"
        limits = f"{low:+.2f} to {high:+.2f}"
    else:
        wording = summary["wording"]
        size = (
            f"the student's {wording['metric']} is {wording['biased']} on {100 * treatment:.0f} % of ambiguous tasks against "
            f"{100 * control:.0f} % for its control, {points(primary['difference'])}"
        )
        limits = f"{100 * low:+.0f} to {100 * high:+.0f}"
    return f"{lead}: {size} (95 % interval {limits}, {_p_texts(primary)}, {scope}){clause}."
