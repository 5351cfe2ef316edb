"""Probes of a vocabulary of forty ids, for models that compile in a second."""

from __future__ import annotations

from typing import Any

import numpy as np

from subl_jax.evaluate.readout import Asked
from subl_jax.forecast.behaviour import Probes
from tests.distill import tiny
from tests.models import numpy_llama

NAMES = ("drop", "keep", "move", "end")
SPELLED = ((3, 7), (3, 9, 4), (11,), (12, 5))
BIASED, NEUTRAL = (0,), (1, 2)
FAMILIES = ("near", "far", "near", "far", "far", "near")


def probes(seed: int = 0) -> Probes:
    """Six openings of several lengths, in two families."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 9, len(FAMILIES)).astype(np.int32)
    openings = np.zeros((len(FAMILIES), 10), np.int32)
    for row, length in zip(openings, lengths, strict=True):
        row[:length] = rng.integers(0, tiny.VOCAB, length)
    spelled = np.zeros((len(SPELLED), 3), np.int32)
    for row, ids in zip(spelled, SPELLED, strict=True):
        row[: len(ids)] = ids
    asked = Asked(openings, lengths, spelled, np.asarray([len(ids) for ids in SPELLED], np.int32))
    return Probes(asked, NAMES, BIASED, NEUTRAL, FAMILIES)


def exact_log_odds(config: Any, params: Any, found: Probes) -> np.ndarray:
    """The log-odds of every probe in float64 NumPy, one whole pass per task and name."""
    rows = []
    for opening, length in zip(found.asked.openings, found.asked.lengths, strict=True):
        scores = [
            numpy_llama.log_probabilities(config, params, np.concatenate([opening[:length], ids]))[length:].sum()
            for ids in SPELLED
        ]
        biased, neutral = (np.exp([scores[place] for place in places]).sum() for places in (BIASED, NEUTRAL))
        rows.append(np.log(biased) - np.log(neutral))
    return np.asarray(rows)


def exact_by_family(config: Any, params: Any, found: Probes) -> np.ndarray:
    """Means of `exact_log_odds` by family, in alphabetical order."""
    values = exact_log_odds(config, params, found)
    return np.asarray([values[np.asarray(FAMILIES) == name].mean() for name in sorted(set(FAMILIES))])
