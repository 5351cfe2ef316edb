"""The sandbox the tests of this setting run in, or the reason why it cannot be had here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from subl_jax.settings.bash.sandbox import Sandbox, SandboxPool, SandboxUnavailable, preflight


@pytest.fixture(scope="session")
def sandbox_ready() -> None:
    """A machine without a sandbox skips these tests and says what it misses; continuous integration fails."""
    try:
        preflight()
    except SandboxUnavailable as missing:
        # A skip nobody reads must not stand for a pass where every test is meant to run.
        leave = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        leave(f"the Bash sandbox cannot run here: {missing}")


@pytest.fixture
def pool(sandbox_ready: None) -> Iterator[SandboxPool]:
    """Sandboxes of the usual limits, all gone when the test is over."""
    pool = SandboxPool()
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def patient(sandbox_ready: None, request: pytest.FixtureRequest) -> Iterator[SandboxPool]:
    """Sandboxes with the limits that the module names PATIENT: a busy machine must not look like an attack."""
    pool = SandboxPool(request.module.PATIENT, size=1)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def sandbox(patient: SandboxPool) -> Iterator[Sandbox]:
    """One of them; a module with other wishes has a fixture of its own of this name."""
    sandbox = patient.take()
    try:
        yield sandbox
    finally:
        sandbox.close()
