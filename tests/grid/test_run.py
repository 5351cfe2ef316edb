"""What a grid runs: each stage once, only what a missing cell needs, in parts that no two processes share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from subl_jax import artifacts, presets, stages
from subl_jax.conditions import conditions_of
from subl_jax.config import TEACHERS, ExperimentConfig
from subl_jax.distill.records import TrainingDiverged
from subl_jax.grid import cells, examples, locks, run
from subl_jax.grid.locks import GridError
from subl_jax.grid.pairs import PAIRS, PairSpec
from subl_jax.grid.run import GridRun
from subl_jax.pipeline import SeedPipeline
from subl_jax.settings.api import SETTING

UNIT = ("api", 3)
FEW = ("large_small", "large_foreign_init")


def for_pair(config: ExperimentConfig, spec: PairSpec) -> ExperimentConfig:
    return dataclasses.replace(config, pair=spec.name)  # type: ignore[arg-type]


def grid(directory: Path, *, seeds=(3, 4), settings=("api",), pairs=tuple(PAIRS)) -> GridRun:
    return GridRun(
        {setting: presets.micro(setting) for setting in settings},
        {setting: [PAIRS[name] for name in pairs] for setting in settings},
        seeds, directory / "work", directory / "cells", for_pair,
    )  # fmt: skip


def write_cell(work: run.SeedWork, directory: Path, model: str, hash: str | None = None) -> Path:
    """A small cell under a model's name, as if it had been evaluated elsewhere."""
    setting, seed = work.unit
    path, parser = cells.cell_path(directory, setting, seed, model), SETTING.metric_version
    item = {
        "task_id": "t", "family": "f", "sample": 0, "action": "biased", "tool": "delete_file", "done": True,
        "status": "final", "mode": "sampled", "kind": "ambiguous",
    }  # fmt: skip
    row = {
        "condition": model.partition("@")[0],
        "seed": seed,
        "checkpoint": "elsewhere",
        "items": [item],
        "readouts": {},
    }
    cells.write_cell(
        path, row, setting=setting, preset="micro", hash=hash or work.hashes[setting, seed, model], parser=parser,
        seconds={}, training={}, versions={}, machine="another",
    )  # fmt: skip
    return path


