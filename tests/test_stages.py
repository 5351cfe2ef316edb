"""Stages: identified by what they depend on, never run twice, and refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from subl_jax import artifacts, stages
from subl_jax.stages import Stage


class Line:
    """Four stages of two families under one root; `ran` tells what ran, in order."""

    def __init__(self, root: Path, **keys: Any) -> None:
        self.ran: list[str] = []
        names = {"tokenizer": (), "seed=0/base/large": ("tokenizer",), "seed=0/teachers/a": ("seed=0/base/large",),
                 "seed=0/teachers/b": ("seed=0/base/large",), "seed=0/eval/a": ("seed=0/teachers/a",)}  # fmt: skip
        self.stages = [
            Stage(name, root / name, {"value": keys.get(name, 1)}, inputs, self._runner(name, root))
            for name, inputs in names.items()
        ]

    def _runner(self, name: str, root: Path):
        def make():
            (root / name / "output").write_text(name)
            self.ran.append(name)
            return {"tokens_per_s": 5.0}

        return make

    def hashes(self) -> dict[str, str]:
        found = {}
        for planned in stages.plan(self.stages):
            name, key = planned.stage.name, planned.stage.key
            found[name] = artifacts.output_hash(name, key, planned.inputs)
        return found


ALL = ["tokenizer", "seed=0/base/large", "seed=0/teachers/a", "seed=0/teachers/b", "seed=0/eval/a"]


def test_all_run_in_order_and_a_second_call_runs_nothing(tmp_path):
    line = Line(tmp_path)
    markers = stages.run(line.stages)
    assert line.ran == ALL and list(markers) == ALL
    assert markers["tokenizer"].extra == {"tokens_per_s": 5.0} and markers["tokenizer"].seconds >= 0
    again = Line(tmp_path)
    assert stages.run(again.stages) == markers and again.ran == []


def test_a_hash_changes_with_the_key_and_with_every_input_up_the_line_and_with_nothing_else(tmp_path):
    plain = Line(tmp_path).hashes()
    assert plain == Line(tmp_path / "elsewhere").hashes()
    changed = Line(tmp_path, **{"seed=0/teachers/a": 2}).hashes()
    assert {name for name in plain if plain[name] != changed[name]} == {"seed=0/teachers/a", "seed=0/eval/a"}
    changed = Line(tmp_path, tokenizer=2).hashes()
    assert all(plain[name] != changed[name] for name in plain)


def test_an_unfinished_run_continues_at_the_first_stage_without_a_marker(tmp_path):
    line = Line(tmp_path)

    def failing():
        raise RuntimeError("killed")

    broken = [*line.stages]
    broken[2] = Stage(broken[2].name, broken[2].directory, broken[2].key, broken[2].inputs, failing)
    with pytest.raises(RuntimeError, match="killed"):
        stages.run(broken)
    assert line.ran == ALL[:2]
    stages.run(line.stages)
    assert line.ran == ALL


def test_another_configuration_is_refused_before_anything_runs(tmp_path):
    stages.run(Line(tmp_path).stages, only="eval")
    (tmp_path / "tokenizer" / artifacts.MARKER).unlink()  # there would be work to do before the stage that differs
    other = Line(tmp_path, **{"seed=0/teachers/b": 2})
    with pytest.raises(artifacts.WorkdirMismatch, match="value: 1 in the directory, 2 in this run"):
        stages.run(other.stages)
    assert other.ran == []
    assert (tmp_path / "seed=0/teachers/b/output").read_text() == "seed=0/teachers/b"


def test_only_stops_behind_the_last_match_and_runs_what_it_needs(tmp_path):
    line = Line(tmp_path)
    assert list(stages.run(line.stages, only="teachers")) == ALL[:4] == line.ran
    by_name = Line(tmp_path / "other")
    stages.run(by_name.stages, only="seed=0/teachers/a")
    assert by_name.ran == ALL[:3]


def test_an_unknown_stage_is_refused_with_those_there_are(tmp_path):
    line = Line(tmp_path)
    with pytest.raises(ValueError, match="--stage=teacher names no stage; use one of base, eval, teachers, tokenizer"):
        stages.run(line.stages, only="teacher")
    assert line.ran == []


def test_a_stage_that_reads_a_later_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage seed=0/eval/a reads seed=0/teachers/a, which does not stand before it"):
        stages.plan(Line(tmp_path).stages[::-1])


@pytest.mark.parametrize(
    ("name", "family"),
    [("tokenizer", "tokenizer"), ("seed=0/base/large", "base"), ("seed=12/students/student@large_small", "students"),
     ("seed=1/sanitize", "sanitize"), ("seed=1/sanitize@small", "sanitize"), ("tokenizer@other_tokenizer", "tokenizer")],
)  # fmt: skip
def test_the_family_is_the_first_part_behind_the_seed(name, family):
    assert stages.family_of(name) == family


def test_stages_that_are_not_wanted_are_left_alone_and_each_that_was_run_is_told(tmp_path):
    line, told = Line(tmp_path), []
    wanted = ["tokenizer", "seed=0/base/large", "seed=0/teachers/b"]
    markers = stages.run(
        line.stages, wanted=wanted, finished=lambda stage, marker: told.append((stage.name, marker.stage))
    )
    assert line.ran == wanted == list(markers) and told == [(name, name) for name in wanted]
    stages.run(line.stages, finished=lambda stage, marker: told.append((stage.name, marker.stage)))
    assert line.ran[3:] == ["seed=0/teachers/a", "seed=0/eval/a"]  # the finished ones are not told again
    assert [name for name, _ in told[3:]] == line.ran[3:]
