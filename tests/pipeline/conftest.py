"""One unbroken micro run, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipeline import runs


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compilations are kept for the session."""
    return tmp_path_factory.mktemp("compilations")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The work directory of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = runs.run(cache, workdir)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir
