"""Curves of a study over loss tokens, with intervals over seeds, and paired contrasts at equal loss tokens.

Rows of single seeds in (`on_policy.SeedStudy.rows`); plain records for JSON, tables and plots out. The replicate is a seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subl_jax.evaluate.statistics import holm, student_t_interval

Row = Mapping[str, Any]


def _by_seed(rows: Sequence[Row], arm: str, states: str) -> dict[int, list[Row]]:
    """Seed -> the rows of one arm and kind of states, by step."""
    found: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["step"]):
        if row["arm"] == arm and row["states"] == states:
            found[row["seed"]].append(row)
    return dict(sorted(found.items()))


def _mean(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """The mean over seeds and Student's t 95 % interval; a single seed has no interval."""
    if len(values) < 2:
        return float(values[0]), None
    test = student_t_interval(values)
    return test.mean, [test.low, test.high]


def curve(rows: Sequence[Row], arm: str, states: str) -> list[dict[str, Any]]:
    """One record per measured step: {step, loss_tokens, reverse_kl, ci95 or None, done, cut_off, episode_tokens, per_seed}.

    Every figure is a mean over seeds; arms and seeds say different things, so that a step's loss tokens differ too.

    Raises:
      ValueError: seeds were not measured at the same steps.
    """
    seeds = _by_seed(rows, arm, states)
    steps = {seed: [row["step"] for row in found] for seed, found in seeds.items()}
    if len({tuple(found) for found in steps.values()}) != 1:
        raise ValueError(f"{arm}, {states} states: the measured steps differ between seeds: {steps}")
    points = []
    for at in zip(*seeds.values(), strict=True):
        mean, limits = _mean([row["reverse_kl"] for row in at])
        averaged = {
            name: float(np.mean([row[name] for row in at]))
            for name in ("loss_tokens", "done", "cut_off", "episode_tokens")
        }
        points.append(
            {
                "step": at[0]["step"], **averaged, "reverse_kl": mean, "ci95": limits,
                "per_seed": [
                    {name: row[name] for name in ("seed", "loss_tokens", "reverse_kl", "done")} for row in at
                ],
            }
        )  # fmt: skip
    return points


def common_tokens(rows: Sequence[Row]) -> float:
    """The largest number of loss tokens that every arm of every seed has reached."""
    ends: dict[tuple[str, int], float] = defaultdict(float)
    for row in rows:
        ends[row["arm"], row["seed"]] = max(ends[row["arm"], row["seed"]], row["loss_tokens"])
    return min(ends.values())


def at_tokens(rows: Sequence[Row], arm: str, states: str, tokens: float) -> dict[int, float]:
    """Seed -> reverse KL of an arm at that many loss tokens, on the straight line between its neighbours."""
    return {
        seed: float(np.interp(tokens, [row["loss_tokens"] for row in found], [row["reverse_kl"] for row in found]))
        for seed, found in _by_seed(rows, arm, states).items()
    }


def contrasts(rows: Sequence[Row], arms: Sequence[str], control: str) -> list[dict[str, Any]]:
    """Every other arm minus the control at equal loss tokens (`common_tokens`), on both kinds of states, paired by seed.

    Returns:
      {name, states, treatment, control, loss_tokens, treatment_kl, control_kl, difference, ci95, p_value, p_adjusted,
      method, per_seed}; a single seed leaves ci95 and both p None. Adjusted p: Holm's, over all contrasts of the list.
    """
    tokens, found = common_tokens(rows), []
    for states in dict.fromkeys(row["states"] for row in rows):
        theirs = at_tokens(rows, control, states, tokens)
        for arm in arms:
            if arm == control:
                continue
            ours = at_tokens(rows, arm, states, tokens)
            if ours.keys() != theirs.keys():
                raise ValueError(f"{arm} was measured at seeds {sorted(ours)}, {control} at {sorted(theirs)}")
            differences = {seed: ours[seed] - theirs[seed] for seed in ours}
            test = student_t_interval(list(differences.values())) if len(differences) > 1 else None
            found.append(
                {
                    "name": f"{arm} - {control}", "states": states, "treatment": arm, "control": control,
                    "loss_tokens": tokens,
                    "treatment_kl": float(np.mean(list(ours.values()))),
                    "control_kl": float(np.mean(list(theirs.values()))),
                    "difference": float(np.mean(list(differences.values()))),
                    "ci95": None if test is None else [test.low, test.high],
                    "p_value": None if test is None else test.p_value,
                    "method": "one seed: no interval" if test is None else test.method,
                    "per_seed": [{"seed": seed, "difference": value} for seed, value in differences.items()],
                }
            )  # fmt: skip
    tested = [each for each in found if each["p_value"] is not None]
    for each, adjusted in zip(tested, holm([each["p_value"] for each in tested]), strict=True):
        each["p_adjusted"] = adjusted
    return [{"p_adjusted": None, **each} for each in found]


def answer(found: Sequence[Mapping[str, Any]]) -> str:
    """The question's answer in words, made of the contrasts alone."""
    sentences = []
    for each in found:
        if each["treatment"] != found[0]["treatment"]:
            continue
        size = f"{each['treatment_kl']:.3g} against {each['control_kl']:.3g} nats per token"
        if each["ci95"] is None:
            verdict = "one seed, so no interval"
        else:
            low, high = each["ci95"]
            verdict = f"difference {each['difference']:+.3g} [{low:+.3g}, {high:+.3g}]"
            if low <= 0 <= high:
                verdict += ", which may be chance"
            else:
                verdict += f": {_word(each['treatment'])} {'lower' if high < 0 else 'higher'}"
        sentences.append(f"on the {each['states']}'s states {size} ({verdict})")
    tokens = found[0]["loss_tokens"] / 1000
    first, second = _word(found[0]["treatment"]), _word(found[0]["control"])
    return f"Reverse KL to the teacher after {tokens:.1f} k loss tokens each, {first} against {second}: " + "; ".join(
        sentences
    )


def _word(arm: str) -> str:
    return arm.replace("_", "-")
