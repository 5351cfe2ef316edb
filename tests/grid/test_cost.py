"""What a grid costs: kinds of stages, the best figures first, and what nobody has timed is counted."""

from __future__ import annotations

import json

import pytest

from subl_jax.grid import cost


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("seed=3/students/control_student_hard@large_small", "students/student_hard@large_small"),
        ("seed=12/teachers/benign_teacher@small", "teachers/teacher@small"),
        ("seed=0/base/large", "base/large"),
        ("seed=0/eval/base@other_family", "eval/base@other_family"),
        ("tokenizer", "tokenizer"),
    ],
)
def test_stages_that_take_alike_are_of_one_kind(stage, kind):
    assert cost.kind_of(stage) == kind


def test_an_estimate_takes_the_best_figure_of_each_kind_and_counts_what_has_none():
    own = {"api": {"base/large": 10.0}}
    others = {"api": {"base/large": 99.0, "base/small": 20.0, "eval/base": 3.0}, "bash": {"audit": 5.0}}
    stages = ["seed=1/base/large", "seed=1/eval/base", "seed=2/eval/base", "seed=1/base/other_family", "audit"]
    found = cost.estimate("api", stages, [own, others])
    # The other family's base is taken as the mean of the bases; of audits nothing is known in this setting.
    assert (found.seconds, found.stages, found.guessed, found.unknown) == (10 + 3 + 3 + 15, 5, 1, 1)
    assert found.by_family == {"base": 25.0, "eval": 6.0}
    both = found + cost.estimate("bash", ["audit"], [own, others])
    assert (both.seconds, both.stages, both.guessed, both.unknown) == (36.0, 6, 1, 1)
    assert both.by_family == {"base": 25.0, "eval": 6.0, "audit": 5.0}


def test_the_cells_of_any_machine_say_what_their_stages_took():
    rows = [
        {"setting": "api", "model": "base@small", "seconds": {"train": 40.0, "evaluate": 8.0}},
        {"setting": "api", "model": "teacher", "seconds": {"train": 7.0, "evaluate": 9.0, "rollout": 20.0}},
        {"setting": "api", "model": "control_teacher", "seconds": {"train": 9.0, "evaluate": 9.0, "rollout": 30.0}},
        {"setting": "api", "model": "student@large_small", "seconds": {"evaluate": 8.0}},
    ]
    assert cost.of_cells(rows) == {
        "api": {
            "eval/base@small": 8.0, "base/small": 40.0, "eval/teacher": 9.0, "teachers/teacher": 8.0,
            "trajectories/teacher": 25.0, "eval/student@large_small": 8.0,
        }
    }  # fmt: skip


def test_a_record_is_scaled_by_how_fast_this_machine_is(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    cost.write_record(path, "tiny", {"api": {"base/large": 100.0}}, 0.5, "a machine")
    cost.write_record(path, "micro", {"api": {"base/large": 1.0}}, 0.5, "a machine")
    assert set(json.loads(path.read_text())) == {"tiny", "micro"}
    monkeypatch.setattr(cost.resources, "files", lambda package: tmp_path)
    assert cost.recorded("tiny", 1.0) == {"api": {"base/large": 200.0}}
    assert cost.recorded("paper", 1.0) == {}


def test_the_probe_takes_a_part_of_a_second():
    assert 0 < cost.probe() < 10


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.4, "12 s"), (200, "3 min"), (5400, "1 h 30 min"), (7260, "2 h 01 min")]
)
def test_durations_are_as_precise_as_an_estimate_is(seconds, words):
    assert cost.duration(seconds) == words
