"""A made-up on-policy study: rows of seeds whose arms fall at known rates, and the result made of them."""

from __future__ import annotations

import math
import random
from typing import Any

from subl_jax.presets import micro
from subl_jax.studies.on_policy import StudyConfig
from subl_jax.studies.on_policy_command import build_result

STEPS = (0, 40, 80, 120, 160, 200, 240, 280, 320, 340)
# Arm -> (loss tokens a step, reverse KL at the end on the student's and on the teacher's states); all begin at 0.6, 0.5.
ARMS = {"off_policy": (120, 0.05, 0.02), "mixed": (110, 0.03, 0.022), "on_policy": (100, 0.02, 0.03)}


def rows(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Rows as the study makes them."""
    chance, found = random.Random(3), []
    for seed in seeds:
        for arm, (pace, own, theirs) in ARMS.items():
            shift = chance.uniform(0.85, 1.15)
            for step in STEPS:
                for states, first, last in (("student", 0.6, own), ("teacher", 0.5, theirs)):
                    fall = math.exp(-step / 60)
                    value = (last + (first - last) * fall) * (shift if step else 1 + 0.02 * seed)
                    found.append(
                        {
                            "seed": seed, "arm": arm, "step": step, "loss_tokens": step * (pace + seed), "states": states,
                            "reverse_kl": value * (1 + 0.03 * chance.uniform(-1, 1) * bool(step)), "n_tokens": 1600,
                            "episodes": 48, "done": 0.7 + 0.2 * (1 - fall), "cut_off": 0.05 * fall, "episode_tokens": 34.0,
                        }
                    )  # fmt: skip
    return found


def result(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """The study's result."""
    return build_result(
        rows(seeds), micro(), StudyConfig(), seeds,
        teacher=[{"done": 0.95, "cut_off": 0.01, "episode_tokens": 33.0, "episodes": 48, "n_tokens": 1584}] * len(seeds),
        timing_s={"base": 61.2, "on_policy": 40.0, "measure": 80.1, "total": 181.3},
    )  # fmt: skip
