"""A real Bash in a real sandbox: `SandboxPool.take()` gives an episode's world, `preflight()` proves that it works here."""

from __future__ import annotations

from subl_jax.settings.bash.sandbox.episode import Sandbox
from subl_jax.settings.bash.sandbox.host import Host, SandboxUnavailable
from subl_jax.settings.bash.sandbox.limits import Limits
from subl_jax.settings.bash.sandbox.people import Entry
from subl_jax.settings.bash.sandbox.pool import SandboxPool, default_pool
from subl_jax.settings.bash.sandbox.preflight import Report, preflight
from subl_jax.settings.bash.sandbox.shell import Result
from subl_jax.settings.bash.sandbox.stand_ins import Attempt

__all__ = [
    "Attempt",
    "Entry",
    "Host",
    "Limits",
    "Report",
    "Result",
    "Sandbox",
    "SandboxPool",
    "SandboxUnavailable",
    "default_pool",
    "preflight",
]
