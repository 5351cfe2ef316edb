"""A small made-up grid, analysed once, and the browser that the reports are looked at with."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subl_jax.report import grid, html, locate, sweep
from subl_jax.studies.sweep_analysis import analyse
from tests.grid.fake_cells import fake_document
from tests.report import fake_episodes, fake_located, fake_run
from tests.studies import fake_sweep

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


SWEEPS = {"along": fake_sweep.ALONG, "two axes": fake_sweep.TWO_AXES, "defences": fake_sweep.DEFENCES}


@pytest.fixture(scope="session")
def analysed_sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """`sweep.json` of a sweep along numbers (with a hole), of one over two axes, and of defences; two seeds."""
    found = {}
    for kind, plan in SWEEPS.items():
        directory, design = tmp_path_factory.mktemp("sweep"), fake_sweep.design_of(plan, (0, 1))
        hashes = fake_sweep.write(directory, design, holes=[(1, "control_student~temperature=4")])
        found[kind] = analyse(directory, design, hashes, {})
    return found


@pytest.fixture
def documents(analysed_sweeps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same; every test has its own copy."""
    return copy.deepcopy(analysed_sweeps)


@pytest.fixture(scope="session")
def reports(
    analysed: dict[str, Any], analysed_sweeps: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every kind of report as a file, with episodes of every model where it has any."""
    folder = tmp_path_factory.mktemp("reports")
    paths = {name: folder / f"{name}.html" for name in ("run", "grid", "locate")}
    examples = fake_episodes.tasks("api", tuple(fake_run.RATES))
    html.write_report(paths["run"], fake_run.summary(), fake_run.curves(), examples, None, {"seeds": [0, 1, 2]})
    for kind, document in analysed_sweeps.items():
        paths[kind] = folder / f"sweep-{kind}.html".replace(" ", "-")
        sweep.write_report(paths[kind], document, {"preset": "micro"})
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
