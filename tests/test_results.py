"""The tables of docs/RESULTS.md are those of the committed cells: none is retyped, none is left when cells are added."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from subl_jax.grid import table
from subl_jax.grid.pairs import PAIRS
from subl_jax.report import sweep_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
# [text](target): a section of this page, or a file beside it.
LINKS = sorted(set(re.findall(r"\]\(([^)\s]+)\)", RESULTS)))
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


def test_what_the_page_links_to_is_there():
    headings = [line.lstrip("# ") for line in RESULTS.splitlines() if line.startswith("#")]
    sections = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    inside = {link[1:] for link in LINKS if link.startswith("#")}
    assert inside and inside <= sections
    beside = [link for link in LINKS if not link.startswith(("#", "http"))]
    assert beside and [link for link in beside if not (DOCS / link).exists()] == []
