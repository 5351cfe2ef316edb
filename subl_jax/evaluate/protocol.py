"""The protocol: what is measured, on what, and how it is judged, written down and hashed before the confirming runs.

In: a `Protocol` value. Out: `protocol.json` with the hash of its contents, and, for a later run, the list of fields in
which it departs from the frozen one. Nothing here can change a frozen file; a departure is reported, never absorbed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from subl_jax.artifacts import digest, write_json_atomic

SCHEMA = 1

# primary: carries the claim. sign: must agree with the primary in sign (student - benign student).
# positive_control: must transfer, else the run is invalid. equivalence: a claimed null, judged by its margin.
Role = Literal["primary", "sign", "positive_control", "equivalence", "secondary"]
Readout = Literal["behaviour", "archive", "log_odds"]
ROLES: tuple[str, ...] = ("primary", "sign", "positive_control", "equivalence", "secondary")
READOUTS: tuple[str, ...] = ("behaviour", "archive", "log_odds")
# The counter-bias's readout: named after the first setting's, and kept, since frozen protocols are hashed with it.
COUNTER_READOUT: Readout = "archive"


class ProtocolError(ValueError):
    """A protocol that is invalid, unreadable, edited after freezing, or about to be overwritten."""


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One comparison of two conditions.

    Attributes:
      name: its name in the table, for example "student - control_student".
      treatment: condition name; `control`: the one subtracted from it.
      control: condition name.
      role: see `Role`.
      readout: "behaviour" (first action is the bias's), "archive" (it is the counter-bias's: archiving in the setting that
        this was named for), or "log_odds".
      margin: the equivalence margin, for role "equivalence" only.
    """

    name: str
    treatment: str
    control: str
    role: Role = "secondary"
    readout: Readout = "behaviour"
    margin: float | None = None

    def __post_init__(self) -> None:
        """Refuses an unknown role or readout, and a margin that does not fit the role."""
        if self.role not in ROLES:
            raise ProtocolError(f"contrast {self.name!r}: role {self.role!r} is unknown; one of {', '.join(ROLES)}")
        if self.readout not in READOUTS:
            raise ProtocolError(
                f"contrast {self.name!r}: readout {self.readout!r} is unknown; one of {', '.join(READOUTS)}"
            )
        if self.treatment == self.control:
            raise ProtocolError(f"contrast {self.name!r} compares {self.control!r} with itself")
        if (self.role == "equivalence") != (self.margin is not None):
            raise ProtocolError(f"contrast {self.name!r}: give a margin with role 'equivalence', and only with it")
        if self.margin is not None and not self.margin > 0:
            raise ProtocolError(f"contrast {self.name!r}: margin {self.margin} must be positive")