def write_all(work: run.SeedWork, directory: Path) -> None:
    for one in work.evaluated:
        write_cell(work, directory, one.model)
    for name in work.sanitizers.values():
        path = cells.sanitizer_path(directory, *work.unit, name)
        counts: dict[str, Any] = dict.fromkeys(
            TEACHERS, {"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}
        )
        cells.write_sanitizer(path, counts, setting="api", seed=work.unit[1], hash=work.hashes[(*work.unit, name)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> run.SeedWork:
    """The plan of one seed of all pairs."""
    return grid(tmp_path_factory.mktemp("whole")).plan(UNIT)


def names(planned) -> set[str]:
    return {entry.stage.name.removeprefix("seed=3/") for entry in planned}


# --- What there is ----------------------------------------------------------------------------------------------------


def test_every_condition_of_every_pair_is_a_model_under_the_name_that_the_analysis_asks_for(whole, tmp_path):
    for spec in PAIRS.values():
        config = grid(tmp_path).config("api", spec)
        assert set(conditions_of(config)) == set(spec.conditions())
        models = SeedPipeline(config, SETTING, tmp_path / "work" / "api", 3).models
        assert {name: models.eval_name(name) for name in spec.conditions()} == {
            name: spec.model(name) for name in spec.conditions()
        }
        assert models.sanitize_name() == spec.sanitizer
    wanted = {spec.model(name) for spec in PAIRS.values() for name in spec.conditions()}
    assert {one.model for one in whole.evaluated} == wanted


def test_what_pairs_share_is_one_stage_and_every_stage_has_its_inputs_before_it(whole):
    planned = whole.planned
    found = [entry.stage.name for entry in planned]
    assert len(set(found)) == len(found)
    # Five bases, two teachers with two controls each, and their trajectories; a positive control for each teacher size.
    count = {family: sum(stages.family_of(name) == family for name in found) for family in map(stages.family_of, found)}
    students = sum(3 * len(spec.arms) + spec.positive for spec in PAIRS.values())
    assert count == {
        "tokenizer": 2, "audit": 1, "base": 5, "teachers": 6, "trajectories": 8, "sanitize": 2, "students": students,
        "eval": 5 + 6 + students,
    }  # fmt: skip
    before: set[str] = set()
    for entry in planned:
        assert set(entry.stage.inputs) <= before
        before.add(entry.stage.name)


def test_a_pair_of_the_grid_is_the_single_run_of_that_pair(whole, tmp_path):
    """The same hashes as an experiment of that pair alone, so that what one has made the other takes."""
    config = grid(tmp_path).config("api", PAIRS["large_small"])
    alone = SeedPipeline(config, SETTING, tmp_path / "work" / "api", 3).stages()
    by_name = {entry.stage.name: entry.stage for entry in whole.planned}
    for stage in alone:
        assert artifacts.digest(stage.key) == artifacts.digest(by_name[stage.name].key)
        assert stage.inputs == by_name[stage.name].inputs


def test_organisms_differ_where_their_names_say_so(whole):
    keys = {
        entry.stage.name.rpartition("/")[2]: entry.stage.key for entry in whole.planned if "/base/" in entry.stage.name
    }
    assert keys["foreign_init"]["model"] == keys["large"]["model"]
    assert keys["foreign_init"]["own_draw"] == 1 and "own_draw" not in keys["large"]
    assert keys["other_family"]["model"] == keys["other_tokenizer"]["model"] != keys["large"]["model"]


# --- What is run ------------------------------------------------------------------------------------------------------


def test_nothing_is_run_for_cells_that_are_there(tmp_path):
    ours = grid(tmp_path, pairs=FEW)
    work = ours.plan(UNIT)
    assert names(ours.todo(work)) == names(work.planned)
    write_all(work, ours.cells)
    assert ours.todo(work) == []


def test_a_missing_cell_needs_its_model_and_what_that_was_made_of(tmp_path):
    ours = grid(tmp_path, pairs=FEW)
    work = ours.plan(UNIT)
    write_all(work, ours.cells)
    cells.cell_path(ours.cells, *UNIT, "student_hard@large_small").unlink()
    assert names(ours.todo(work)) == {
        "tokenizer", "audit", "base/large", "base/small", "teachers/teacher", "teachers/control_teacher",
        "teachers/benign_teacher", "trajectories/teacher", "trajectories/control_teacher", "trajectories/benign_teacher",
        "sanitize", "students/student_hard@large_small", "eval/student_hard@large_small",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["cut", "edited", "of another configuration"])
def test_a_cell_that_cannot_be_used_is_made_again(tmp_path, damage):
    ours = grid(tmp_path, pairs=FEW)
    work = ours.plan(UNIT)
    write_all(work, ours.cells)
    path = write_cell(
        work, ours.cells, "base@foreign_init", hash="0123456789abcdef" if damage.startswith("of") else None
    )
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "edited":
        path.write_text(text.replace('"delete_file"', '"read_file"'))
    assert names(ours.todo(work)) == {"tokenizer", "audit", "base/foreign_init", "eval/base@foreign_init"}


def test_parts_are_disjoint_and_make_up_the_grid(tmp_path):
    ours = grid(tmp_path, seeds=(0, 1, 2), settings=("api", "bash"))
    whole = ours.units()
    assert whole[:2] == [("api", 0), ("bash", 0)]  # early seeds are whole first
    parts = [ours.units(index, 4) for index in range(4)]
    assert sorted(sum(parts, [])) == sorted(whole) and len(sum(parts, [])) == 6
    with pytest.raises(GridError, match="has 6 parts"):
        ours.units(0, 7)


def test_two_processes_do_not_run_one_part(tmp_path):
    with locks.only_here(tmp_path / "lock", "seed 3 of api"):
        with pytest.raises(GridError, match=r"seed 3 of api is being run by process \d+ on .*--index"):
            with locks.only_here(tmp_path / "lock", "seed 3 of api"):
                pass
    with locks.only_here(tmp_path / "lock", "seed 3 of api"):  # the first one is through
        pass


def test_rows_are_read_once_for_the_examples_and_only_those_of_this_configuration(tmp_path, monkeypatch):
    ours = grid(tmp_path, pairs=("large_small",))
    work = ours.plan(UNIT)
    shown = {"messages": [], "action": "none", "tool": None, "turn": None, "done": True, "task_id": "a", "prompt": "p"}
    for one in work.evaluated[:4]:
        one.row.parent.mkdir(parents=True, exist_ok=True)
        one.row.write_text(json.dumps({"examples": [shown]}))
    by_name = {entry.stage.name: entry for entry in work.planned}
    for one in work.evaluated[:3]:  # the fourth row has no marker: another configuration has left it
        finished(by_name[one.stage])
    read: list[str] = []
    real = run._row
    monkeypatch.setattr(run, "_row", lambda path: read.append(path.stem) or real(path))
    ours._write_examples(ours.replan(UNIT))
    assert read == [one.model for one in work.evaluated[:3]]
    finished(by_name[work.evaluated[3].stage])
    ours._write_examples(ours.replan(UNIT))
    assert read == [one.model for one in work.evaluated[:4]]
    body = cells.read_episodes(examples.episodes_path(ours.cells, "api"))
    assert body["hashes"] == {model: work.hashes["api", 3, model] for model in read}


# --- What goes wrong ----------------------------------------------------------------------------------------------------


def finished(entry, extra=None) -> None:
    """Marks a stage as run."""
    entry.stage.directory.mkdir(parents=True, exist_ok=True)
    artifacts.complete(
        entry.stage.directory, stage=entry.stage.name, key=entry.stage.key, inputs=entry.inputs, seconds=1.0,
        extra=extra or {},
    )  # fmt: skip


def test_a_stage_that_fails_takes_along_only_what_reads_it(tmp_path, monkeypatch):
    ours = grid(tmp_path, pairs=("large_small",))
    ran: list[str] = []

    def broken(stage):
        def make():
            if stage.name.endswith("students/control_student@large_small"):
                raise TrainingDiverged("students/control_student@large_small: the loss is nan at step 3", 3)
            ran.append(stage.name)
            return {"arms": {}}

        return dataclasses.replace(stage, run=make)

    plan = ours.plan

    def planned(unit):
        work = plan(unit)
        return dataclasses.replace(
            work, planned=[dataclasses.replace(entry, stage=broken(entry.stage)) for entry in work.planned]
        )

    monkeypatch.setattr(ours, "plan", planned)
    monkeypatch.setattr(ours, "_write_cells", lambda work, of: None)
    [failure] = ours.run(UNIT)
    assert failure.stage == "seed=3/students/control_student@large_small" and "the loss is nan" in failure.why
    assert failure.keys == [("api", 3, "control_student@large_small")]
    every = {entry.stage.name for entry in plan(UNIT).planned}
    lost = {f"seed=3/{family}/control_student@large_small" for family in ("students", "eval")}
    assert set(ran) == every - lost and len(ran) == len(set(ran))


def test_a_full_disk_ends_the_grid(tmp_path, monkeypatch):
    ours = grid(tmp_path, pairs=("large_small",))

    def full(every, only=None, **more):
        raise artifacts.WorkdirError("cannot write: No space left on device; free some space")

    monkeypatch.setattr(run.stages, "run", full)
    with pytest.raises(artifacts.WorkdirError, match="No space left"):
        ours.run(UNIT)


def test_an_evaluation_whose_row_is_gone_is_made_again_and_a_model_that_is_gone_is_named(tmp_path):
    ours = grid(tmp_path, pairs=("large_small",))
    for entry in ours.plan(UNIT).planned:
        finished(entry, {"loss": 1.0} if "/students/" in entry.stage.name else {})
    work = ours.replan(UNIT)
    assert ours.todo(work) == []
    for one in work.evaluated:  # rows of all but one, models of all but one
        one.row.parent.mkdir(parents=True, exist_ok=True)
        if one.model != "base@small":
            one.row.write_text('{"examples": []}')
        (work.planned[0].stage.directory.parent / "seed=3" / "students" / one.model / "params").mkdir(parents=True)
    ours._forget_lost(work)
    assert names(ours.todo(ours.replan(UNIT))) == {"eval/base@small"}
    gone = tmp_path / "work" / "api" / "seed=3" / "students" / "student@large_small" / "params"
    gone.rmdir()
    ours._forget_lost(ours.replan(UNIT))  # its row is at hand: the model is not needed
    ours.plan(UNIT).evaluated[4].row.unlink()
    assert ours.plan(UNIT).evaluated[4].model == "student@large_small"
    with pytest.raises(
        GridError, match=r"students/student@large_small is marked as finished and holds no model; delete"
    ):
        ours._forget_lost(ours.replan(UNIT))


def test_a_row_that_was_read_by_another_rule_is_measured_again(tmp_path):
    ours = grid(tmp_path, pairs=("large_small",))
    for entry in ours.plan(UNIT).planned:
        finished(entry)
    work = ours.replan(UNIT)
    for one in work.evaluated:
        one.row.parent.mkdir(parents=True, exist_ok=True)
        rule = "an older one" if one.model == "teacher" else SETTING.metric_version
        one.row.write_text(json.dumps({"examples": [], "measured": {"metric": rule, "machine": "m"}}))
    ours._forget_lost(work)
    assert names(ours.todo(ours.replan(UNIT))) == {"eval/teacher"}


def test_costs_are_those_of_the_stages_that_are_finished_by_now(tmp_path):
    ours = grid(tmp_path, pairs=("large_small",), seeds=(3,))
    assert ours.costs() == {}
    finished(ours.plan(UNIT).planned[0])
    assert ours.costs() == {"api": {"tokenizer": 1.0}}
