"""A sweep as a value: levels of some configuration fields, what each is called, and the configuration that each stands for.

A reference configuration and levels (a label, fields with their values) in; checked configurations of one arm each out. A
field or value that does not exist is refused with the nearest that does, before anything is run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from subl_jax import config as configuration
from subl_jax import sources
from subl_jax.config import STUDENT_OF, TEACHERS, ExperimentConfig, suffix_of

ARM, DEFENCE = "student.objectives", "student.defence"
# Fields that no level may have -> why, and what to do instead.
REFUSED = {
    "setting": "two settings share no task and no rate; run the sweep once for each, with --setting",
    "preset": "a preset is a set of values, and no stage depends on its name; vary the fields themselves",
    "cpu_devices": "a process has as many devices as it has started with; give --config.cpu_devices to sweeps of their own",
    "student.benign_objectives": "every arm of a sweep has its benign control; vary student.objectives",
}
_NAME = re.compile(r"[\w.-]+")


class SweepError(ValueError):
    """A sweep that cannot be run as asked; one line with the remedy."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One point of a sweep.

    Attributes:
      label: its name in tables; unique in the sweep.
      overrides: dotted field (without `config.`) -> value; none: the configuration as it is.
      at: its place on each axis, a number or a word; empty: its label.
      against: label of the level that it is compared with; empty: the sweep's reference.
    """

    label: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at: tuple[Any, ...] = ()
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Levels that are compared with one of them.

    Attributes:
      name: of its files.
      title: the question in words.
      axes: what varies, with its unit if it has one; two for a product.
      levels: at least two.
      reference: label of the level that the others are compared with.
      chart: `defences` adds the chart of transfer removed against utility lost.
    """

    name: str
    title: str
    axes: tuple[str, ...]
    levels: tuple[Level, ...]
    reference: str
    chart: Literal["", "defences"] = ""

    def __post_init__(self) -> None:
        """Refuses a sweep whose levels cannot be told apart or have no place on its axes."""
        labels = [level.label for level in self.levels]
        twice = [label for label in labels if labels.count(label) > 1]
        if not _NAME.fullmatch(self.name):
            raise SweepError(f"the sweep's name {self.name!r} is to be a file's: use letters, digits, '_', '.' and '-'")
        if len(labels) < 2:
            raise SweepError(f"the sweep {self.name} has {len(labels)} level; a comparison takes two values or more")
        if twice:
            raise SweepError(f"the sweep {self.name} has two levels {twice[0]!r}; give every value once")
        for label in (self.reference, *(level.against for level in self.levels if level.against)):
            if label not in labels:
                raise SweepError(
                    f"the reference {label!r} is no level; use one of {', '.join(labels)}{near(label, labels)}"
                )
        for level in self.levels:
            if len(self.places(level)) != len(self.axes):
                raise SweepError(f"level {level.label!r} has {len(self.places(level))} places on {len(self.axes)} axes")

    def level(self, label: str) -> Level:
        """The level of that label."""
        return next(level for level in self.levels if level.label == label)

    def places(self, level: Level) -> tuple[Any, ...]:
        """Where a level lies on each axis."""
        return level.at or (level.label,)

    def against(self, level: Level) -> str:
        """Label of the level that this one is compared with; of the reference its own."""
        return level.against or self.reference

    def numeric(self, axis: int = 0) -> bool:
        """Whether an axis is one of numbers; a last level may be a word (`all`) and stands behind the numbers."""
        found = [self.places(level)[axis] for level in self.levels]
        numbers = [isinstance(place, int | float) and not isinstance(place, bool) for place in found]
        return sum(numbers) >= 2 and all(numbers[:-1])


def near(name: str, known: typing.Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""


# --- Values of fields ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def kinds(config: ExperimentConfig) -> Mapping[str, Any]:
    """Dotted field (without `config.`) -> its type."""
    return MappingProxyType({name.removeprefix("config."): kind for name, _, kind in configuration.leaves(config)})


def value_of(config: ExperimentConfig, field: str) -> Any:
    """The value that a field has."""
    found: Any = config
    for part in field.split("."):
        found = getattr(found, part)
    return found


def field_of(name: str, config: ExperimentConfig) -> str:
    """The field that a name stands for: dotted, with or without `config.`; the values' check is `parse`.

    Raises:
      SweepError: no such field (the nearest is named), or one that cannot be varied.
    """
    field, known = name.removeprefix("config."), kinds(config)
    if field in REFUSED:
        raise SweepError(f"{field} cannot be varied: {REFUSED[field]}")
    if field not in known:
        ends = [each for each in known if each.endswith(f".{field}")]
        hint = f"; did you mean {' or '.join(ends[:3])}?" if ends else near(field, known)
        raise SweepError(f"unknown configuration field {field!r}{hint}")
    return field


def parse(field: str, value: Any, config: ExperimentConfig) -> Any:
    """A value of a field from text, or a checked one: both go the same way.

    Args:
      field: dotted.
      value: as the configuration has it, or as text; parts of a tuple are joined by `+`.
      config: whose field it is.

    Raises:
      SweepError: it is none of the field's values.
    """
    kind = kinds(config)[field]
    text = value if isinstance(value, str) else written(value)

    def refused(wanted: str, hint: str = "") -> SweepError:
        return SweepError(f"{field}={text}: {wanted}{hint}")

    if typing.get_origin(kind) is Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        if text not in choices:
            raise refused(f"use one of {', '.join(choices)}", near(text, choices))
        return typing.get_args(kind)[choices.index(text)]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise refused("use true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            raise refused("use a whole number" if kind is int else "use a number") from None
        if not math.isfinite(number):
            raise refused("use a finite number")
        return number
    if typing.get_origin(kind) is tuple:
        one = typing.get_args(kind)[0]
        try:
            return tuple(one(part) for part in text.split("+")) if text else ()
        except ValueError:
            raise refused("use whole numbers joined by +") from None
    return text


def written(value: Any) -> str:
    """A value as text that `parse` reads back."""
    if isinstance(value, tuple | list):
        return "+".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    # 2.0 and 2 are one value of a field, and have one name.
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value)) if whole else str(value)


