"""A small made-up grid, analysed once, and the browser that the reports are looked at with."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subl_jax.report import grid, html, locate
from tests.grid.fake_cells import fake_document
from tests.report import fake_episodes, fake_located, fake_run

PAIRS = ("large_large", "small_small", "large_small")
HOLES = (("api", 1, "student@large_small"), ("bash", 0, "sanitize@small"))


@pytest.fixture(scope="session")
def analysed() -> dict[str, Any]:
    return fake_document(seeds=(0, 1), pairs=PAIRS, tasks=21, safe=6, holes=HOLES, notes=["Made up."])


@pytest.fixture
def document(analysed: dict[str, Any]) -> dict[str, Any]:
    """`grid.json` of two settings, three pairs, two seeds and two holes; every test has its own copy."""
    return copy.deepcopy(analysed)


def episodes_of(document: dict[str, Any]) -> dict[str, Any]:
    """Example episodes of every model of a grid."""
    found = {}
    for setting in document["settings"]:
        models = list(dict.fromkeys(cell["model"] for cell in document["cells"] if cell["setting"] == setting))
        found[setting] = {"seed": 0, "tasks": fake_episodes.tasks(setting, models)}
    return found


@pytest.fixture
def episodes(document: dict[str, Any]) -> dict[str, Any]:
    """Those of the made-up grid."""
    return episodes_of(document)


@pytest.fixture(scope="session")
def reports(analysed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kinds of report as files, with episodes of every model."""
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in ("run", "grid", "locate")}
    examples = fake_episodes.tasks("api", tuple(fake_run.RATES))
    html.write_report(paths["run"], fake_run.summary(), fake_run.curves(), examples, None, {"seeds": [0, 1, 2]})
    grid.write_report(paths["grid"], analysed, episodes_of(analysed), {"preset": "tiny"})
    locate.write_report(paths["locate"], fake_located.result())
    return paths


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; a machine without one skips and says what it misses, continuous integration fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        # A skip nobody reads must not stand for a pass where every test is meant to run.
        leave = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        leave(f"none of {', '.join(names)} is installed; make setup-browser does it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The pages are ours and local; root, as which containers run, cannot have the sandbox.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
