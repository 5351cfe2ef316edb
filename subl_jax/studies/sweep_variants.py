"""What the outputs of a level are called: which families of stages its changes reach, and what their names end in.

The reference configuration and a level's overrides in; the `conditions.Variant` of the level out. Planned stages are compared,
with and without each change, so that a level that equals the reference has its very names and hashes, and two levels share
every stage that neither of them has changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from subl_jax import artifacts
from subl_jax.config import TEACHERS, ExperimentConfig
from subl_jax.grid.run import Member
from subl_jax.groundwork import groundwork
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.registry import get_setting
from subl_jax.stages import Stage, family_of
from subl_jax.studies import sweep
from subl_jax.studies.sweep import ARM, Sweep, SweepError

# A level's pair and arm name themselves: `student_hard@large_small`.
NAME_THEMSELVES = ("pair", ARM)
# A value longer than this, such as a path, is called by its beginning and a digest. File names hold 255 bytes.
_LONGEST_VALUE, _LONGEST_ENDING = 40, 160


def short_name(field: str, fields: Sequence[str]) -> str:
    """What a field is called in names of files: its last part, behind the stage that it belongs to unless that is `student`.

    The rule looks at no field of other stages, so that names stay when fields are added there. Where two fields would have
    one name, both have their full one.

    Args:
      field: dotted, without `config.`.
      fields: all fields of the configuration.
    """

    def shortened(each: str) -> str:
        first, *rest = each.split(".")
        if not rest:
            return each
        last = rest[-2] if rest[-1] == "name" and len(rest) > 1 else rest[-1]  # the optimizer's, not "name"
        return last if first == "student" else f"{first}.{last}"

    own = shortened(field)
    return own if sum(shortened(each) == own for each in fields) == 1 else field


def namer(config: ExperimentConfig) -> functools.partial[str]:
    """Field -> its short name in that configuration."""
    return functools.partial(short_name, fields=list(sweep.kinds(config)))


def value_name(value: Any) -> str:
    """A value in the characters that names of stages and files may have; different values have different names."""
    text = quote(sweep.written(value), safe="+-._").replace("~", "%7E") or "%empty"
    if len(text) > _LONGEST_VALUE:
        text = f"{text[:20]}-{artifacts.digest(sweep.written(value))[:8]}"
    return text


def family(stage: str) -> str:
    """The family of `conditions.Variant` that a stage belongs to; evaluations are told apart by what is evaluated."""
    found = family_of(stage)
    if found != "eval":
        return found
    model = stage.rpartition("/")[2].partition("~")[0].partition("@")[0]
    return "eval/base" if model == "base" else "eval/teachers" if model in TEACHERS else "eval/students"


def _stages(config: ExperimentConfig) -> list[Stage]:
    """The stages of a configuration in a work directory that is never looked at; the seed does not matter."""
    setting, nowhere = get_setting(config.setting), Path("/nonexistent")
    return [*groundwork(config, setting, nowhere, (0,)), *SeedPipeline(config, setting, nowhere, 0).stages()]


@functools.lru_cache(maxsize=512)
def _keys(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """Family -> stage -> what it depends on by itself: its key and the names of its inputs."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for stage in _stages(config):
        found[family(stage.name)][stage.name] = [artifacts.plain(stage.key), list(stage.inputs)]
    return found


def _reached(first: ExperimentConfig, second: ExperimentConfig) -> set[str]:
    """The families whose own keys differ between two configurations."""
    ours, theirs = _keys(first), _keys(second)
    return {name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)}


def _downstream(config: ExperimentConfig, families: set[str]) -> set[str]:
    """These families and all that read what they make."""
    found, before = set(families), set()
    while found != before:
        before = set(found)
        for name, stages in _keys(config).items():
            read = {family(each) for _, inputs in stages.values() for each in inputs}
            found |= {name} if read & found else set()
    return found


def variant_of(config: ExperimentConfig, overrides: Mapping[str, Any], *, positive: bool = False) -> dict[str, str]:
    """Family of stages -> what the names of its outputs end in; nothing for the families that no change reaches.

    A change reaches a family if its stages differ with it and without it, either alone or among the level's other changes
    (a rank does nothing without adapters), or if they read what such a family makes. `~temperature=4,trajectories=100`.

    Args:
      config: the reference configuration.
      overrides: of the level.
      positive: whether the positive control is run.

    Raises:
      SweepError: an unknown field or value; a change that no stage depends on.
    """
    found = sweep.changes(config, overrides)
    named = {name: found.pop(name) for name in NAME_THEMSELVES if name in found}

    def with_only(changed: Mapping[str, Any]) -> ExperimentConfig:
        return sweep.applied(config, named | dict(changed), positive=positive)

    whole = with_only(found)
    reached: dict[str, set[str]] = {field: set() for field in found}
    for field, value in found.items():
        others = {name: other for name, other in found.items() if name != field}
        for before, after in (({}, {field: value}), (others, found)):
            # A value may need another one's, or another one's need it: then the other comparison tells.
            with contextlib.suppress(ValueError):
                reached[field] |= _reached(with_only(before), with_only(after))
    together = _reached(with_only({}), whole).difference(*reached.values())
    for field, families in reached.items():
        families |= together  # what only all of them change is called by all of them
        if not families:
            raise SweepError(
                f"{field}={sweep.written(found[field])} changes nothing here: no stage of this configuration depends on it "
                f"({_why(field, whole)})"
            )
    short = namer(config)
    endings: dict[str, list[str]] = defaultdict(list)
    for field in sorted(found, key=short):
        for name in _downstream(whole, reached[field]):
            endings[name].append(f"{short(field)}={value_name(found[field])}")
    joined = {name: "~" + ",".join(parts) for name, parts in endings.items()}
    return {name: _fitting(ending) for name, ending in joined.items()}


def _fitting(ending: str) -> str:
    return ending if len(ending) <= _LONGEST_ENDING else f"{ending[:60]}-{artifacts.digest(ending)[:12]}"


def _why(field: str, config: ExperimentConfig) -> str:
    stage = field.partition(".")[0]
    if ".adapter" in field and not getattr(getattr(config, stage), "lora", True):
        return f"adapters are not trained; add --config.{stage}.lora=true"
    if field.endswith(("_every", "_minutes", ".keep", ".prefetch", ".spike")):
        return "it says when things are saved, logged or fetched"
    return f"the pair is {config.pair}"


def members(plan: Sweep, config: ExperimentConfig, *, positive: bool = False) -> list[Member]:
    """The configuration of every level, and what its outputs are called.

    Raises:
      SweepError: a level that cannot be, or two that are one and the same run.
    """
    found, seen = [], {}
    for level in plan.levels:
        try:
            applied = sweep.applied(config, level.overrides, positive=positive)
            variant = variant_of(config, level.overrides, positive=positive)
            found.append(Member(level.label, applied, variant))
            run = artifacts.canonical_json([artifacts.plain(applied), variant])
        except ValueError as error:
            raise SweepError(f"level {level.label!r} of {plan.name}: {error}") from error
        if run in seen:
            raise SweepError(
                f"levels {seen[run]!r} and {level.label!r} of {plan.name} are one and the same run; leave one out"
            )
        seen[run] = level.label
    return found
