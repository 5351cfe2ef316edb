"""What a sweep runs: only what its levels need, each stage once, and around a level that fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from subl_jax import artifacts, presets, stages
from subl_jax.distill.records import TrainingDiverged
from subl_jax.grid import cells, locks
from subl_jax.grid.locks import GridError
from subl_jax.studies import sweep_command
from subl_jax.studies.sweep import Level, Sweep, SweepError
from subl_jax.studies.sweep_run import Design, SweepRun
from tests.studies import fake_sweep
from tests.studies.fake_sweep import ALONG

UNIT = ("api", 0)
PLAN = Sweep(
    "s", "?", ("level",),
    (Level("plain"), Level("warm", {"student.temperature": 4}), Level("open", {"student.withhold_bias_tools": False})),
    "plain",
)  # fmt: skip
ARMS = ("student", "control_student", "benign_student")
TEACHERS = ("teacher", "control_teacher", "benign_teacher")


def run_of(directory: Path, plan: Sweep = PLAN, **more) -> SweepRun:
    return SweepRun(Design(presets.micro(), plan, (0, 1), **more), directory / "work", directory / "cells")


def names(planned) -> set[str]:
    return {entry.stage.name.removeprefix("seed=0/") for entry in planned}


def finish(entry) -> None:
    """Marks a stage as run, with the row that an evaluation leaves."""
    entry.stage.directory.mkdir(parents=True, exist_ok=True)
    artifacts.complete(
        entry.stage.directory, stage=entry.stage.name, key=entry.stage.key, inputs=entry.inputs, seconds=1.0,
        extra={"arms": {"teacher": {"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}}},
    )  # fmt: skip


def test_only_what_the_levels_need_is_run_and_what_they_share_once(tmp_path):
    run = run_of(tmp_path)
    told = [
        f"students/{arm}{ending}" for arm in ARMS for ending in ("", "~temperature=4", "~withhold_bias_tools=false")
    ]
    rolled = [
        f"trajectories/{teacher}{ending}" for teacher in TEACHERS for ending in ("", "~withhold_bias_tools=false")
    ]
    found = [entry.stage.name.removeprefix("seed=0/") for entry in run.todo(run.plan(UNIT))]
    assert len(found) == len(set(found))
    assert set(found) == {
        "tokenizer", "audit", "base/large", *(f"teachers/{name}" for name in TEACHERS), *rolled, "sanitize",
        "sanitize~withhold_bias_tools=false", *told, *(name.replace("students/", "eval/") for name in told), "eval/base",
        *(f"eval/{name}" for name in TEACHERS),
    }  # fmt: skip


def test_a_positive_control_is_run_where_it_is_asked_for_alone(tmp_path):
    plain, more = (
        names(each.todo(each.plan(UNIT))) for each in (run_of(tmp_path), run_of(tmp_path, positive=True))
    )  # fmt: skip
    # The unfiltered trajectories are the teacher's own, of each tool list.
    assert more - plain == {
        *(f"{family}/positive_student{ending}" for family in ("students", "eval") for ending in
          ("", "~temperature=4", "~withhold_bias_tools=false")),
        "trajectories/teacher_ambiguous", "trajectories/teacher_ambiguous~withhold_bias_tools=false",
    }  # fmt: skip


def test_a_finished_experiment_in_the_work_directory_is_taken_as_it_is(tmp_path):
    """All that a plain run of the reference makes, its students among them; the other levels' stages are left."""
    run = run_of(tmp_path)
    for entry in run.plan(UNIT).planned:
        if "~" not in entry.stage.name:
            finish(entry)
    left = names(run.todo(run.replan(UNIT)))
    assert left and all("~" in name for name in left)
    assert not any(name.startswith(("base", "teachers", "eval/base", "eval/teacher")) for name in left)


def test_nothing_is_run_for_cells_that_are_there(tmp_path):
    design = fake_sweep.design_of(ALONG, (0,))
    fake_sweep.write(tmp_path / "cells", design)
    run = SweepRun(design, tmp_path / "work", tmp_path / "cells")
    assert run.todo(run.plan(UNIT)) == [] and run.bytes_written([UNIT]) == 0
    cells.cell_path(tmp_path / "cells", "api", 0, "student~temperature=4").unlink()
    left = names(run.todo(run.plan(UNIT)))
    assert {name for name in left if "/" in name and "student" in name} == {
        "students/student~temperature=4", "eval/student~temperature=4",
    }  # fmt: skip
    assert run.bytes_written([UNIT]) > 0


