"""How programs of a process that a test starts are compiled, where it must compute bit by bit what this one does."""

from __future__ import annotations

import os

_DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int = 0) -> str:
    """XLA_FLAGS of this process, with another number of CPU devices, or (0) as many as there are without the flag."""
    kept = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
    return " ".join(kept + ([f"{_DEVICES}={devices}"] if devices else []))
