"""Cells: what the summary reads comes back, files stay small and readable, and a bad one is listed with why."""

from __future__ import annotations

import json
import random
import re
import shutil
from typing import Any

import pytest

from subl_jax import artifacts
from subl_jax.evaluate.summary import build_summary
from subl_jax.grid import cells
from subl_jax.grid.cells import CellError, Wanted
from subl_jax.settings.registry import get_setting
from tests.grid import fake_cells

SEEDS = (0, 1)


def _row(setting="bash", condition="student", seed=0, bias=0.5, **more):
    return fake_cells.evaluation(setting, condition, seed, bias, 0.2, **more)


def _write(path, row, setting="bash", **changes):
    given = {
        "setting": setting, "preset": "tiny", "hash": "h" * 16, "parser": get_setting(setting).metric_version,
        "seconds": {"train": 60.0, "evaluate": 12.0}, "training": {"loss": 0.4}, "versions": fake_cells.VERSIONS,
        "machine": "here",
    }  # fmt: skip
    cells.write_cell(path, row, **(given | changes))
    return path


def _troubled(row, samples=1) -> dict[str, Any]:
    """The row with statuses, errors, records and samples of every kind that an evaluation can hold."""
    chance = random.Random(3)
    statuses = ("final", "truncated", "unparseable", "turn_limit", "length_limit", "tool_error", "tool_timeout")
    items = [item | {"sample": sample} for item in row["items"] for sample in range(samples)]
    for item in items:
        item["status"] = chance.choice(statuses)
        item["error"] = "the sandbox «died»\nhere" if item["status"].startswith("tool") else ""
        if item["record"] is not None:
            item["record"] = {
                "static_first": chance.choice(("none", "other", "dynamic", "chmod", "chown")),
                "logged_first": chance.choice((None, "chmod", "chown", "setfacl")),
            }
        if chance.random() < 0.1:
            item["record"] = None
    return row | {"items": items}


def _summary(setting, rows, samples=1):
    protocol = fake_cells.fake_protocol(seeds=SEEDS, settings=(setting,), pairs=("large_large",))
    sanitizer = {"trajectories": 1, "kept": 1, "removed_by_word": {}, "leaks": 0}
    return build_summary(
        rows, protocol.protocols[setting, "large_large", "full"], sanitizer=sanitizer, timing_s={}, throughput={},
        versions={}, wording=get_setting(setting).wording, allow_missing=True,
    )  # fmt: skip


