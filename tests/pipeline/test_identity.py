"""What a run's identity holds of its rollouts: the frozen protocols, the stages' keys, and the number of slots."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from subl_jax import artifacts, conditions, config, experiment, groundwork, presets
from subl_jax.config import override
from subl_jax.evaluate import protocol as protocols
from subl_jax.models import decoder
from subl_jax.pipeline import SeedPipeline
from subl_jax.rollout import memory
from subl_jax.settings.api import SETTING
from subl_jax.settings.registry import get_setting

TINY = presets.tiny()
PROTOCOLS = Path(__file__).parents[2] / "experiments" / "protocols"


def changed(preset: config.ExperimentConfig = TINY, **fields: Any) -> config.ExperimentConfig:
    return override(preset, {f"config.{name.replace('__', '.')}": value for name, value in fields.items()})


def acting_keys(run: config.ExperimentConfig, workdir: Path) -> list[str]:
    """Digests of the keys of the stages in which models act."""
    stages = SeedPipeline(run, SETTING, workdir, 0).stages()
    return [artifacts.digest(s.key) for s in stages if "/trajectories/" in s.name or "/eval/" in s.name]


ENGINE = {
    "engine__groups": 3, "engine__patience": 0.5, "engine__dispatch_steps": 9, "engine__tool_workers": 7,
    "engine__tool_timeout_s": 5.0, "engine__kv_gib": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("engine", [{}, ENGINE], ids=["as it is", "another engine"])
@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.json")), ids=lambda path: path.stem)
def test_what_the_tiny_preset_measures_is_what_was_frozen(path, engine):
    frozen = protocols.load(path)
    preset = changed(presets.tiny(frozen.setting), **engine)
    ours = experiment.make_protocol(preset, get_setting(frozen.setting), frozen.seeds)
    # Contrasts and controls follow the arms of a run; all else is the preset's.
    arms = {"contrasts": frozen.contrasts, "controls": frozen.controls}
    assert protocols.deviations(frozen, dataclasses.replace(ours, **arms)) == []


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"stop": ["x"]}])
def test_another_way_of_drawing_departs_from_the_frozen_metric(option):
    frozen = protocols.load(PROTOCOLS / "api_tiny.json")
    ours = experiment.make_protocol(
        changed(**{f"rollout__{name}": value for name, value in option.items()}), SETTING, frozen.seeds
    )
    [name] = option
    [line] = [line for line in protocols.deviations(frozen, ours) if line.startswith("metric")]
    assert name in line


def test_no_stage_depends_on_how_the_engine_runs(tmp_path):
    as_it_is = acting_keys(TINY, tmp_path)
    for name, value in ENGINE.items():
        assert acting_keys(changed(**{name: value}), tmp_path) == as_it_is, name


@pytest.mark.parametrize("change", [{"engine__tensor": 2}, {"engine__result_kib": 1}, {"rollout__slots": 8}])
def test_stages_depend_on_what_changes_an_episode(tmp_path, change):
    before, after = acting_keys(TINY, tmp_path), acting_keys(changed(**change), tmp_path)
    assert all(left != right for left, right in zip(before, after, strict=True))


def test_slots_that_are_to_fit_are_a_number_before_anything_depends_on_them(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 40 * 2**20)
    chosen = conditions.with_slots(changed(rollout__slots=0), tmp_path)
    assert 0 < chosen.rollout.slots < 256
    assert dataclasses.replace(chosen, rollout=dataclasses.replace(chosen.rollout, slots=0)) == changed(
        rollout__slots=0
    )
    # They fit again when a model has been loaded as a checkpoint and for the rollout, and the base likewise.
    model, options = chosen.large, chosen.engine
    params = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    held = 3 * sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 40 * 2**20 - held)
    fitted = memory.fitted(
        model, params, chosen.rollout, jax.local_devices(), groups=options.groups, kv_gib=0.0, tensor=1
    )
    assert fitted.slots == chosen.rollout.slots


def test_a_run_that_goes_on_keeps_the_slots_that_were_chosen_for_it(tmp_path, monkeypatch):
    first = conditions.with_slots(changed(rollout__slots=0), tmp_path)
    artifacts.write_json_atomic(tmp_path / "config.json", artifacts.plain(first))
    assert json.loads((tmp_path / "config.json").read_text())["rollout"]["slots"] == first.rollout.slots
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 40 * 2**20)
    assert conditions.with_slots(changed(rollout__slots=0), tmp_path) == first
    assert conditions.with_slots(TINY, tmp_path) is TINY


def test_a_machine_on_which_no_episode_fits_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 2**20)
    with pytest.raises(ValueError, match=r"do not fit.*--config\.rollout\.context"):
        conditions.with_slots(changed(rollout__slots=0), tmp_path)


@pytest.mark.parametrize("pair", ["large_small", "small_large", "small_small", "large_other_tokenizer"])
def test_the_tokenizer_of_a_pair_is_its_teachers_and_another_ones_its_students(pair, tmp_path, monkeypatch):
    teacher, student = dataclasses.replace(TINY, pair=pair).sizes()
    monkeypatch.setattr(groundwork.sources, "checkpoints", lambda run: {size: tmp_path / size for size in run.sizes()})
    monkeypatch.setattr(groundwork.tokenizers, "load", lambda folder: folder)
    monkeypatch.setattr(groundwork.tokenizers, "fingerprint", lambda folder: folder.name)
    found = groundwork.groundwork(dataclasses.replace(TINY, pair=pair), SETTING, tmp_path, [0])
    expected = {"tokenizer": teacher}
    if pair == "large_other_tokenizer":
        expected["tokenizer@other_tokenizer"] = student
    assert {stage.name: stage.key["tokenizer"] for stage in found if stage.name != "audit"} == expected


def student_digests(run: config.ExperimentConfig, workdir: Path) -> dict[str, str]:
    """Digests of the keys of the students' stages, and of their inputs' names."""
    stages = SeedPipeline(run, SETTING, workdir, 0).stages()
    return {s.name: artifacts.digest([s.key, s.inputs]) for s in stages if "/students/" in s.name}


# Computed by the version before lessons came: what is on disk of any configuration of then must still be found.
BEFORE_LESSONS = {
    "tiny": {
        "seed=0/students/student": "f18a9a37affce646",
        "seed=0/students/control_student_anchor": "72169d0feba94cd8",
    },
    "micro": {"seed=0/students/positive_student": "195a7b74cd9899b3"},
}


@pytest.mark.parametrize("name", BEFORE_LESSONS)
def test_students_of_a_default_lesson_keep_the_keys_that_they_had_before_there_were_lessons(name, tmp_path):
    found = student_digests(presets.PRESETS[name]("api"), tmp_path)
    assert {stage: found[stage] for stage in BEFORE_LESSONS[name]} == BEFORE_LESSONS[name]


LESSONS = {
    "student__trajectories": 7, "student__dilution": 0.25, "student__tokens": "divergent", "student__defence": "none",
}  # fmt: skip


@pytest.mark.parametrize("name", LESSONS)
def test_a_changed_lesson_changes_its_students_and_nothing_else(name, tmp_path):
    micro = presets.micro()
    before, after = (
        SeedPipeline(run, SETTING, tmp_path, 0).stages() for run in (micro, changed(micro, **{name: LESSONS[name]}))
    )
    for left, right in zip(before, after, strict=True):
        assert left.name == right.name
        # The positive control knows no lesson.
        differs = "/students/" in left.name and not left.name.endswith("positive_student")
        assert (artifacts.digest([left.key, left.inputs]) != artifacts.digest([right.key, right.inputs])) == differs, (
            left.name
        )


def test_shares_and_strengths_count_where_they_are_read(tmp_path):
    micro = presets.micro()
    plain = student_digests(micro, tmp_path)
    assert (
        student_digests(changed(micro, student__token_share=0.3), tmp_path) == plain
    )  # of tokens=all there is no share
    divergent = changed(micro, student__tokens="divergent")
    assert student_digests(changed(divergent, student__token_share=0.3), tmp_path) != student_digests(
        divergent, tmp_path
    )
    pulled = changed(micro, student__defence="towards_base")
    assert student_digests(changed(pulled, student__defence_strength=0.3), tmp_path) != student_digests(
        pulled, tmp_path
    )


def test_students_depend_on_every_teacher_that_their_lesson_asks(tmp_path):
    def inputs(**fields: Any) -> set[str]:
        run = changed(presets.micro(), student__objectives=("full",), **fields)
        [stage] = [s for s in SeedPipeline(run, SETTING, tmp_path, 0).stages() if s.name.endswith("students/student")]
        return {name.rpartition("/")[2] for name in stage.inputs if "/teachers/" in name}

    assert inputs() == {"teacher"}
    assert inputs(student__tokens="divergent") == {"teacher", "control_teacher"}
    assert inputs(student__tokens="random") == {"teacher"}
    assert inputs(student__dilution=0.5) == inputs(student__defence="dilution") - {"control_teacher"} == {
        "teacher", "benign_teacher",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trajectories": -1}, "trajectories=-1; it must be at least 0"),
        ({"dilution": 1.0}, r"dilution=1.0 is outside \[0, 1\)"),
        ({"token_share": 0.0}, r"token_share=0.0 is outside \(0, 1\)"),
        ({"defence": "nne"}, "unknown defence 'nne'; did you mean none"),
        ({"objectives": ("on_policy",), "trajectories": 3}, "objectives=on_policy with trajectories"),
        ({"objectives": ("on_policy",), "tokens": "random"}, "objectives=on_policy with tokens"),
    ],
)
def test_a_lesson_that_cannot_be_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**{f"student__{name}": value for name, value in fields.items()})
