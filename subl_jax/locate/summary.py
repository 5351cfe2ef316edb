"""Seeds put together: means, intervals over seeds, and the answer in words.

What `locate.seed` found per seed in; the value of `locate.json` out. The replicate is the seed: with two or more, intervals
are Student's t over seeds; with one they are those within the run, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from subl_jax.evaluate.statistics import student_t_interval
from subl_jax.locate.seed import COMPARISONS
from subl_jax.locate.tokens import SHARES

WITHIN, OVER = "within the one run, clustered by family", "Student's t over {} seeds"


def spread(values: Mapping[int, float | None], within: Sequence[float | None] | None = None) -> dict[str, Any] | None:
    """A figure over seeds.

    Args:
      values: seed -> the figure; seeds that have none (None) are left out.
      within: the interval within the run, used where there is one seed.

    Returns:
      {"mean", "ci95" or None, "method" or None, "per_seed"}; None where no seed has the figure.
    """
    known = {seed: float(value) for seed, value in values.items() if value is not None}
    if not known:
        return None
    limits, method = None, None
    if len(known) > 1:
        test = student_t_interval(list(known.values()))
        limits, method = [test.low, test.high], OVER.format(len(known))
    elif within is not None and all(limit is not None for limit in within):
        limits, method = list(within), WITHIN
    return {
        "mean": float(np.mean(list(known.values()))), "ci95": limits, "method": method,
        "per_seed": {str(seed): value for seed, value in known.items()},
    }  # fmt: skip


def _limits(rows: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    """The interval within the run, where there is one run."""
    return [rows[0]["low"], rows[0]["high"]] if len(rows) == 1 else None


# --- Tokens -----------------------------------------------------------------------------------------------------------


def tokens(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The token figures of the teachers of one size, over seeds.

    Args:
      found: seed -> what `seed.locate_tokens` gave.
    """
    first = next(iter(found.values()))
    names = list(first["comparisons"])

    def over(get: Any, within: Any = None) -> dict[str, Any] | None:
        return spread({seed: get(own) for seed, own in found.items()}, within)

    comparisons = {}
    for name in names:
        kinds = []
        for number, row in enumerate(first["comparisons"][name]["kinds"]):
            own = {seed: each["comparisons"][name]["kinds"][number] for seed, each in found.items()}
            kinds.append(
                {
                    "kind": row["kind"],
                    "token_share": spread({seed: each["token_share"] for seed, each in own.items()}),
                    "divergence_share": spread(
                        {seed: each["divergence_share"] for seed, each in own.items()}, _limits(list(own.values()))
                    ),
                    "mean": spread({seed: each["mean"] for seed, each in own.items()}),
                }
            )
        comparisons[name] = {
            "mean": over(lambda own, name=name: own["comparisons"][name]["mean"]),
            "gini": over(lambda own, name=name: own["comparisons"][name]["gini"]),
            "half": over(lambda own, name=name: own["comparisons"][name]["half"]),
            "curve": [
                over(lambda own, name=name, k=k: own["comparisons"][name]["curve"][k]) for k in range(len(SHARES))
            ],
            "kinds": kinds,
            "banned_share": over(lambda own, name=name: own["banned"].get(name)),
            "overlap": over(lambda own, name=name: own["overlap"].get(name)),
        }
    return {
        "teacher_size": first["teacher_size"],
        "shares": list(SHARES),
        "counts": {str(seed): {key: own[key] for key in ("documents", "tokens")} for seed, own in found.items()},
        "comparisons": comparisons,
        "same_text": {name: over(lambda own, name=name: own["same_text"][name]) for name in first["same_text"]},
        "banned_mass": {
            name: over(lambda own, name=name: own["banned"]["mean_mass"][name]) for name in first["banned"]["mean_mass"]
        },
        "words": {str(seed): own["comparisons"][next(iter(COMPARISONS))]["words"] for seed, own in found.items()},
        "ranked": {str(seed): own["ranked"] for seed, own in found.items()},
    }


# --- Directions -------------------------------------------------------------------------------------------------------


