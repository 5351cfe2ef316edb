"""One made-up finished run for all tests of the exports, and copies that a test may damage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.exports import fake_seed

# Before any of their libraries is imported: nothing here may ask a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a made-up run of two seeds."""
    return fake_seed.write(tmp_path_factory.mktemp("exports") / "run")


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")