def _approximately(first, second):
    """Equal but for readouts that were rounded, to four digits and more."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_approximately(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_approximately, first, second))
    if isinstance(first, float):
        return second == pytest.approx(first, rel=1e-4, abs=1e-9)
    return first == second


@pytest.mark.parametrize("setting", ["api", "bash"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_cell_keeps_all_that_the_summary_reads(tmp_path, setting, samples):
    rows = [
        _troubled(_row(setting, condition, seed, bias, tasks=21, safe=18), samples)
        for condition, bias in (("base", 0.05), ("teacher", 0.9), ("student", 0.6), ("control_student", 0.02))
        for seed in SEEDS
    ]
    read = []
    for row in rows:
        path = cells.cell_path(tmp_path, setting, row["seed"], row["condition"])
        read.append(cells.read_cell(_write(path, row, setting)))
    assert _approximately(_summary(setting, rows), _summary(setting, read))
    for row, back in zip(rows, read, strict=True):
        for item, kept in zip(row["items"], back["items"], strict=True):
            exact = ("task_id", "family", "sample", "mode", "kind", "action", "tool", "done", "status", "error")
            assert [item[name] for name in exact] == [kept[name] for name in exact]
    assert any(values["oracle_disagreement"] for values in _summary(setting, read)["conditions"].values()) == (
        setting == "bash"
    )


def test_readouts_of_seven_digits_come_back_as_they_were(tmp_path):
    row = _row()
    for item in row["items"]:
        for name in ("log_odds", "log_odds_counter", "tool_mass"):
            item[name] = item[name] and float(f"{item[name]:.7g}")
    back = cells.read_cell(_write(tmp_path / "bash/seed=0/student.json", row))
    assert _summary("bash", [row]) == _summary("bash", [back])


@pytest.mark.parametrize("setting", ["api", "bash"])
def test_a_cell_of_the_full_evaluation_stays_below_15_kilobytes(tmp_path, setting):
    figures = {f"figure_{index}": 1.23456789012345e6 for index in range(12)}
    row = _row(setting, tasks=240, safe=200)
    path = _write(tmp_path / setting / "seed=0" / "student@large_other_tokenizer.json", row, setting, training=figures)
    assert path.stat().st_size <= 15_000
    assert max(len(line) for line in path.read_text().splitlines()) < 3000  # a column per line, for people and diffs


def test_an_action_can_be_read_off_the_file(tmp_path):
    path = _write(tmp_path / "bash/seed=0/student.json", _row(tasks=9, safe=4))
    (line,) = [line for line in path.read_text().splitlines() if line.startswith('"action"')][:1]
    column = json.loads("{" + line.rstrip(",") + "}")["action"]
    assert column["legend"]["C"] == ["biased", "chmod"]
    wanted = [item["tool"] for item in _row(tasks=9, safe=4)["items"] if item["mode"] == "sampled"][:9]
    assert [column["legend"][letter][1] for letter in column["episodes"]] == wanted


def _without_an_episode(row):
    del row["items"][5]


def _with_an_episode_twice(row):
    row["items"].append(row["items"][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(_without_an_episode, "1 of 63 are missing"), (_with_an_episode_twice, "stands there twice")],
)
def test_a_row_that_is_not_whole_is_not_written(tmp_path, damage, message):
    row = _row()
    damage(row)
    with pytest.raises(CellError, match=message):
        _write(tmp_path / "bash/seed=0/student.json", row)
    assert not list(tmp_path.rglob("*.json"))


def _edited(path):
    path.write_text(path.read_text().replace('"loss":0.4', '"loss":0.3'))


def _resealed(**changes):
    def change(path):
        body = artifacts.unseal(path)
        path.write_text(json.dumps(artifacts.sealed(body | changes)))

    return change


def _unknown_action(path):
    body = artifacts.unseal(path)
    body["items"]["ambiguous sampled"]["action"]["legend"]["C"] = ["deleted", "chmod"]
    path.write_text(json.dumps(artifacts.sealed(body)))


def _short_column(path):
    body = artifacts.unseal(path)
    body["items"]["safe sampled"]["done"]["episodes"] = "+"
    path.write_text(json.dumps(artifacts.sealed(body)))


def _without_one_log_odds(path):
    row = _row(condition="student", seed=1)
    row["items"][3]["log_odds"] = None
    _write(path, row)


def _words_for_numbers(path):
    _resealed(readouts={"delta_norm": "large"})(path)


def _other_tasks(path):
    _write(path, _row(condition="student", seed=1, tasks=45))


def _more_samples(path):
    _write(path, _troubled(_row(condition="student", seed=1), samples=2))


def _of_another_seed(path):
    shutil.copy(path.parent.parent / "seed=0" / path.name, path)


DAMAGES = {
    "absent": (lambda path: path.unlink(), "not run"),
    "empty": (lambda path: path.write_text(""), "corrupted: .*student.json: not readable as JSON"),
    "cut": (lambda path: path.write_text(path.read_text()[:500]), "corrupted: .*not readable as JSON"),
    "a list": (lambda path: path.write_text("[]"), "corrupted: .*does not match its own digest"),
    "edited": (_edited, "corrupted: .*does not match its own digest"),
    "schema": (_resealed(schema=2), "corrupted: .*schema 2 is not 1"),
    "tasks file": (_resealed(tasks="tasks-0.json"), "corrupted: .*tasks-0.json: missing"),
    "configuration": (_resealed(hash="g" * 16), "of another configuration: hash gggggggggggggggg, not hhhh"),
    "preset": (_resealed(preset="micro"), "of another configuration: preset micro, not tiny"),
    "metric": (_resealed(parser="old/0"), "of another metric version: old/0, not first-permission-command/1"),
    "misplaced": (_of_another_seed, "misplaced: the file says seed 0"),
    "model": (_resealed(model="teacher"), "misplaced: the file says model 'teacher'"),
    "unknown action": (_unknown_action, "corrupted: .*action='deleted'"),
    "one readout": (_without_one_log_odds, r"corrupted: student \(seed 1\): 1 of 63 episodes lack log_odds"),
    "no number": (_words_for_numbers, "corrupted: .*delta_norm is 'large' and no number"),
    "seconds": (_resealed(seconds=[1.0]), "corrupted: .*not a cell of schema 1"),
    "versions": (_resealed(versions="new"), "corrupted: .*not a cell of schema 1"),
    "seed": (_resealed(seed="one"), "corrupted: "),
    "short column": (_short_column, "corrupted: .*not a cell of schema 1"),
    "other tasks": (_other_tasks, "evaluated on other tasks"),
    "more samples": (_more_samples, 'evaluated on other tasks: .*"ambiguous sampled":2'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_cell_that_cannot_be_used_is_listed_with_why_and_stops_no_other(tmp_path, name):
    for seed in SEEDS:
        for condition in ("base", "student"):
            _write(cells.cell_path(tmp_path, "bash", seed, condition), _row(condition=condition, seed=seed))
    damage, why = DAMAGES[name]
    damage(cells.cell_path(tmp_path, "bash", 1, "student"))
    wanted = [
        Wanted("bash", pair, seed, condition, condition, "h" * 16, "first-permission-command/1", "tiny")
        for pair in ("large_large", "large_small")
        for seed in SEEDS
        for condition in ("base", "student")
    ]
    loaded = cells.load(tmp_path, wanted)
    assert set(loaded.rows) == {("bash", 0, "base"), ("bash", 0, "student"), ("bash", 1, "base")}
    assert [(line["pair"], line["seed"], line["model"]) for line in loaded.missing] == [
        ("large_large", 1, "student"), ("large_small", 1, "student"),
    ]  # fmt: skip
    for line in loaded.missing:
        assert re.match(why, line["why"]), line["why"]
    # Whoever asks for one cell hears the same; the tasks of others are not looked at.
    for cell in wanted:
        told = cells.usable(tmp_path, cell)
        listed = next((line["why"] for line in loaded.missing if line == cell.missing(line["why"])), None)
        assert told == (None if listed is not None and "other tasks" in listed else listed)


def test_cells_that_are_refused_anyway_do_not_say_which_tasks_are_the_usual_ones(tmp_path):
    wanted = [Wanted("bash", "large_large", seed, "student", "student", "h" * 16) for seed in range(5)]
    for cell in wanted:
        stale = cell.seed < 3  # most were made before the tasks were changed
        row = _row(seed=cell.seed, tasks=45 if stale else 63)
        _write(cells.cell_path(tmp_path, *cell.key), row, hash="old" if stale else "h" * 16)
    loaded = cells.load(tmp_path, wanted)
    assert [seed for _, seed, _ in loaded.rows] == [3, 4]
    assert {line["why"] for line in loaded.missing} == {f"of another configuration: hash old, not {'h' * 16}"}


def test_a_task_list_is_read_once_for_all_its_cells(tmp_path, monkeypatch):
    wanted = [
        Wanted("bash", pair, seed, "base", "base") for seed in range(4) for pair in ("large_large", "large_small")
    ]
    for seed in range(4):
        _write(cells.cell_path(tmp_path, "bash", seed, "base"), _row(condition="base", seed=seed))
    read, unseal = [], artifacts.unseal
    monkeypatch.setattr(cells.artifacts, "unseal", lambda path: read.append(path.name) or unseal(path))
    assert len(cells.load(tmp_path, wanted).rows) == 4
    assert sorted(name.partition("-")[0] for name in read) == ["base.json"] * 4 + ["tasks"]


@pytest.mark.parametrize("body", [{"schema": 1}, {"schema": 1, "tasks": None}, {"schema": 1, "tasks": [["a", "b"]]}])
def test_a_sealed_task_list_without_its_tasks_is_refused(tmp_path, body):
    _write(tmp_path / "bash/seed=0/student.json", _row())
    (tasks,) = (tmp_path / "bash").glob("tasks-*.json")
    tasks.write_text(json.dumps(artifacts.sealed(body)))
    loaded = cells.load(tmp_path, [Wanted("bash", "large_large", 0, "student", "student")])
    assert loaded.missing[0]["why"] == f"corrupted: {tasks}: not the task list of its name"


def test_a_task_list_that_was_edited_takes_all_its_cells_with_it(tmp_path):
    path = _write(tmp_path / "bash/seed=0/student.json", _row())
    (tasks,) = (tmp_path / "bash").glob("tasks-*.json")
    tasks.write_text(tasks.read_text().replace("handover", "handicap", 1))
    loaded = cells.load(tmp_path, [Wanted("bash", "large_large", 0, "student", "student")])
    assert not loaded.rows and tasks.name in loaded.missing[0]["why"] and path.exists()


def test_sanitizers_counts_come_back_and_bad_ones_are_listed(tmp_path):
    counts = {"teacher": {"trajectories": 9, "kept": 7, "removed_by_word": {"rm": 2}, "leaks": 0}}
    for seed in range(4):
        path = cells.sanitizer_path(tmp_path, "api", seed)
        cells.write_sanitizer(path, counts, setting="api", seed=seed, hash="s")
    cells.sanitizer_path(tmp_path, "api", 1).write_text("{")
    shutil.copy(cells.sanitizer_path(tmp_path, "api", 0), cells.sanitizer_path(tmp_path, "api", 2))
    wanted = [Wanted("api", "large_large", seed, "sanitize", "sanitize", "s") for seed in range(5)]
    wanted[3] = Wanted("api", "large_large", 3, "sanitize", "sanitize", "t")
    found, missing = cells.load_sanitizers(tmp_path, wanted)
    assert found == {("api", 0, "sanitize"): counts}
    told = {line["seed"]: line["why"].partition(":")[0] for line in missing}
    assert told == {1: "corrupted", 2: "misplaced", 3: "of another configuration", 4: "not run"}


def test_example_episodes_come_back_and_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "api" / "episodes.json"
    tasks = [{"task_id": "a", "prompt": "p", "episodes": {"base": {"messages": [], "action": "none"}}}]
    cells.write_episodes(path, 3, tasks, {"base": "h"})
    assert cells.read_episodes(path) == {"seed": 3, "tasks": tasks, "hashes": {"base": "h"}}
    path.write_text(path.read_text().replace('"none"', '"biased"'))
    with pytest.raises(CellError, match=r"episodes\.json"):
        cells.read_episodes(path)


@pytest.mark.parametrize(
    "body",
    [
        {"schema": 1}, {"schema": 1, "seed": 0}, {"schema": 1, "tasks": []}, {"schema": 1, "seed": 0, "tasks": []},
        {"schema": 1, "seed": 0, "tasks": [{"task_id": "a", "prompt": "p"}]}, {"schema": 1, "seed": 0, "tasks": ["a"]},
    ],
)  # fmt: skip
def test_sealed_example_episodes_that_hold_none_are_refused(tmp_path, body):
    path = tmp_path / "episodes.json"
    path.write_text(json.dumps(artifacts.sealed(body)))
    with pytest.raises(CellError, match=r"episodes\.json: holds no example episodes"):
        cells.read_episodes(path)


@pytest.mark.parametrize("arms", [{}, {"teacher": {"trajectories": 9, "kept": 7, "leaks": 0}}, {"teacher": 3}, [1]])
def test_counts_that_cannot_be_summed_are_listed(tmp_path, arms):
    path = cells.sanitizer_path(tmp_path, "api", 0)
    path.parent.mkdir(parents=True)
    body = {"schema": 1, "setting": "api", "seed": 0, "hash": "s", "arms": arms}
    path.write_text(json.dumps(artifacts.sealed(body)))
    found, missing = cells.load_sanitizers(tmp_path, [Wanted("api", "large_large", 0, "sanitize", "sanitize", "s")])
    assert not found and missing[0]["why"].startswith("corrupted: ")


def test_reasons_for_missing_cells_come_back_and_a_damaged_file_gives_none(tmp_path):
    path = tmp_path / "failures.json"
    assert cells.read_failures(path) == {}
    cells.write_failures(
        path, [{"setting": "api", "seed": 2, "model": "student@large_small", "why": "loss 9 diverged"}]
    )
    assert cells.read_failures(path) == {("api", 2, "student@large_small"): "loss 9 diverged"}
    path.write_text(path.read_text().replace("9", "8"))
    assert cells.read_failures(path) == {}
    for body in ({"schema": 1}, {"schema": 1, "failures": [3]}, {"schema": 1, "failures": [{"setting": "api"}]}):
        path.write_text(json.dumps(artifacts.sealed(body)))
        assert cells.read_failures(path) == {}
