"""Tests run on the CPU with eight fake devices, with shape annotations checked, the fast ones first."""

from __future__ import annotations

import os

import jaxtyping
import pytest

from tests import annotations

# Before anything imports JAX: the backend is fixed at its first use. (jaxtyping does not import it.)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Every annotated function of the library checks its shapes and types at each call. Must precede imports of subl_jax.
jaxtyping.install_import_hook("subl_jax", f"{annotations.__name__}.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, then slow, then soak; a broken basis shows within seconds. The order within stays."""

    def rank(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("soak") else 1 if item.get_closest_marker("slow") else 0

    items.sort(key=rank)