# --- Sweeps from flags --------------------------------------------------------------------------------------------------


def from_flags(
    vary: Sequence[str],
    config: ExperimentConfig,
    name: str = "",
    reference: str = "",
    short: Callable[[str], str] = str,
) -> Sweep:
    """The product of what `--vary` names.

    Args:
      vary: "FIELD=VALUE,VALUE,…" each.
      config: the reference configuration.
      name: of the sweep; empty: the fields' short names.
      reference: a level's label; empty: the level that is the configuration itself, or the first; of defences "none".
      short: a field's short name.

    Raises:
      SweepError: an unknown field or value, a field that stands there twice, less than two levels.
    """
    values: dict[str, list[Any]] = {}
    for text in vary:
        named, found, listed = text.partition("=")
        if not found or not listed:
            raise SweepError(f"--vary={text}: say FIELD=VALUE,VALUE, e.g. --vary=student.temperature=1,2,4")
        field = field_of(named.strip(), config)
        if field in values:
            raise SweepError(f"--vary names {field} twice; give all its values at once")
        values[field] = [parse(field, part.strip(), config) for part in listed.split(",")]
    fields = list(values)
    flat = len(fields) > 2  # no page shows three axes: the levels stand in a list
    levels = []
    for chosen in itertools.product(*values.values()):
        parts = [value if len(fields) == 1 else f"{short(field)} {value}" for field, value in zip(
            fields, map(written, chosen), strict=True)]  # fmt: skip
        at = () if flat else tuple(map(_place, chosen))
        levels.append(Level(" / ".join(parts), dict(zip(fields, chosen, strict=True)), at))
    same = [level.label for level in levels if not changes(config, level.overrides)]
    # Defences are read against none at all, and on their chart.
    defended = fields == [DEFENCE]
    if defended:
        same = [level.label for level in levels if level.label == "none"] or same
    told = " and ".join(field.replace("_", " ").replace(".", " ") for field in fields)
    return Sweep(
        name or "_x_".join(map(short, fields)),
        f"How does transfer depend on {told}?",
        ("level",) if flat else tuple(fields),
        tuple(levels),
        reference or next(iter(same), levels[0].label),
        "defences" if defended else "",
    )


def _place(value: Any) -> Any:
    """A value on an axis: a number, or its text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else written(value)


# --- Configurations -----------------------------------------------------------------------------------------------------


def changes(config: ExperimentConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, checked, without those that say what the configuration says already."""
    found = {}
    for name, value in overrides.items():
        field = field_of(name, config)
        parsed = parse(field, value, config)
        own = (config.student.primary_arm,) if field == ARM else value_of(config, field)
        if parsed != own:
            found[field] = parsed
    return found


def applied(config: ExperimentConfig, overrides: Mapping[str, Any], *, positive: bool = False) -> ExperimentConfig:
    """The configuration of one level: one arm with both its controls, and the positive control if that is asked for.

    Raises:
      SweepError: a value that the configuration refuses, or more than one arm.
    """
    found = changes(config, overrides)
    arms = found.pop(ARM, (config.student.primary_arm,))
    if len(arms) != 1 or arms[0] == "positive":
        raise SweepError(
            f"{ARM}={'+'.join(arms)}: a level is one arm with its controls, e.g. full; the positive control is asked for by "
            "--positive_control"
        )
    # Together: some values are refused without another one.
    found |= {ARM: (*arms, *(("positive",) if positive else ())), "student.benign_objectives": arms}
    try:
        whole = configuration.override(config, {f"config.{field}": value for field, value in found.items()})
        return sources.resolve(whole)
    except ValueError as error:
        raise SweepError(str(error)) from error


def conditions_of_arm(config: ExperimentConfig) -> tuple[str, str, str]:
    """Student, control student and benign student of the configuration's arm."""
    ending = suffix_of(config.student.primary_arm)
    student, control, benign = (STUDENT_OF[teacher] + ending for teacher in TEACHERS)
    return student, control, benign
