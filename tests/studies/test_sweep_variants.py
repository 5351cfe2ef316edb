"""What levels are called on disk: equal stages are one, different ones never meet, against brute force over whole plans."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from subl_jax import artifacts, presets, stages
from subl_jax.config import ExperimentConfig
from subl_jax.groundwork import groundwork
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.registry import get_setting
from subl_jax.studies import sweep
from subl_jax.studies.sweep import Level, Sweep, SweepError
from subl_jax.studies.sweep_run import Design, SweepRun
from subl_jax.studies.sweep_variants import family, members, namer, short_name, value_name, variant_of

CONFIG = presets.micro()
LORA = dataclasses.replace(CONFIG, student=dataclasses.replace(CONFIG.student, lora=True))
SETTING = get_setting("api")
SEED = 3


def levels(**overrides: dict[str, Any]) -> Sweep:
    """A sweep of some levels; the first is the configuration itself."""
    found = (Level("as_it_is"), *(Level(label, changed) for label, changed in overrides.items()))
    return Sweep("s", "?", ("level",), found, "as_it_is")


RATE = "student.train.optimizer.learning_rate"
# Each with a level that repeats a change of another one upstream or downstream of it, or together with one.
SWEEPS: dict[str, tuple[ExperimentConfig, Sweep]] = {
    "students alone": (
        CONFIG,
        levels(a={"student.temperature": 4}, b={RATE: 1e-4}, c={RATE: 1e-4, "student.temperature": 4},
               same={"student.temperature": 2}),
    ),
    "upstream of the students": (
        CONFIG,
        levels(a={"student.withhold_bias_tools": False}, b={"student.withhold_bias_tools": False, RATE: 1e-4},
               c={"student.require_final": True}, d={"student.require_final": True, "student.temperature": 1}),
    ),
    "teachers": (
        CONFIG,
        levels(a={"teacher.tasks": 12}, b={"teacher.tasks": 12, "student.temperature": 1}, c={"teacher.tasks": 12,
               "teacher.train.steps": 4}, d={"teacher.lora": True, "teacher.adapter.rank": 2}),
    ),
    "from the tokenizer on": (
        CONFIG, levels(a={"tokenizer.vocab_size": 950}, b={"tokenizer.vocab_size": 950, RATE: 1e-4}),
    ),
    "bases": (CONFIG, levels(a={"base.train.steps": 12}, b={"base.train.steps": 12, "evaluation.samples": 2})),
    "evaluation alone": (CONFIG, levels(a={"evaluation.samples": 2}, b={"evaluation.samples": 2, RATE: 1e-4})),
    "adapters": (
        LORA, levels(a={"student.adapter.rank": 2}, b={"student.adapter.rank": 2, RATE: 1e-4}, c={"student.lora": False}),
    ),
    "a value that needs another": (
        CONFIG,
        levels(a={"student.train.optimizer.name": "sgd"},
               b={"student.train.optimizer.name": "sgd", "student.train.optimizer.momentum": 0.9}),
    ),
    "a strength that only some defences have": (
        CONFIG,
        levels(a={"student.defence": "towards_base"},
               b={"student.defence": "towards_base", "student.defence_strength": 0.1},
               c={"student.defence": "dilution", "student.defence_strength": 0.1}),
    ),
    "pairs and arms": (
        CONFIG,
        levels(a={"pair": "large_small"}, b={"pair": "large_foreign_init", "student.objectives": "hard"},
               c={"student.objectives": "hard"}, d={"pair": "large_small", "student.temperature": 1},
               e={"pair": "small_small", "student.safe_tasks": 12}, f={"student.objectives": "hard", RATE: 1e-4}),
    ),
    "rollouts": (CONFIG, levels(a={"rollout.max_turns": 3}, b={"rollout.max_turns": 3, "student.temperature": 1})),
}  # fmt: skip


def whole(config: ExperimentConfig, workdir: Path, variant=None) -> list[stages.Stage]:
    run = SeedPipeline(config, SETTING, workdir, SEED, variant=variant or {})
    return [*groundwork(config, SETTING, workdir, (SEED,), variant or {}), *run.stages()]


def meanings(config: ExperimentConfig, workdir: Path) -> list[str]:
    """What each stage of a plain run of a configuration is: a digest of its key, its name and all that it was made of."""
    known: dict[str, str] = {}
    for stage in whole(config, workdir):
        told = [stage.name, artifacts.plain(stage.key), [known[name] for name in stage.inputs]]
        known[stage.name] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return list(known.values())


@pytest.mark.parametrize("name", SWEEPS)
def test_stages_of_any_two_levels_are_one_exactly_where_they_are_the_same(name, tmp_path):
    config, plan = SWEEPS[name]
    by_meaning: dict[str, set[tuple[str, str, Path]]] = {}
    by_place: dict[Path, set[str]] = {}
    if name == "students alone":  # a level that equals the configuration is no second level: it is looked at by itself
        plan = dataclasses.replace(plan, levels=plan.levels[:-1])
    for member in members(plan, config):
        meant = meanings(member.config, tmp_path)
        planned = stages.plan(whole(member.config, tmp_path, member.variant))
        assert len(meant) == len(planned)
        for meaning, entry in zip(meant, planned, strict=True):
            hashed = artifacts.output_hash(entry.stage.name, entry.stage.key, entry.inputs)
            by_meaning.setdefault(meaning, set()).add((entry.stage.name, hashed, entry.stage.directory))
            by_place.setdefault(entry.stage.directory, set()).add(meaning)
    assert all(len(found) == 1 for found in by_meaning.values())
    assert all(len(found) == 1 for found in by_place.values())


@pytest.mark.parametrize("name", SWEEPS)
def test_a_level_that_changes_nothing_has_the_names_and_hashes_of_a_plain_experiment(name, tmp_path):
    config, plan = SWEEPS[name]
    work = SweepRun(Design(config, dataclasses.replace(plan, levels=plan.levels[:2]), (SEED,)), tmp_path, tmp_path)
    merged = {entry.stage.name: entry for entry in work.plan(("api", SEED)).planned}
    plain = stages.plan(whole(sweep.applied(config, {}), tmp_path))
    for entry in plain:
        ours = merged[entry.stage.name]
        assert "~" not in entry.stage.name and ours.stage.directory == entry.stage.directory
        assert artifacts.digest([ours.stage.key, dict(ours.inputs)]) == artifacts.digest(
            [entry.stage.key, dict(entry.inputs)]
        )


def test_a_level_that_says_what_the_configuration_says_has_no_ending():
    assert variant_of(CONFIG, {}) == {} == variant_of(CONFIG, {"student.temperature": "2.0", RATE: 1e-3})
    assert variant_of(CONFIG, {"student.objectives": "full", "pair": "large_large"}) == {}


def test_two_levels_that_are_one_run_are_refused():
    plan = levels(a={"student.temperature": 2})
    with pytest.raises(SweepError, match="'as_it_is' and 'a' of s are one and the same run"):
        members(plan, CONFIG)


def test_an_ending_stands_from_the_first_stage_that_is_reached_to_the_last():
    ending = "~withhold_bias_tools=false"
    assert variant_of(CONFIG, {"student.withhold_bias_tools": False}) == dict.fromkeys(
        ("trajectories", "sanitize", "students", "eval/students"), ending
    )
    both = variant_of(CONFIG, {"teacher.tasks": 12, RATE: 1e-4})
    assert both["teachers"] == both["eval/teachers"] == "~teacher.tasks=12"
    assert both["students"] == both["eval/students"] == "~learning_rate=0.0001,teacher.tasks=12"
    assert "base" not in both and "tokenizer" not in both


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.adapter.rank": 4}, "adapters are not trained; add --config.student.lora=true"),
        ({"student.train.keep": 4}, "it says when things are saved"),
        ({"small.d_model": 24}, "the pair is large_large"),
        ({"student.temperature": 4, "student.train.log_every": 5}, "student.train.log_every=5 changes nothing here"),
    ],
)
def test_a_change_that_no_stage_depends_on_is_refused(overrides, message):
    with pytest.raises(SweepError, match=message):
        variant_of(CONFIG, overrides)


def test_a_positive_control_changes_no_name():
    assert variant_of(CONFIG, {RATE: 1e-4}, positive=True) == variant_of(CONFIG, {RATE: 1e-4})


# --- Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets.PRESETS.values())
def test_no_two_fields_have_one_short_name(preset):
    short, fields = namer(preset()), list(sweep.kinds(preset()))
    assert len({short(field) for field in fields}) == len(fields)
    assert short(RATE) == "learning_rate" and short("teacher.train.optimizer.learning_rate") == "teacher.learning_rate"
    assert short("student.train.optimizer.name") == "optimizer" and short("pair") == "pair"


def test_a_short_name_stays_when_another_stage_gets_a_field_of_that_name():
    fields = list(sweep.kinds(CONFIG))
    assert short_name("student.temperature", [*fields, "teacher.temperature"]) == "temperature"
    # Two of the same stage, though, are told apart.
    assert short_name("student.temperature", [*fields, "student.train.temperature"]) == "student.temperature"


@pytest.mark.parametrize("value", ["/models/llama 3", "a~b", "a=b,c", "x" * 300, "ü", "", ("q", "v"), 1e-5, -0.5, True])
def test_a_value_has_a_name_that_a_file_and_a_stage_may_have(value):
    name = value_name(value)
    assert name and len(name) <= 40 and not set(name) & set("/~=,@ ") and name.isascii()


def test_different_values_have_different_names():
    values = ["/a/b", "/a_b", "a/b", "x" * 300, "x" * 299 + "y", "%2Fa%2Fb", "1", "1.5"]
    assert len(set(map(value_name, values))) == len(values)


def test_every_stage_belongs_to_a_family_that_names_can_be_told_for():
    named = {family(stage.name) for stage in whole(CONFIG, Path("/nonexistent"))}
    assert named == {
        "tokenizer", "audit", "base", "teachers", "trajectories", "sanitize", "students", "eval/base", "eval/teachers",
        "eval/students",
    }  # fmt: skip
    assert family("seed=1/eval/benign_teacher@small~teacher.tasks=12") == "eval/teachers"
    assert family("seed=1/eval/base@small~x=1") == "eval/base"
    assert family("seed=1/eval/control_student_hard@large_small~x=1") == "eval/students"
