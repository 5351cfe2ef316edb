"""The protocol of a grid: every pair's protocol, the claim between pairs, and how p-values are adjusted; hashed, frozen.

Configurations (one per setting), seeds and pairs in; a `GridProtocol`, its file, and a later run's departures from it out.
Every (setting, pair, arm) has an `evaluate.protocol.Protocol` of its own, so that an arm's figures are those of a single run
and its verdicts are about that arm.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subl_jax import artifacts
from subl_jax.config import ExperimentConfig, suffix_of
from subl_jax.evaluate import protocol as protocols
from subl_jax.evaluate.protocol import Contrast, Protocol, ProtocolError
from subl_jax.experiment import make_protocol
from subl_jax.grid.cells import Wanted, write_lines
from subl_jax.grid.pairs import PAIRS, STUDENTS, PairSpec
from subl_jax.settings.interface import Setting
from subl_jax.settings.registry import get_setting

SCHEMA = 1
# What the protocols of a setting's pairs differ in.
_OWN = ("contrasts", "controls")

Place = tuple[str, str, str]  # setting, pair, arm


@dataclasses.dataclass(frozen=True)
class GridProtocol:
    """Everything about a grid that must be fixed before its confirming seeds are looked at.

    Attributes:
      preset: of all its runs.
      seeds: the confirming seeds; every pair of every setting has all of them.
      protocols: (setting, pair, arm) -> what that arm of that pair is measured by; the arms of a pair in their order.
      strongest: the pair that is claimed to transfer more than each other pair.
      analysis: the statistics beyond a single pair's, in words.
    """

    preset: str
    seeds: tuple[int, ...]
    protocols: Mapping[Place, Protocol]
    strongest: str = "large_small"
    analysis: str = (
        "A seed counts for a pair only where every condition of the pair is there. p-values of one comparison (one arm, one "
        "readout) are adjusted by Holm across the pairs of a setting, in place of the adjustment within one pair's run. "
        "Between pairs: Student's t on per-seed differences of differences over the seeds that both have; that the strongest "
        "pair exceeds each other one is tested one-sided, and that it exceeds all of them by intersection-union (the largest "
        "of these p-values), each arm by itself. A null is claimed where the 95 % interval lies inside the margin. Sign-flip, "
        "McNemar and bootstrap (seeds, then task families, then tasks) are secondary. A transfer ratio is (student - "
        "control student) / (teacher - control teacher), over means of seeds, and is left undefined "
        "where the teachers differ by less than 10 points."
    )

    def __post_init__(self) -> None:
        """Refuses protocols of one setting that differ in more than their contrasts, and unknown pairs."""
        if not self.protocols:
            raise ProtocolError("a grid needs at least one setting and one pair")
        for (setting, pair, arm), protocol in self.protocols.items():
            if pair not in PAIRS:
                raise ProtocolError(f"unknown pair {pair!r}; one of {', '.join(PAIRS)}")
            if protocol.seeds != self.seeds or protocol.setting != setting or protocol.preset != self.preset:
                raise ProtocolError(f"{setting} {pair} {arm}: its setting, preset or seeds are not the grid's")
        for setting in self.settings:
            shared = {
                json.dumps(_shared(protocol)) for place, protocol in self.protocols.items() if place[0] == setting
            }
            if len(shared) > 1:
                raise ProtocolError(f"{setting}: its pairs are measured differently; one evaluation serves them all")

    @property
    def settings(self) -> list[str]:
        """The settings, in order."""
        return list(dict.fromkeys(setting for setting, _, _ in self.protocols))

    def pairs(self, setting: str) -> list[PairSpec]:
        """The pairs of a setting, with the arms that they have here."""
        arms: dict[str, list[str]] = defaultdict(list)
        positive = set()
        for (place, pair, arm), protocol in self.protocols.items():
            if place == setting:
                arms[pair].append(arm)
                positive |= {pair for contrast in protocol.contrasts if contrast.role == "positive_control"}
        return [
            dataclasses.replace(PAIRS[pair], arms=tuple(found), positive=pair in positive)
            for pair, found in arms.items()
        ]

    def of(self, setting: str) -> Protocol:
        """Any one protocol of a setting: what its pairs share can be read there."""
        return next(protocol for place, protocol in self.protocols.items() if place[0] == setting)


def make_grid_protocol(
    configs: Mapping[str, ExperimentConfig], pairs: Mapping[str, Sequence[PairSpec]], seeds: Sequence[int]
) -> GridProtocol:
    """The protocol of a grid.

    Args:
      configs: setting -> configuration; what of it depends on the pair is no part of a protocol but its contrasts.
      pairs: setting -> its pairs, with their arms.
      seeds: the confirming seeds.
    """
    found: dict[Place, Protocol] = {}
    for name, config in configs.items():
        setting = get_setting(name)
        shared = make_protocol(config, setting, seeds)
        for spec in pairs[name]:
            for arm in spec.arms:
                found[name, spec.name, arm] = dataclasses.replace(
                    shared,
                    contrasts=contrasts(spec, arm, setting, shared.targets.control_margin),
                    controls=("control_student" + suffix_of(arm), "benign_student" + suffix_of(arm)),
                )
    presets = {config.preset for config in configs.values()}
    if len(presets) > 1:
        raise ProtocolError(f"a grid is of one preset, got {', '.join(sorted(presets))}")
    return GridProtocol(presets.pop(), tuple(seeds), found)


def contrasts(spec: PairSpec, arm: str, setting: Setting, margin: float) -> tuple[Contrast, ...]:
    """The comparisons of one arm of a pair; those that do not depend on the arm stand with the pair's first.

    Args:
      spec, arm: which.
      setting: names the counter-bias.
      margin: equivalence margin between a control student and the base, a share.
    """
    student, control, benign = (name + suffix_of(arm) for name in STUDENTS)
    found = [
        Contrast(f"{student} - {control}", student, control, "primary"),
        Contrast(f"{student} - {benign}", student, benign, "sign"),
    ]
    if arm == spec.primary_arm:
        if spec.positive:
            found.append(Contrast("positive_student - base", "positive_student", "base", "positive_control"))
        found.append(Contrast("teacher - control_teacher", "teacher", "control_teacher"))
    mirror = f"{setting.wording.counter}: {control} - {student}"
    found.append(Contrast(mirror, control, student, "secondary", protocols.COUNTER_READOUT))
    for other in (control, benign):
        found.append(Contrast(f"log-odds: {student} - {other}", student, other, "secondary", "log_odds"))
    found += [Contrast(f"{name} = base", name, "base", "equivalence", margin=margin) for name in (control, benign)]
    return tuple(found)


def wanted_cells(protocol: GridProtocol, hashes: Mapping[tuple[str, int, str], str] | None = None) -> list[Wanted]:
    """Every cell that the grid needs, by pair; `hashes`: (setting, seed, model) -> output hash of its evaluation."""
    return [
        _wanted(protocol, setting, spec.name, seed, condition, spec.model(condition), hashes)
        for setting in protocol.settings
        for spec in protocol.pairs(setting)
        for seed in protocol.seeds
        for condition in spec.conditions()
    ]


def wanted_sanitizers(protocol: GridProtocol, hashes: Mapping[tuple[str, int, str], str] | None = None) -> list[Wanted]:
    """The sanitizers' counts that the grid needs, by pair; in `hashes` a sanitizer is named as its file is."""
    return [
        _wanted(protocol, setting, spec.name, seed, "sanitize", spec.sanitizer, hashes)
        for setting in protocol.settings
        for spec in protocol.pairs(setting)
        for seed in protocol.seeds
    ]