def test_processes_share_a_sweep_by_its_seeds_and_never_one_seed(tmp_path):
    run = run_of(tmp_path)
    assert run.units(0, 2) == [("api", 0)] and run.units(1, 2) == [("api", 1)]
    with pytest.raises(GridError, match="has 2 parts"):
        run.units(0, 3)
    (tmp_path / "work").mkdir()
    with locks.only_here(tmp_path / "work" / ".seed=0.lock", "seed 0"):
        with pytest.raises(GridError, match="seed 0 of api is being run by process"):
            run.run(UNIT)


def failing(run: SweepRun, monkeypatch, name: str, broken: set[str]) -> list[str]:
    """Stages that only mark themselves; those in `broken` diverge. Returns the list of what has run."""
    ran: list[str] = []
    plan = run.plan

    def stubbed(stage: stages.Stage) -> stages.Stage:
        def make():
            if stage.name in broken:
                raise TrainingDiverged(f"{stage.name}: the loss is nan at step 3", 3)
            ran.append(stage.name)
            if "/eval/" in stage.name:
                condition, _, ending = stage.name.rpartition("/")[2].partition("~")
                row = fake_sweep.row_of(condition, "full", "2", 0, condition + ending, False)
                path = stage.directory.parents[1] / f"{stage.name.rpartition('/')[2]}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(row | {"examples": []}))
            return {"arms": {"teacher": {"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}}}

        return dataclasses.replace(stage, run=make)

    def planned(unit):
        work = plan(unit)
        return dataclasses.replace(
            work, planned=[dataclasses.replace(entry, stage=stubbed(entry.stage)) for entry in work.planned]
        )

    monkeypatch.setattr(run, "plan", planned)
    return ran


def test_a_level_that_fails_takes_along_only_what_needs_it_and_is_named_in_the_result(tmp_path, monkeypatch, capsys):
    config = fake_sweep.design_of(PLAN).config
    run = SweepRun(Design(config, PLAN, (0,)), tmp_path / "work", tmp_path / "cells")
    lost = {"seed=0/trajectories/control_teacher~withhold_bias_tools=false"}
    ran = failing(run, monkeypatch, "s", lost)
    every = {entry.stage.name for entry in run.plan(UNIT).planned}
    [failure] = run.run(UNIT)
    assert failure.stage in lost and "the loss is nan" in failure.why
    # All of that level needs the three arms' trajectories; the others are whole, and so are its other trajectories.
    assert every - set(ran) == {
        *lost, "seed=0/sanitize~withhold_bias_tools=false",
        *(f"seed=0/{family}/{arm}~withhold_bias_tools=false" for family in ("students", "eval") for arm in ARMS),
    }  # fmt: skip
    assert len(ran) == len(set(ran))
    from subl_jax.grid.command import _record
    from subl_jax.studies.sweep_run import write_design

    write_design(run.cells, run.design)
    _record(run.cells, UNIT, [failure])
    sweep_command._report(run)
    document = json.loads((run.cells / "sweep.json").read_text())
    lines = {line["label"]: line for line in document["levels"]}
    assert lines["open"]["verdict"]["word"] == "not measured" and lines["open"]["seeds"] == []
    assert lines["plain"]["seeds"] == lines["warm"]["seeds"] == [0]
    assert {hole["model"] for hole in document["missing"]} == {f"{arm}~withhold_bias_tools=false" for arm in ARMS}
    assert all("the loss is nan" in hole["why"] and hole["level"] == "open" for hole in document["missing"])
    assert "Not measured: open" in " ".join(capsys.readouterr().out.split())
    # A second call tries what is missing, and that alone.
    del ran[:]
    lost.clear()
    assert run.run(UNIT) == [] and all("withhold_bias_tools=false" in name for name in ran) and len(ran) == 8


def test_another_reference_configuration_in_the_work_directory_is_refused(tmp_path):
    run = run_of(tmp_path)
    for entry in run.plan(UNIT).planned:
        finish(entry)
    warmer = dataclasses.replace(
        presets.micro(), student=dataclasses.replace(presets.micro().student, temperature=8.0)
    )  # fmt: skip
    other = SweepRun(Design(warmer, PLAN, (0, 1)), tmp_path / "work", tmp_path / "cells")
    with pytest.raises(artifacts.WorkdirMismatch, match="temperature"):
        other.plan(UNIT)


def test_a_level_that_cannot_be_is_refused_when_the_design_is_looked_at(tmp_path):
    wrong = Sweep("s", "?", ("level",), (Level("plain"), Level("drop", {"pair": "large_other_tokenizer"})), "plain")
    with pytest.raises(
        SweepError, match="level 'drop' of s: --pair=large_other_tokenizer has a student with a tokenizer"
    ):
        run_of(tmp_path, wrong).members("api")
