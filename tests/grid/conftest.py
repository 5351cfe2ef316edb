"""One made-up grid of the API setting for all tests, its analysis, and copies that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from subl_jax.grid.analysis import analyse
from tests.grid import fake_cells
from tests.grid.fake_cells import fake_protocol
from tests.grid.made import SEEDS, SIZES


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A finished grid of the API setting."""
    directory = tmp_path_factory.mktemp("grid")
    fake_cells.write_grid(directory, seeds=SEEDS, settings=("api",), **SIZES)
    return directory


@pytest.fixture(scope="session")
def document(whole) -> dict[str, Any]:
    """Its analysis."""
    protocol = fake_protocol(seeds=SEEDS, settings=("api",), **SIZES)
    return analyse(whole, protocol, frozen=protocol)


@pytest.fixture
def few(whole, tmp_path) -> Path:
    """A copy of the grid that a test may damage."""
    return shutil.copytree(whole, tmp_path / "grid")