def _wanted(
    protocol: GridProtocol, setting: str, pair: str, seed: int, condition: str, model: str,
    hashes: Mapping[tuple[str, int, str], str] | None,
) -> Wanted:  # fmt: skip
    expected = None if hashes is None else hashes.get((setting, seed, model))
    parser = protocol.of(setting).parser_version
    return Wanted(setting, pair, seed, condition, model, expected, parser, protocol.preset)


# The file


def _shared(protocol: Protocol) -> dict[str, Any]:
    """What the pairs of a setting have in common."""
    return {name: value for name, value in protocols.to_json(protocol).items() if name not in _OWN}


def to_json(protocol: GridProtocol) -> dict[str, Any]:
    """The protocol as plain JSON values; what the pairs of a setting share stands there once."""
    settings = {}
    for setting in protocol.settings:
        pairs: dict[str, dict[str, Any]] = defaultdict(dict)
        for (place, pair, arm), own in protocol.protocols.items():
            if place == setting:
                pairs[pair][arm] = {name: protocols.to_json(own)[name] for name in _OWN}
        settings[setting] = {"shared": _shared(protocol.of(setting)), "pairs": dict(pairs)}
    return {
        "preset": protocol.preset, "seeds": list(protocol.seeds), "strongest": protocol.strongest,
        "analysis": protocol.analysis, "settings": settings,
    }  # fmt: skip


