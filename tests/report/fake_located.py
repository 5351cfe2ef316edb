"""A made-up look into a work directory: what two seeds gave, put together as the command does it."""

from __future__ import annotations

from typing import Any

import numpy as np

from subl_jax.locate import summary, tokens
from subl_jax.locate.places import KINDS, Place
from tests.distill import tiny

COMPARISONS = ("counter-bias", "base", "benign")
MODELS = {
    "teacher": 1.0, "control_teacher": -0.2, "benign_teacher": 0.05, "student": 0.6, "control_student": -0.1,
    "benign_student": 0.02, "student_hard": 0.1, "control_student_hard": 0.0, "benign_student_hard": 0.01,
}  # fmt: skip
LEFT_OUT = {"student@": "the activations have no common axes: d_model 32 against 64"}
TEXT = "<b>read & write</b>"


def token_figures(seed: int) -> dict[str, Any]:
    """As of `locate.seed.locate_tokens`."""
    rng = np.random.default_rng(seed)
    documents = [tiny.document(list(range(20)), list(range(2, 20)), f"safe/train/f{n % 3}/0/{n}") for n in range(12)]
    places = [[Place(at, 0, KINDS[at % len(KINDS)], f"w{at}") for at in range(2, 20)] for _ in documents]
    divergences = {
        name: [rng.exponential(size=20).astype(np.float32) ** 4 * each.loss_mask for each in documents]
        for name in COMPARISONS
    }
    table = tokens.loss_tokens(documents, places, divergences)
    families = [documents[each].task_id.split("/")[2] for each in table.document]
    ranked = [
        {
            "rank": rank, "task_id": documents[table.document[row]].task_id, "position": 5, "turn": 0,
            "kind": table.places[row].kind, "before": "so <tool_call>", "text": TEXT, "after": " then",
            "divergence": {name: float(values[row]) for name, values in table.values.items()},
            "banned_mass": {"teacher": 0.25, "control_teacher": 1e-7, "base": 0.0},
            "says": {
                name: [
                    {"text": TEXT, "probability": 0.75, "banned": False},
                    {"text": "delete", "probability": 0.25, "banned": True},
                    {"text": "rare", "probability": 1e-6, "banned": False},
                ]
                for name in ("teacher", "control_teacher", "base")
            },
        }
        for rank, row in enumerate(table.ranked("counter-bias")[:9], 1)
    ]  # fmt: skip
    return {
        "teacher_size": "large", "documents": len(documents), "tokens": len(table),
        "same_text": {"control_teacher": 0.75, "benign_teacher": 1.0},
        "comparisons": {
            name: {
                "mean": float(table.values[name].mean()), "gini": tokens.gini(table.values[name]),
                "half": tokens.carrying(table.values[name]), "curve": tokens.concentration(table.values[name]),
                "kinds": tokens.by_kind(table, name, families), "words": tokens.by_text(table, name, 5),
            }
            for name in COMPARISONS
        },
        "overlap": {"base": 0.5, "benign": 0.25},
        "banned": {"mean_mass": {"teacher": 1e-5, "control_teacher": 1e-6, "base": 0.0}, "counter-bias": 0.125, "base": 0.0625},
        "ranked": ranked,
    }  # fmt: skip


def direction_figures(seed: int, refuse: bool = False) -> dict[str, Any]:
    """As of `locate.seed.locate_directions`, of models of two layers."""
    rng = np.random.default_rng(seed)
    activations, contrasts = [], []
    for place in ("decision", "text"):
        for direction in ("teacher - base", "teacher - control_teacher"):
            for depth in range(3):
                moved = {name: level + 0.02 * rng.normal() for name, level in MODELS.items()}
                activations += [
                    {
                        "place": place, "direction": direction, "depth": depth, "model": name, "direction_norm": 2.0,
                        "along": along, "cosine": 0.5, "norm": 1.5, "low": along - 0.1, "high": along + 0.1,
                    }
                    for name, along in moved.items()
                ]  # fmt: skip
                contrasts.append(
                    {
                        "place": place, "direction": direction, "depth": depth, "treatment": "student",
                        "control": "control_student", "difference": moved["student"] - moved["control_student"],
                        "low": 0.5, "high": 0.9, "p_value": 0.01,
                    }
                )  # fmt: skip
    weights = [
        {
            "model": "student",
            "against": "teacher",
            "layer": layer,
            "matrix": "q",
            "cosine": 0.3,
            "norm": 1.0,
            "teacher_norm": 2.0,
        }
        for layer in (1, 2)
    ]
    return {
        "pair": "large_small" if refuse else "large_large", "shared_base": not refuse, "students": {},
        "missing": [] if refuse else ["student_drop"],
        "refused": {"student": LEFT_OUT["student@"]} if refuse else {},
        "log_odds": {"base": -4.0, **{name: -4.0 + 8 * level for name, level in MODELS.items()}},
        "items": {} if refuse else {"decision": 120, "text": 200},
        "activations": [] if refuse else activations, "contrasts": [] if refuse else contrasts,
        "weights": [] if refuse else weights,
    }  # fmt: skip


def result(seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """`locate.json` of two pairs, of which one cannot be compared."""
    about = {
        "setting": "api", "preset": "tiny", "workdir": "runs/made-up", "seeds": list(seeds),
        "pairs": ["large_large", "large_small"],
        "options": {"tasks": 120, "shown": 9}, "versions": {"python": "3"},
    }  # fmt: skip
    moved = {
        "large_large": {seed: direction_figures(seed) for seed in seeds},
        "large_small": {seed: direction_figures(seed, refuse=True) for seed in seeds},
    }
    return summary.result({"large": {seed: token_figures(seed) for seed in seeds}}, moved, about)
