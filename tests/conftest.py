"""Tests run on the CPU with eight fake devices, with shape annotations checked, the fast ones first."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest

from tests import annotations

# Before anything imports JAX: the backend is fixed at its first use. (jaxtyping does not import it.)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_XLA_FLAGS = {"--xla_force_host_platform_device_count": 8}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the suite's time is compiling programs that run once: LLVM's optimizations cost more than they bring. Commands
    # that tests start as a user would, without these flags, are compiled as a user's are.
    _XLA_FLAGS["--xla_backend_optimization_level"] = 0
for _flag, _value in _XLA_FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# Programs are shared between the workers of a session (they inherit this) and the commands that its tests start. Not between
# sessions, nor with the user's own: JAX does not write its entries atomically, and a test that kills a process may leave half.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="subl_jax_tests_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Every annotated function of the library checks its shapes and types at each call. Must precede imports of subl_jax.
annotations.install()


# Every compiled program takes a few memory mappings, and a process may have about 65,530 (vm.max_map_count): the whole
# suite in one process reaches that, and XLA then dies of a segmentation fault.
_MAPPINGS_HELD = 25_000


def _mappings() -> int:
    """How many memory mappings this process has; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
    """Between two test files, programs are dropped if they have become many."""
    yield
    if nextitem is not None and nextitem.path != item.path and _mappings() > _MAPPINGS_HELD:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then slow, then soak; a broken basis shows within seconds. The order within stays."""

    def rank(item: pytest.Item) -> int:
        if item.get_closest_marker("soak"):
            # Ten minutes in one process: begun last, the others would wait for it.
            return 2 if item.path.name == "test_commands_fuzz.py" else 3
        return 1 if item.get_closest_marker("slow") else 0

    items.sort(key=rank)