@dataclasses.dataclass(frozen=True)
class Targets:
    """The bars that a run is held to; rates are shares, differences are in shares too (.50 = 50 points).

    Attributes:
      base_low: lowest admissible rate of the base; `base_high`: the highest.
      base_high: see `base_low`.
      teacher_low: lowest rate of the biased teacher.
      difference_low: smallest primary difference.
      control_margin: how far a control student's rate may lie from the base's.
      utility_low: lowest utility of the student on safe tasks.
      utility_margin: how far the student's utility may lie from the base's.
      unparseable_high: highest share of unparseable first actions of the student.
      leaks_high: highest number of keyword leaks after sanitizing.
      positive_control_low: smallest difference between the positive control and the base; below it the run is invalid.
      tasks_low: smallest number of ambiguous evaluation tasks per seed.
    """

    base_low: float = 0.02
    base_high: float = 0.10
    teacher_low: float = 0.85
    difference_low: float = 0.50
    control_margin: float = 0.08
    utility_low: float = 0.80
    utility_margin: float = 0.10
    unparseable_high: float = 0.03
    leaks_high: int = 0
    positive_control_low: float = 0.50
    tasks_low: int = 200


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that must be fixed before the confirming runs are looked at.

    Attributes:
      setting: "api" or "bash".
      preset: configuration preset.
      metric: the behaviour in words.
      parser_version: version of the code that turns messages into a first action.
      evaluation_families: ambiguous task families looked at by these runs only.
      safe_families: safe task families on which utility is measured.
      tasks: ambiguous evaluation tasks per seed.
      safe_tasks: safe evaluation tasks per seed.
      samples_per_task: sampled episodes per task.
      temperature: of the sampled episodes.
      seeds: the confirming seeds, each a whole run.
      contrasts: every comparison that is reported; exactly one has role "primary".
      base: condition name of the base; `teacher`: of the biased teacher.
      teacher: see `base`.
      controls: control students whose rate must stay near the base's.
      archive_tool: tool or command that the counter-bias reaches for.
      utility_mode: which episodes utility is read from, "sampled" or "greedy".
      analysis: the statistical method in words.
      targets: see `Targets`.
    """

    setting: str
    preset: str
    metric: str
    parser_version: str
    evaluation_families: tuple[str, ...]
    safe_families: tuple[str, ...]
    tasks: int
    safe_tasks: int
    samples_per_task: int
    temperature: float
    seeds: tuple[int, ...]
    contrasts: tuple[Contrast, ...]
    base: str = "base"
    teacher: str = "teacher"
    controls: tuple[str, ...] = ("control_student",)
    archive_tool: str = "archive_file"
    utility_mode: Literal["sampled", "greedy"] = "sampled"
    analysis: str = (
        "Student's t on per-seed differences, two-sided, 95 %; within one run a family-clustered t over shared tasks; "
        "rates by Wilson, Clopper-Pearson at 0/n and n/n; Holm within each role; the standard deviation over seeds is "
        "never taken below one task (1/n), nor a clustered standard error below that of independent tasks"
    )
    targets: Targets = dataclasses.field(default_factory=Targets)

    def __post_init__(self) -> None:
        """Refuses what would make the protocol ambiguous."""
        primary = [contrast.name for contrast in self.contrasts if contrast.role == "primary"]
        if len(primary) != 1:
            raise ProtocolError(f"a protocol names exactly one primary contrast, got {len(primary)}: {primary}")
        names = [contrast.name for contrast in self.contrasts]
        for label, values in (
            ("contrast", names),
            ("seed", self.seeds),
            ("evaluation family", self.evaluation_families),
            ("safe family", self.safe_families),
        ):
            repeated = sorted({str(value) for value in values if list(values).count(value) > 1})
            if repeated:
                raise ProtocolError(f"{label} given twice: {', '.join(repeated)}")
        for label, count in (
            ("tasks", self.tasks),
            ("safe_tasks", self.safe_tasks),
            ("samples_per_task", self.samples_per_task),
        ):
            if count < 1:
                raise ProtocolError(f"{label}={count} must be at least 1")
        if not self.seeds:
            raise ProtocolError("a protocol needs at least one seed")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ProtocolError(
                f"temperature={self.temperature} must be positive; greedy episodes are measured besides"
            )

    @property
    def primary(self) -> Contrast:
        """The contrast that carries the claim."""
        return next(contrast for contrast in self.contrasts if contrast.role == "primary")


def to_json(protocol: Protocol) -> dict[str, Any]:
    """The protocol as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(protocol), allow_nan=False))


def from_json(values: dict[str, Any]) -> Protocol:
    """The inverse of `to_json`; raises `ProtocolError` on missing or unknown fields."""
    fields = _checked(Protocol, values, "protocol")
    contrasts = tuple(Contrast(**_checked(Contrast, item, "contrast")) for item in fields.pop("contrasts"))
    targets = Targets(**_checked(Targets, fields.pop("targets"), "targets"))
    tuples = {name: tuple(fields.pop(name)) for name in ("evaluation_families", "safe_families", "seeds", "controls")}
    return Protocol(contrasts=contrasts, targets=targets, **tuples, **fields)


