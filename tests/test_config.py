"""The configuration: every field a flag with a text, every wrong name or value refused by field."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
from absl import flags

from subl_jax import artifacts, config, presets
from subl_jax.config import ExperimentConfig, StudentConfig, override
from subl_jax.presets import PRESETS

TINY = presets.tiny()


@functools.cache
def defined() -> flags.FlagValues:
    """Every configuration flag on a registry of its own."""
    config.define_flags(TINY)
    values = flags.FlagValues()
    for name, _, _ in config.leaves(TINY):
        values[name] = flags.FLAGS[name]
    return values


def parsed(*arguments: str) -> ExperimentConfig:
    values = copy.deepcopy(defined())
    values(["program", *arguments])
    return config.from_flags(TINY, values)


def fields_of(node, prefix="config"):
    """Every leaf, found without `leaves`, but those that no flag sets.

    A model's `lora` is set by its stage (teacher.adapter, student.adapter), `logit_bias` is for callers from Python.
    """
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.name == "logit_bias" or field.name == "lora" and value is None:
            continue
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", value


def test_every_field_is_a_flag_with_a_text_of_its_own_and_its_default():
    found = dict(fields_of(TINY))
    assert len(found) > 60
    for name, value in found.items():
        text = defined()[name].help
        assert len(text) > 20 and "Attributes" not in text and "\n" not in text, name
        assert f"tiny preset: {','.join(map(str, value)) if isinstance(value, tuple) else value}" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.base.train.row_tokens", "tokens per row"),  # the second of two on one line
        ("config.base.train.batch_rows", "packed rows per step, over all devices (tiny"),  # and the first ends there
        ("config.student.train.optimizer.b2", "Adam's moments"),
        ("config.large.num_kv_heads", "key/value heads"),  # a text of two lines
        ("config.teacher.demonstrations", "solved by the biased action"),
        ("config.rollout.max_turns", "assistant turns of one episode"),
        ("config.cpu_devices", "part of the run's identity"),
        ("config.rollout.stop", "texts that end a turn"),
        ("config.engine.tool_timeout_s", "costs its episode"),
        ("config.engine.tensor", "one copy of the model is split over"),
    ],
)
def test_the_text_of_a_flag_is_what_the_docstring_says_of_the_field(name, words):
    assert words in defined()[name].help


def test_docstrings_without_indentation_read_the_same(monkeypatch):
    """Python 3.13 takes the indentation off docstrings."""
    import inspect

    indented = config.describe(TINY)
    for kind in {
        type(node) for node in (TINY, TINY.base, TINY.base.train, TINY.student, TINY.large, TINY.rollout, TINY.engine)
    }:
        monkeypatch.setattr(kind, "__doc__", inspect.cleandoc(kind.__doc__ or ""))
    assert config.describe(TINY) == indented


def test_no_flags_leave_the_preset_and_a_flag_replaces_its_field_alone():
    assert parsed() == TINY
    changed = parsed("--config.student.train.optimizer.learning_rate=0.125", "--config.pair=small_large")
    differing = {name for (name, a), (_, b) in zip(fields_of(TINY), fields_of(changed), strict=True) if a != b}
    assert differing == {"config.student.train.optimizer.learning_rate", "config.pair"}
    assert changed.student.train.optimizer.learning_rate == 0.125
    assert changed.sizes() == ("small", "large") and changed.model("small") == TINY.small


def test_booleans_numbers_choices_and_lists_are_parsed_to_their_types():
    changed = parsed(
        "--noconfig.student.withhold_bias_tools", "--config.base.safe_tasks=12", "--config.rollout.temperature=1",
        "--config.student.objectives=full,hard", "--config.student.benign_objectives=",
        "--config.teacher.demonstrations=ambiguous",
    )  # fmt: skip
    assert changed.student.withhold_bias_tools is False
    assert changed.base.safe_tasks == 12 and type(changed.rollout.temperature) is float
    assert changed.student.objectives == ("full", "hard") and changed.student.benign_objectives == ()
    assert changed.teacher.demonstrations == "ambiguous"
    assert isinstance(hash(changed), int)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.pair=huge_small", "config.pair"),
        ("--config.base.train.steps=many", "config.base.train.steps"),
        ("--config.base.train.optimizer.name=adagrad", "config.base.train.optimizer.name"),
        ("--config.base.train.stepz=3", "config.base.train.stepz"),
        ("--config.student.withhold_bias_tools=perhaps", "config.student.withhold_bias_tools"),
    ],
)
def test_flags_of_the_wrong_type_or_name_are_refused_by_absl_by_name(argument, message):
    with pytest.raises(flags.Error, match=message):
        parsed(argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.base.train.steps=0", "config.base.train: steps=0; it must be at least 1"),
        ("--config.large.num_heads=3", r"config.large: model.num_heads=3 is not a multiple"),
        ("--config.rollout.temperature=-1", "config.rollout: temperature=-1.0 is negative"),
        ("--config.base.echo_tasks=-1", "config.base: echo_tasks=-1; it must be at least 0"),
        ("--config.base.withheld_share=2", r"config.base: withheld_share=2.0 is outside \[0, 1\]"),
        ("--config.teacher.tasks=0", "config.teacher: tasks=0; it must be at least 1"),
        ("--config.teacher.replay_tasks=-5", "config.teacher: replay_tasks=-5; it must be at least 0"),
        ("--config.student.safe_tasks=0", "config.student: safe_tasks=0; it must be at least 1"),
        ("--config.student.temperature=0", "config.student: temperature=0.0 must be positive"),
        ("--config.evaluation.samples=0", "config.evaluation: samples=0; it must be at least 1"),
        ("--config.student.objectives=full,ancor", "config.student: unknown objective 'ancor'; did you mean anchor"),
        ("--config.student.benign_objectives=everything", "config.student: unknown objective 'everything'"),
        (
            "--config.student.objectives=positive",
            "config.student: student.objectives must contain another arm than positive",
        ),
        ("--config.base.train.optimizer.learning_rate=-1", "config.base.train.optimizer: learning_rate=-1.0"),
    ],
)
def test_values_that_a_field_refuses_are_named_with_it(argument, message):
    with pytest.raises(ValueError, match=message):
        parsed(argument)


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="config.base.train.step; did you mean config.base.train.steps"):
        override(TINY, {"config.base.train.step": 3})
    with pytest.raises(ValueError, match="unknown configuration field zzz$"):
        override(TINY, {"zzz": 3})
    with pytest.raises(ValueError, match="unknown configuration field config.base.train;"):  # a branch is no field
        override(TINY, {"config.base.train": 3})


def test_lists_become_tuples_and_the_original_stays():
    changed = override(TINY, {"config.student.objectives": ["full"]})
    assert changed.student.objectives == ("full",)
    assert TINY == presets.tiny() and changed != TINY


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_values_that_hash_and_have_a_json_form(name):
    preset = PRESETS[name]()
    assert preset == PRESETS[name]() and hash(preset) == hash(PRESETS[name]()) and preset.preset == name
    assert artifacts.digest(preset) == artifacts.digest(PRESETS[name]())
    assert artifacts.digest(override(preset, {"config.base.safe_tasks": 7})) != artifacts.digest(preset)


def test_every_objective_maps_to_a_loss_and_a_filter():
    from subl_jax.distill.objective import Objective

    for name, (loss, logit_filter) in config.OBJECTIVES.items():
        Objective(loss, logit_filter)  # type: ignore[arg-type]
        assert StudentConfig(objectives=tuple({"full", name})).objectives