def from_json(values: Mapping[str, Any]) -> GridProtocol:
    """The inverse of `to_json`; raises `ProtocolError` on what is missing or unknown."""
    try:
        found = {
            (setting, pair, arm): protocols.from_json({**body["shared"], **own})
            for setting, body in values["settings"].items()
            for pair, arms in body["pairs"].items()
            for arm, own in arms.items()
        }
        return GridProtocol(values["preset"], tuple(values["seeds"]), found, values["strongest"], values["analysis"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(
            f"grid protocol: {type(error).__name__} {error}; the file was written by another version: freeze a new one"
        ) from error


def protocol_hash(protocol: GridProtocol) -> str:
    """The protocol's identity: the digest of its canonical JSON."""
    return artifacts.digest(to_json(protocol))


def freeze(path: Path, protocol: GridProtocol) -> str:
    """Writes the protocol with its hash, one contrast per line, and returns the hash.

    Freezing the same protocol again changes nothing.

    Raises:
      ProtocolError: another protocol is frozen there.
    """
    identity = protocol_hash(protocol)
    if not protocols.is_frozen(path, lambda: deviations(load(path), protocol)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, {"schema": SCHEMA, "hash": identity, "protocol": to_json(protocol)}, depth=8)
    return identity


def load(path: Path) -> GridProtocol:
    """Reads a frozen protocol; raises `ProtocolError` if it was edited after freezing or cannot be read."""
    if not path.exists():
        raise ProtocolError(f"no protocol at {path}; freeze one before the confirming seeds")
    try:
        body = artifacts.unseal(path)
    except ValueError as error:
        raise ProtocolError(
            f"{error}: it was edited after freezing or damaged; restore it from version control"
        ) from None
    if body.get("schema") != SCHEMA:
        raise ProtocolError(f"{path}: schema {body.get('schema')!r} is not {SCHEMA}; use the version that wrote it")
    if artifacts.digest(body.get("protocol")) != body.get("hash"):
        raise ProtocolError(f"{path} was edited after freezing (its hash differs); restore it from version control")
    return from_json(body["protocol"])


def deviations(frozen: GridProtocol, current: GridProtocol) -> list[str]:
    """Where `current` departs from `frozen`, one line each; what holds for all pairs of a setting is said once."""
    lines = []
    for name in ("preset", "seeds", "strongest", "analysis"):
        before, after = (to_json(protocol)[name] for protocol in (frozen, current))
        if before != after:
            lines.append(f"{name}: frozen {json.dumps(before)}, ran {json.dumps(after)}")
    both = [place for place in frozen.protocols if place in current.protocols]
    for before, after, told in ((frozen, current, "frozen and not run"), (current, frozen, "added")):
        gone = [setting for setting in before.settings if setting not in after.settings]
        lines += [f"{setting}: {told}" for setting in gone]
        single = [place for place in before.protocols if place not in both and place[0] not in gone]
        lines += [f"{' '.join(place)}: {told}" for place in single]
    for setting in frozen.settings:
        places = [place for place in both if place[0] == setting]
        departed: dict[str, list[str]] = defaultdict(list)
        for place in places:
            # Seeds and preset are the grid's, and told above.
            own = dataclasses.replace(current.protocols[place], seeds=frozen.seeds, preset=frozen.preset)
            for line in protocols.deviations(frozen.protocols[place], own):
                departed[line].append(" ".join(place[1:]))
        for line, where in departed.items():
            lines.append(f"{setting}{'' if len(where) == len(places) else ' ' + ', '.join(where)}: {line}")
    return lines