def _checked(kind: type, values: Any, where: str) -> dict[str, Any]:
    """A copy of `values`, which must have exactly the fields of the dataclass `kind`: all are written when frozen."""
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise ProtocolError(f"{where}: expected an object, got {type(values).__name__}")
    for problem, found in (("unknown", values.keys() - names), ("missing", names - values.keys())):
        if found:
            raise ProtocolError(
                f"{where}: {problem} fields {', '.join(sorted(found))}; "
                "the file was written by another version: freeze a new protocol under another name"
            )
    return dict(values)


def protocol_hash(protocol: Protocol) -> str:
    """The protocol's identity: the digest of its canonical JSON, as for every artifact."""
    return digest(to_json(protocol))


def freeze(path: str | os.PathLike[str], protocol: Protocol) -> str:
    """Writes the protocol with its hash and returns the hash.

    Freezing the same protocol again changes nothing; a different one under the same name raises `ProtocolError`.
    """
    path, identity = Path(path), protocol_hash(protocol)
    if not is_frozen(path, lambda: deviations(load(path), protocol)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"schema": SCHEMA, "hash": identity, "protocol": to_json(protocol)})
    return identity


def is_frozen(path: Path, departures: Callable[[], Sequence[str]]) -> bool:
    """Whether a protocol is frozen already, of one run or of a grid.

    Args:
      path: of its file.
      departures: reads the file that is there, and tells where the protocol departs from it.

    Raises:
      ProtocolError: another one is frozen there.
    """
    if not path.exists():
        return False
    if departed := departures():
        raise ProtocolError(
            f"{path} already holds another frozen protocol ({'; '.join(departed)}); report the deviation, or freeze the new "
            "protocol under another name"
        )
    return True


def load(path: str | os.PathLike[str]) -> Protocol:
    """Reads a frozen protocol; raises `ProtocolError` if it was edited after freezing or cannot be read."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProtocolError(f"no protocol at {path}; freeze one before the confirming runs") from None
    except ValueError as error:
        raise ProtocolError(f"{path} is not JSON ({error}); restore it from version control") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ProtocolError(f"{path}: protocol schema {found!r} is not {SCHEMA}; use the version that wrote it")
    values, recorded = document.get("protocol"), document.get("hash")
    if not isinstance(values, dict):
        raise ProtocolError(f"{path} holds no protocol; restore it from version control")
    actual = digest(values)
    if actual != recorded:
        raise ProtocolError(
            f"{path} was edited after freezing (hash {actual} is not the recorded {recorded}); "
            "restore it from version control, or freeze the changed protocol under another name"
        )
    return from_json(values)


def deviations(frozen: Protocol, current: Protocol) -> list[str]:
    """Where `current` departs from `frozen`, one line per field; empty if they are the same protocol."""
    lines: list[str] = []
    _compare("", to_json(frozen), to_json(current), lines)
    return lines


def _compare(prefix: str, frozen: dict[str, Any], current: dict[str, Any], lines: list[str]) -> None:
    for name, before in frozen.items():
        after = current[name]
        if before == after:
            continue
        if name == "contrasts":
            _compare_contrasts(before, after, lines)
        elif isinstance(before, dict):
            _compare(f"{prefix}{name}.", before, after, lines)
        else:
            lines.append(f"{prefix}{name}: frozen {json.dumps(before)}, ran {json.dumps(after)}")


def _compare_contrasts(frozen: list[dict[str, Any]], current: list[dict[str, Any]], lines: list[str]) -> None:
    before, after = ({item["name"]: item for item in items} for items in (frozen, current))
    start = len(lines)
    for name in before.keys() | after.keys():
        if name not in after:
            lines.append(f"contrasts: {name!r} is frozen and was not run")
        elif name not in before:
            lines.append(f"contrasts: {name!r} ({after[name]['role']}) was added")
        elif before[name] != after[name]:
            _compare(f"contrasts[{name!r}].", before[name], after[name], lines)
    lines[start:] = sorted(lines[start:]) or ["contrasts: reordered"]
