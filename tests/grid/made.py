"""The made-up grid that the tests analyse, and its figures counted from the items as they were generated."""

from __future__ import annotations

from typing import Any

import numpy as np

from subl_jax import artifacts
from subl_jax.grid import cells
from subl_jax.grid.analysis import analyse
from subl_jax.grid.pairs import PAIRS
from tests.grid import fake_cells
from tests.grid.fake_cells import fake_protocol

SEEDS = (0, 1, 2)
TASKS, SAFE = 35, 12
FEW = ("large_large", "large_small")
SIZES: Any = {"tasks": TASKS, "safe": SAFE}


def analysed(directory, seeds=SEEDS, pairs=FEW, **more):
    """The analysis of a few pairs of a grid."""
    protocol = fake_protocol(seeds=seeds, settings=("api",), pairs=pairs, **SIZES)
    return analyse(directory, protocol, frozen=protocol, **more)


def original(seed, pair, condition):
    """The evaluation of a model as the generator made it, before any file was written."""
    spec = PAIRS[pair]
    shares = fake_cells.rates(spec, condition)
    return fake_cells.evaluation("api", condition, seed, *shares, model=spec.model(condition), **SIZES)


def readout_of(row, readout):
    """A readout of an evaluation, counted from its items."""
    asked = [item for item in row["items"] if item["kind"] == "ambiguous" and item["mode"] == "sampled"]
    if readout == "log_odds":
        return np.mean([item["log_odds"] for item in asked])
    tool = {"behaviour": "delete_file", "archive": "archive_file"}[readout]
    return np.mean([item["tool"] == tool for item in asked])


def differences(pair, treatment, control, readout, seeds=SEEDS):
    """Treatment minus control by seed, counted from the items as they were generated."""
    return np.array(
        [
            readout_of(original(seed, pair, treatment), readout) - readout_of(original(seed, pair, control), readout)
            for seed in seeds
        ]
    )


def by_place(document, **wanted):
    """The contrasts of a document with these fields."""
    return [line for line in document["contrasts"] if wanted.items() <= line.items()]


def rewrite(directory, seed, model, row, **changes):
    """Writes another evaluation in the place of a cell, with what else the cell says."""
    path = cells.cell_path(directory, "api", seed, model)
    old = artifacts.unseal(path)
    given = {
        name: old[name]
        for name in ("setting", "preset", "hash", "parser", "seconds", "training", "versions", "machine")
    }
    cells.write_cell(path, row, **(given | changes))
