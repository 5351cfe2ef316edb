"""A TPU of the Cloud TPU API: what it is called, how it is asked for, and what state it is in."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from subl_jax.launching.command import LaunchError
from subl_jax.launching.programs import ProgramFailed, Programs

_LITE = (1, 4, 8, 16, 32, 64, 128, 256)
_POWERS = (8, 16, 32, 64)
# Sizes by family: chips for v5e and v6e, TensorCores (two a chip) for v4 and v5p. cloud.google.com/tpu/docs/v5p and so on;
# software versions: cloud.google.com/tpu/docs/runtimes.
SIZES: dict[str, tuple[int, ...]] = {
    "v4": _POWERS + tuple(range(128, 8193, 128)),
    "v5litepod": _LITE,
    "v5p": _POWERS + tuple(range(128, 12289, 128)),
    "v6e": _LITE,
}
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
ALIASES = {"v5e": "v5litepod"}

WAITING = (
    "ACCEPTED",
    "WAITING_FOR_RESOURCES",
    "CREATING",
    "PROVISIONING",
    "STARTING",
    "REPAIRING",
    "RESTARTING",
    "DELETING",
)
ACTIVE = ("ACTIVE", "READY")
# The machines are gone, or will be; only another request brings some.
LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "ABSENT")


def checked_accelerator(name: str) -> str:
    """The accelerator's name as the API spells it.

    Raises:
      LaunchError: there is no such family or size; the nearest sizes are named.
    """
    family, _, size = name.partition("-")
    family = ALIASES.get(family, family)
    if family not in SIZES or not size.isdigit():
        raise LaunchError(
            f"--accelerator={name} is none; it reads FAMILY-SIZE, FAMILY one of {', '.join(sorted(SIZES))}, as v5p-128"
        )
    sizes = SIZES[family]
    if int(size) not in sizes:
        near = sorted(sorted(sizes, key=lambda other: abs(other - int(size)))[:2])
        unit = "TensorCores, two a chip" if family in ("v4", "v5p") else "chips"
        raise LaunchError(
            f"--accelerator={name} does not exist; nearest: {', '.join(f'{family}-{n}' for n in near)} ({unit})"
        )
    return f"{family}-{size}"


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU by name. `existing`: somebody else made it, so it is neither created nor deleted here."""

    name: str
    zone: str
    project: str = ""
    accelerator: str = ""
    runtime_version: str = ""
    spot: bool = False
    slices: int = 1
    existing: bool = False
    internal_ip: bool = False
    create_flags: tuple[str, ...] = ()

    def __post_init__(self):
        """Refuses what the API would refuse minutes later."""
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", self.name):
            raise LaunchError(
                f"--name={self.name} is no name of a TPU; lower-case letters, digits and dashes, at most 62"
            )
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise LaunchError(f"--zone={self.zone} is no zone; one reads REGION-LETTER, as us-east5-a")
        if self.slices < 1:
            raise LaunchError(f"--slices={self.slices}; at least 1")

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the slices; a queued resource numbers several of them itself."""
        return (self.name,) if self.slices == 1 else tuple(f"{self.name}-{number}" for number in range(self.slices))

    def _where(self) -> list[str]:
        return [f"--zone={self.zone}"] + ([f"--project={self.project}"] if self.project else [])

    def queued(self, verb: str, *flags: str) -> list[str]:
        """A command on the queued resource."""
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.name, *self._where(), *flags]

    def create(self) -> list[str]:
        """The request for machines."""
        node = (
            [f"--node-id={self.name}"]
            if self.slices == 1
            else [f"--node-count={self.slices}", f"--node-prefix={self.name}"]
        )
        runtime = self.runtime_version or RUNTIMES[self.accelerator.partition("-")[0]]
        spot = ["--spot"] if self.spot else []
        return self.queued(
            "create",
            *node,
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={runtime}",
            *spot,
            *self.create_flags,
            "--quiet",
        )

    def delete(self) -> list[str]:
        """The end of the request and of its machines; `--force` takes machines that still run along."""
        return self.queued("delete", "--force", "--quiet")

    def node(self, name: str) -> list[str]:
        """Asks for a slice: its state and its workers' addresses."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "describe", name, *self._where(), "--format=json"]

    def _reach(self, worker: str) -> list[str]:
        return [*self._where(), f"--worker={worker}", *(["--internal-ip"] if self.internal_ip else []), "--quiet"]

    def ssh(self, node: str, command: str, worker: str = "all") -> list[str]:
        """A shell command on workers of a slice, all of them at once unless one is named."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._reach(worker), f"--command={command}"]

    def scp(self, node: str, source: str, target: str) -> list[str]:
        """A file to every worker of a slice."""
        return ["gcloud", "compute", "tpus", "tpu-vm", "scp", source, f"{node}:{target}", *self._reach("all")]


def _described(programs: Programs, argv: Sequence[str]) -> dict[str, Any]:
    """The JSON that a describe prints; empty if there is no such thing."""
    result = programs.run(argv, check=False)
    if result.code and re.search(r"NOT_FOUND|was not found|HttpError.*404", result.err):
        # A project or zone that is not found is no lost TPU.
        if not re.search(r"[Ll]ocation \S+ (is not found|not found)|[Pp]roject.*not found", result.err):
            return {}
    if result.code:
        raise ProgramFailed(argv, result)
    try:
        return json.loads(result.out or "{}")
    except json.JSONDecodeError:
        raise LaunchError(f"no JSON came from: {' '.join(argv)}; it printed {result.out[:200]!r}") from None


def nodes(programs: Programs, tpu: Tpu) -> list[dict[str, Any]]:
    """What the API says of each slice; an empty one is not there."""
    return [_described(programs, tpu.node(name)) for name in tpu.nodes]


def addresses(described: Sequence[dict[str, Any]]) -> list[str]:
    """Inner addresses of all workers, in the order of slices and of workers within each."""
    return [str(point.get("ipAddress", "")) for node in described for point in node.get("networkEndpoints", [])]


def state(programs: Programs, tpu: Tpu) -> tuple[str, str]:
    """State of the whole and the API's reason, if it gave one: a queued resource's, unless a slice of it is already gone."""
    if not tpu.existing:
        request = _described(programs, tpu.queued("describe", "--format=json"))
        told = request.get("state", {"state": "ACTIVE"} if programs.dry_run else {})
        name = str(told.get("state", "ABSENT"))
        if name not in ACTIVE:
            data = next((value for key, value in told.items() if key.endswith("Data") and value), {})
            return name, str(data.get("error", {}).get("message", "")) if isinstance(data, dict) else ""
    names = [str(node.get("state", "ACTIVE" if programs.dry_run else "ABSENT")) for node in nodes(programs, tpu)]
    gone = next((name for name in names if name not in ACTIVE), None)
    return (gone, "") if gone else ("ACTIVE", "")
