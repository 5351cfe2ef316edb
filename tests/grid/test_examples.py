"""The episodes that the report shows: of the tasks that tell most, and of the evaluations that are asked for alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subl_jax import artifacts
from subl_jax.grid import cells, examples
from subl_jax.settings.api import SETTING

DOCS = Path(__file__).resolve().parents[2] / "docs" / "grid"
TASKS = ("a", "b")


def example(task: str, action: str, tool: str, said: str = "") -> dict[str, Any]:
    """An episode as an evaluation keeps it."""
    shown = {
        "messages": [{"role": "assistant", "content": said}],
        "action": action,
        "tool": tool,
        "turn": 0,
        "done": True,
    }
    return {**shown, "task_id": task, "prompt": f"tidy up {task}", "log_odds": 1.0}


def every(said: str, action: str = "neutral", tool: str = "move_file") -> list[dict[str, Any]]:
    return [example(task, action, tool, said) for task in TASKS]


def hashes(**models: str) -> dict[cells.Key, str]:
    return {("api", 3, model): value for model, value in models.items()}


def said(directory: Path, asked: dict[cells.Key, str]) -> dict[str, str]:
    """What each model that is shown has said."""
    found, _ = examples.read(directory, "api", asked)
    return {
        model: episode["messages"][0]["content"]
        for task in found["tasks"]
        for model, episode in task["episodes"].items()
    }


def test_examples_are_the_tasks_on_which_models_differ():
    same, other = example("", "neutral", "move_file"), example("", "biased", "delete_file")
    episodes = {
        **{f"same {number}": {"base": same, "student": same} for number in range(5)},
        "telling": {"base": same, "student": other},
    }
    found = examples.telling(episodes)
    assert [task["task_id"] for task in found] == ["telling", "same 0", "same 1", "same 2"]
    assert found[0]["episodes"]["student"] == {
        name: other[name] for name in ("messages", "action", "tool", "turn", "done")
    }
    assert json.dumps(found)


def test_conversations_of_another_configuration_go_as_soon_as_one_of_today_s_is_written(tmp_path):
    examples.write(tmp_path, "api", 3, {"base": every("old"), "student": every("old")}, hashes(base="0", student="0"))
    today = hashes(base="1", student="1")
    found, others = examples.read(tmp_path, "api", today)
    assert found == {"seed": 3, "tasks": []} and others == ["base", "student"]
    examples.write(tmp_path, "api", 3, {"base": every("new")}, today)
    assert said(tmp_path, today) == {"base": "new"}
    assert cells.read_episodes(examples.episodes_path(tmp_path, "api"))["hashes"] == {"base": "1"}


def test_models_that_another_machine_has_evaluated_stay_with_their_tasks(tmp_path):
    asked = hashes(base="1", teacher="1", student="1", control_student="2")
    there = {"base": every("there"), "teacher": every("there"), "control_student": every("old")}
    examples.write(tmp_path, "api", 3, there, asked | hashes(control_student="1"))
    # Another task, on which these two differ more, is none of the other machine's models.
    here = {
        "base": [*every("here"), example("c", "biased", "delete_file")],
        "student": [*every("here"), example("c", "none", "")],
    }
    examples.write(tmp_path, "api", 3, here, asked)
    assert said(tmp_path, asked) == {"base": "here", "teacher": "there", "student": "here"}
    found, _ = examples.read(tmp_path, "api", asked)
    assert [task["task_id"] for task in found["tasks"]] == list(TASKS)


def test_a_model_that_nobody_asks_for_is_neither_shown_nor_told(tmp_path):
    examples.write(tmp_path, "api", 3, {"base": every("x"), "teacher": every("x")}, hashes(base="1", teacher="1"))
    found, others = examples.read(tmp_path, "api", hashes(base="1"))
    assert {model for task in found["tasks"] for model in task["episodes"]} == {"base"} and others == []


@pytest.mark.parametrize(("acted", "shown"), [("delete_file", True), ("move_file", False)])
def test_a_file_from_before_hashes_were_kept_is_shown_as_far_as_it_agrees_with_the_cells(tmp_path, acted, shown):
    done = {"kind": "ambiguous", "mode": "sampled", "sample": 0, "family": "f", "status": "final", "done": True}
    items = [done | {"task_id": task, "action": "biased", "tool": "delete_file"} for task in TASKS]
    cells.write_cell(
        cells.cell_path(tmp_path, "api", 3, "student"),
        {"condition": "student", "seed": 3, "checkpoint": "c", "items": items, "readouts": {}},
        setting="api", preset="tiny", hash="1", parser=SETTING.metric_version, seconds={}, training={}, versions={},
        machine="m",
    )  # fmt: skip
    examples.write(tmp_path, "api", 3, {"student": every("x", "biased", acted)}, hashes(student="1"))
    path = examples.episodes_path(tmp_path, "api")
    body = {name: value for name, value in artifacts.unseal(path).items() if name != "hashes"}
    artifacts.write_json_atomic(path, artifacts.sealed(body))
    assert (said(tmp_path, hashes(student="1")) == {"student": "x"}) == shown
    assert said(tmp_path, hashes(student="2")) == {}


@pytest.mark.parametrize("path", sorted(DOCS.glob("*/episodes.json")), ids=lambda path: path.parent.name)
def test_the_committed_episodes_belong_to_the_committed_cells(path):
    setting, body = path.parent.name, cells.read_episodes(path)
    models = {model for task in body["tasks"] for model in task["episodes"]}
    made = {
        (setting, body["seed"], model): cells.read_cell(cells.cell_path(DOCS, setting, body["seed"], model))["hash"]
        for model in models
    }
    found, others = examples.read(DOCS, setting, made)
    assert others == [] and found == {"seed": body["seed"], "tasks": body["tasks"]} and len(models) > 5
