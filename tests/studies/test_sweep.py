"""A sweep as a value: fields and values are checked by the configuration's own types, and nothing is guessed."""

from __future__ import annotations

import dataclasses

import pytest

from subl_jax import config as configuration
from subl_jax import presets
from subl_jax.studies import sweep
from subl_jax.studies.dissections import DISSECTIONS
from subl_jax.studies.sweep import Level, Sweep, SweepError
from subl_jax.studies.sweep_variants import members, namer

CONFIG = presets.micro()


def varied(*vary: str, config=CONFIG, **more: str) -> Sweep:
    return sweep.from_flags(vary, config, short=namer(config), **more)


# --- Fields and values --------------------------------------------------------------------------------------------------


def test_every_value_of_every_field_is_read_back_from_its_text():
    for preset in presets.PRESETS.values():
        config = preset()
        for name, value, _ in configuration.leaves(config):
            field = name.removeprefix("config.")
            assert sweep.parse(field, sweep.written(value), config) == value, field
            assert sweep.parse(field, value, config) == value, field


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("student.temperature", "4", 4.0),
        ("student.train.optimizer.learning_rate", "1e-4", 1e-4),
        ("student.train.steps", "12", 12),
        ("student.withhold_bias_tools", "False", False),
        ("pair", "large_small", "large_small"),
        ("student.adapter.targets", "q+v", ("q", "v")),
        ("large.windows", "64+0", (64, 0)),
    ],
)
def test_a_value_has_the_type_of_its_field(field, text, value):
    found = sweep.parse(field, text, CONFIG)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("student.temprature=1,2", r"unknown configuration field 'student.temprature'; did you mean student.temperature\?"),
        ("temperature=1,2", r"did you mean student.temperature or rollout.temperature\?"),
        ("setting=api,bash", "setting cannot be varied: two settings share no task.*--setting"),
        ("cpu_devices=1,2", "cpu_devices cannot be varied.*--config.cpu_devices"),
        ("preset=tiny,micro", "preset cannot be varied"),
        ("student.benign_objectives=full,hard", "cannot be varied.*vary student.objectives"),
        ("student.temperature=1,hot", "student.temperature=hot: use a number"),
        ("student.temperature=1,nan", "student.temperature=nan: use a finite number"),
        ("student.train.steps=1.5,2", "student.train.steps=1.5: use a whole number"),
        ("student.lora=yes,no", "student.lora=yes: use true or false"),
        ("pair=large_large,large_smal", r"pair=large_smal: use one of .*did you mean large_small\?"),
        ("large.windows=a,b", r"use whole numbers joined by \+"),
        ("student.temperature", "say FIELD=VALUE,VALUE"),
        ("student.temperature=", "say FIELD=VALUE,VALUE"),
        ("student.temperature=2", "has 1 level; a comparison takes two values or more"),
        ("student.temperature=2,2.0", "two levels '2'; give every value once"),
    ],
)  # fmt: skip
def test_a_wrong_field_or_value_is_refused_with_the_nearest(vary, message):
    with pytest.raises(SweepError, match=message):
        varied(vary)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student.objectives": "hrd"}, r"unknown objective 'hrd'; did you mean hard\?"),
        ({"student.objectives": "full+hard"}, "a level is one arm with its controls"),
        ({"student.objectives": "positive"}, "a level is one arm with its controls.*--positive_control"),
        ({"student.temperature": "-1"}, "temperature"),
        ({"student.train.optimizer.momentum": 0.9}, "momentum=0.9 is sgd's"),
    ],
)
def test_a_value_that_the_configuration_refuses_is_refused_before_anything_is_run(overrides, message):
    plan = Sweep("s", "?", ("level",), (Level("as it is"), Level("wrong", overrides)), "as it is")
    with pytest.raises(SweepError, match=message):
        members(plan, CONFIG)


# --- Sweeps -------------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_level_that_is_the_configuration_itself_or_the_first():
    assert varied("student.temperature=1,2,4").reference == "2"  # the preset's
    assert varied("student.temperature=1,4").reference == "1"
    assert varied("student.temperature=1,4", reference="4").reference == "4"
    assert varied("student.defence=paraphrase,none,keywords").reference == "none"
    assert varied("student.defence=paraphrase,keywords").reference == "keywords"  # the preset's
    with pytest.raises(SweepError, match=r"the reference '44' is no level.*did you mean 4\?"):
        varied("student.temperature=1,4", reference="44")


def test_two_fields_make_a_product_with_a_place_on_both_axes():
    found = varied("student.temperature=1,2", "student.objectives=full,hard,drop")
    assert found.axes == ("student.temperature", "student.objectives") and len(found.levels) == 6
    assert [level.at for level in found.levels[:3]] == [(1.0, "full"), (1.0, "hard"), (1.0, "drop")]
    assert found.numeric(0) and not found.numeric(1)
    assert found.name == "temperature_x_objectives" and found.reference == "temperature 2 / objectives full"


def test_three_fields_make_a_list_of_levels():
    found = varied("student.temperature=1,2", "student.train.steps=6,12", "student.require_final=true,false")
    assert found.axes == ("level",) and len(found.levels) == 8 and not found.numeric()
    assert found.name == "temperature_x_steps_x_require_final"


def test_an_axis_of_words_is_no_axis_of_numbers_and_a_word_may_end_one():
    assert not varied("student.withhold_bias_tools=true,false").numeric()
    levels = tuple(Level(str(at), {}, (at,)) for at in (25, 50, "all"))
    assert Sweep("dose", "?", ("trajectories",), levels, "all").numeric()
    assert not Sweep("dose", "?", ("trajectories",), levels[1:], "all").numeric()


def test_a_level_has_one_arm_with_both_controls_and_a_positive_control_if_asked_for():
    plain = sweep.applied(CONFIG, {"student.objectives": "hard"})
    assert plain.student.objectives == plain.student.benign_objectives == ("hard",)
    more = sweep.applied(CONFIG, {}, positive=True)
    assert more.student.objectives == ("full", "positive") and more.student.benign_objectives == ("full",)
    assert sweep.conditions_of_arm(plain) == ("student_hard", "control_student_hard", "benign_student_hard")


# --- Dissections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISSECTIONS)
@pytest.mark.parametrize("setting", ["api", "bash"])
def test_every_level_of_every_dissection_applies_to_the_tiny_preset(name, setting):
    config = presets.tiny(setting)
    found = members(DISSECTIONS[name], config)
    assert [member.name for member in found] == [level.label for level in DISSECTIONS[name].levels]
    assert all(member.config.setting == setting for member in found)


def test_a_dissection_is_called_by_its_name_and_compares_every_level_with_one_of_its_own():
    for name, each in DISSECTIONS.items():
        assert each.name == name and each.title.endswith("?")
        for level in each.levels:
            assert each.against(level) in {other.label for other in each.levels}


def test_defences_that_are_named_on_the_command_line_have_their_chart_and_nothing_else_has():
    assert varied("student.defence=none,paraphrase").chart == "defences"
    assert varied("student.temperature=1,2").chart == ""
    assert sweep.from_flags(("student.defence=none,dilution", "student.temperature=1,2"), CONFIG).chart == ""


def test_every_level_but_one_has_another_reference_only_where_it_says_so():
    each = DISSECTIONS["initialisation"]
    against = {level.label: each.against(level) for level in each.levels}
    assert against == {
        "shared full": "shared full", "foreign full": "shared full", "shared hard": "shared hard",
        "foreign hard": "shared hard",
    }  # fmt: skip


def test_a_sweep_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DISSECTIONS["tools"].name = "other"  # type: ignore[misc]
