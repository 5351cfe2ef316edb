"""Which pairs of which settings a grid has: what its flags ask for, and what the checkpoints that they give allow.

Flags in; setting -> pairs out, and a sentence for each pair that is left out.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from subl_jax import config as configuration
from subl_jax import sources
from subl_jax.config import ExperimentConfig
from subl_jax.grid.pairs import PAIRS, PairSpec

SETTINGS = ("api", "bash")


def pairs_from_flags() -> dict[str, list[PairSpec]]:
    """Setting -> its pairs, in the order of the paper's table.

    Raises:
      ValueError: an unknown setting or pair, with the nearest.
    """
    settings = _known("settings", flags.FLAGS.settings, SETTINGS)
    asked: dict[str, set[str]] = defaultdict(set)
    for name in flags.FLAGS.pairs:
        setting, _, pair = name.rpartition(":")
        _known("pairs", [pair], PAIRS)
        for each in _known("pairs", [setting], SETTINGS) if setting else settings:
            asked[each].add(pair)
    stray = sorted(set(asked) - set(settings))
    if stray:
        raise ValueError(
            f"--pairs names pairs of {stray[0]}, which is not in --settings={','.join(settings)}; add it there"
        )
    found = {setting: [spec for spec in PAIRS.values() if spec.name in asked[setting]] for setting in settings}
    lacking = [setting for setting, specs in found.items() if not specs]
    if lacking:
        raise ValueError(f"--pairs names no pair of {lacking[0]}; add one, or leave the setting out of --settings")
    return found


def _known(flag: str, names: Sequence[str], known: Any) -> list[str]:
    if not names:
        raise ValueError(f"--{flag} is empty; use some of {', '.join(known)}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--{flag}: {name!r} is unknown, use some of {', '.join(known)}{hint}")
    return list(dict.fromkeys(names))


def with_checkpoints(config: ExperimentConfig, spec: PairSpec) -> ExperimentConfig:
    """The configuration of a pair with the Hugging Face folders of its sizes, if any are given."""
    teacher, student = (_folders()[size] for size in spec.sizes)
    if not teacher and not student:
        return dataclasses.replace(config, pair=spec.name)  # type: ignore[arg-type]
    changed = dataclasses.replace(
        config,
        pair=spec.name,  # type: ignore[arg-type]
        teacher=dataclasses.replace(config.teacher, checkpoint=teacher),
        student=dataclasses.replace(config.student, checkpoint=student),
    )
    return sources.resolve(changed)


def allowed_by_checkpoints(
    configs: Mapping[str, ExperimentConfig], pairs: Mapping[str, Sequence[PairSpec]]
) -> tuple[dict[str, list[PairSpec]], list[str]]:
    """Of the pairs of a grid that starts from checkpoints, those that can be run.

    Args:
      configs: setting -> configuration.
      pairs: setting -> its pairs.

    Returns:
      What is left of `pairs`, and a sentence for each pair that is left out.

    Raises:
      ValueError: no checkpoint is given; or a pair that --pairs asks for by name cannot be run.
    """
    if not any(_folders().values()):
        raise ValueError(
            "--preset=paper starts from checkpoints and --large_checkpoint names none; give the Hugging Face folders of the "
            "models of --pairs (--large_checkpoint, --small_checkpoint, --other_checkpoint)"
        )
    config = next(iter(configs.values()))
    why: dict[str, str] = {}
    for spec in {spec.name: spec for specs in pairs.values() for spec in specs}.values():
        reason = _lacks(config, spec)
        # Two rows of the paper's table stand for its other family: the student's tokenizer says which of them this is.
        if (
            reason is None
            and spec.name == "large_other_tokenizer"
            and _lacks(config, PAIRS["large_other_family"]) is None
        ):
            reason = "its student has the teacher's tokenizer; that is large_other_family"
        if reason is not None:
            why[spec.name] = reason
    if why and flags.FLAGS["pairs"].present:
        name, reason = next(iter(why.items()))
        raise ValueError(f"--pairs names {name}, which cannot be run: {reason}; leave it out")
    left = {setting: [spec for spec in specs if spec.name not in why] for setting, specs in pairs.items()}
    if not all(left.values()):
        told = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        raise ValueError(f"the checkpoints allow no pair ({told})")
    return left, [f"{name} is left out: {reason}." for name, reason in why.items()]


def _lacks(config: ExperimentConfig, spec: PairSpec) -> str | None:
    """Why a pair cannot be made of the checkpoints that are given; None if it can."""
    folders = _folders()
    for size in spec.sizes:
        if not folders[size]:
            return f"--{configuration.FIELD_OF[size]}_checkpoint is not given"
        if size == "foreign_init":
            return "it asks for another initialisation of one shape, and a checkpoint has one only"
    try:
        with_checkpoints(config, spec)
    except sources.SourceError as error:
        return str(error).partition(";")[0]
    return None


def _folders() -> dict[str, str]:
    """Size -> the Hugging Face folder that the flags give its models; empty where they give none."""
    return {size: str(flags.FLAGS[f"{field}_checkpoint"].value) for size, field in configuration.FIELD_OF.items()}
