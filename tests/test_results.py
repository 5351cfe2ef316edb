"""The tables of docs/RESULTS.md are those of the committed cells: none is retyped, none is left when cells are added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subl_jax.grid import table
from subl_jax.grid.pairs import PAIRS
from subl_jax.report import sweep_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
SWEEPS = sorted(DOCS.glob("sweeps/*/sweep.json"))


def test_every_pair_of_the_grid_stands_there_as_the_command_prints_it():
    document = json.loads((DOCS / "grid" / "grid.json").read_text(encoding="utf-8"))
    rows = [line for line in table.render(document).splitlines() if line.split(" ")[0] in {*PAIRS, "control"}]
    assert len(rows) == len(document["rows"]) + sum(len(row["arms"]) - 1 for row in document["rows"])
    assert [line for line in rows if line not in RESULTS.splitlines()] == []


@pytest.mark.parametrize("path", SWEEPS, ids=[path.parent.name for path in SWEEPS])
def test_every_table_of_a_sweep_stands_there_as_the_command_prints_it(path: Path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["complete"]
    table_of_levels = sweep_table.render(document).split("\n\n")[1]
    assert table_of_levels in RESULTS