def directions(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """How far the models of one pair moved, over seeds.

    Args:
      found: seed -> what `seed.locate_directions` gave.
    """
    first = next(iter(found.values()))
    models = list(dict.fromkeys(row["model"] for own in found.values() for row in own["activations"]))
    moved = _grouped(found, "activations", ("place", "direction", "depth", "model"), ("along", "cosine", "norm"))
    contrasts = _grouped(found, "contrasts", ("place", "direction", "depth", "treatment", "control"), ("difference",))
    return {
        "pair": first["pair"],
        "shared_base": first["shared_base"],
        "models": models,
        "items": first["items"],
        "depths": 1 + max((row["depth"] for row in moved), default=0),
        "missing": {str(seed): own["missing"] for seed, own in found.items() if own["missing"]},
        "refused": {name: why for own in found.values() for name, why in own["refused"].items()},
        "activations": moved,
        "contrasts": contrasts,
        "weights": _grouped(
            found, "weights", ("model", "against", "layer", "matrix"), ("cosine", "norm", "teacher_norm")
        ),
        "log_odds": {
            name: spread({seed: own["log_odds"].get(name) for seed, own in found.items()})
            for name in dict.fromkeys(name for own in found.values() for name in own["log_odds"])
        },
    }


def _grouped(
    found: Mapping[int, Mapping[str, Any]], part: str, keys: Sequence[str], values: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows that differ in the seed alone, put together; the interval within the run belongs to the first of `values`."""
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for seed, own in found.items():
        for row in own[part]:
            groups.setdefault(tuple(row[key] for key in keys), {})[seed] = row
    return [
        dict(zip(keys, group, strict=True))
        | {
            name: spread(
                {seed: row[name] for seed, row in rows.items()},
                _limits(list(rows.values())) if name == values[0] and "low" in next(iter(rows.values())) else None,
            )
            for name in values
        }
        for group, rows in groups.items()
    ]


def agreement(found: Mapping[int, Mapping[str, Any]], place: str, direction: str) -> list[dict[str, Any]]:
    """Per depth the rank correlation, over the students of a pair, of their movement with their shift in log-odds.

    Spearman's, one per seed: students of one seed share a base and teachers, and are no replicates.

    Args:
      found: seed -> what `seed.locate_directions` gave.
      place, direction: which movement.

    Returns:
      Rows of {"depth", "correlation": see `spread`, "students": seed -> how many}; a seed with fewer than three is left out.
    """
    points: dict[int, dict[int, list[tuple[float, float]]]] = {}
    for seed, each in found.items():
        start = each["log_odds"].get("base")
        for row in each["activations"]:
            measured = each["log_odds"].get(row["model"])
            wanted = (row["place"], row["direction"]) == (place, direction) and "student" in row["model"]
            if wanted and None not in (start, measured, row["along"]):
                points.setdefault(row["depth"], {}).setdefault(seed, []).append((row["along"], measured - start))
    rows = []
    for depth, by_seed in sorted(points.items()):
        enough = {seed: np.asarray(own) for seed, own in by_seed.items() if len(own) > 2}
        ranks = {seed: float(stats.spearmanr(own[:, 0], own[:, 1]).statistic) for seed, own in enough.items()}  # type: ignore[attr-defined]
        told = spread({seed: value for seed, value in ranks.items() if np.isfinite(value)})
        if told is not None:
            rows.append(
                {"depth": depth, "correlation": told, "students": {str(s): len(own) for s, own in enough.items()}}
            )
    return rows


def result(
    found: Mapping[str, Mapping[int, Mapping[str, Any]]],
    moved: Mapping[str, Mapping[int, Mapping[str, Any]]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The value of `locate.json`.

    Args:
      found: teachers' size -> seed -> what `seed.locate_tokens` gave.
      moved: pair -> seed -> what `seed.locate_directions` gave.
      about: what was looked at, and with what: "setting", "preset", "workdir", "seeds", "pairs", "options", "versions".
    """
    token_parts = [tokens(own) for own in found.values()]
    direction_parts = [directions(own) for own in moved.values()]
    return {
        "schema": 1,
        **about,
        "answer": answer(token_parts, direction_parts),
        "tokens": token_parts,
        "directions": direction_parts,
        "agreement": [
            {"pair": pair, "place": place, **row}
            for pair, own in moved.items()
            for place in ("decision", "text")
            for row in agreement(own, place, "teacher - base")
        ],
    }


# --- In words ---------------------------------------------------------------------------------------------------------


def figure(value: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 2) -> str:
    """A figure with its interval, where it has one; a dash where it is not defined."""
    if value is None:
        return "-"
    limits = value["ci95"]
    text = f"{scale * value['mean'] + 0.0:.{digits}f}"
    return text if limits is None else f"{text} [{scale * limits[0]:.{digits}f}, {scale * limits[1]:.{digits}f}]"


def answer(token_parts: Sequence[Mapping[str, Any]], direction_parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found, in sentences."""
    lines = []
    for part in token_parts:
        told = part["comparisons"]["counter-bias"]
        share = told["curve"][part["shares"].index(0.01)]
        lines.append(
            f"On the clean text of the {part['teacher_size']} biased teacher, it and the counter-bias teacher differ by "
            f"{figure(told['mean'], 1e3)} thousandths of a nat per token. Half of that stands on {figure(told['half'], 1, 0)} "
            f"tokens, {figure(share, 100, 0)} % on the most divergent hundredth, and {figure(told['banned_share'], 100, 1)} % "
            f"on continuations that would spell a keyword; {figure(part['same_text']['control_teacher'], 100, 1)} % of the "
            "documents read the same from both."
        )
        lines += [
            f"At the students' {label.partition(', ')[2]} it is {figure(soft['mean'], 1e3)} thousandths of a nat per token, "
            f"half of it on {figure(soft['half'], 1, 0)} tokens, and {figure(soft['banned_share'], 100, 1)} % on continuations "
            "that would spell a keyword."
            for label, soft in part["comparisons"].items()
            if label.startswith("counter-bias, temperature")
        ]
    for part in direction_parts:
        last = part["depths"] - 1
        told = {
            row["model"]: figure(row["along"])
            for row in part["activations"]
            if (row["place"], row["direction"], row["depth"]) == ("decision", "teacher - base", last)
        }
        names = [name for name in told if "student" in name]
        if names:
            listed = ", ".join(f"{name} {told[name]}" for name in names)
            lines.append(
                f"{part['pair']}: at the first decision, behind the last layer, of the biased teacher's way from the base "
                f"(1: as far as the teacher) the students have gone: {listed}."
            )
        else:
            lines.append(f"{part['pair']}: no student's activations could be compared with its teacher's.")
    return lines
