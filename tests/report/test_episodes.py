"""The episode browser: everything is there without its script, what models wrote is text, the first action is marked."""

from __future__ import annotations

import json

import pytest

from subl_jax.report import episodes
from subl_jax.settings.registry import get_setting
from tests.report import fake_episodes
from tests.report.parsed import Page, parsed

MODELS = ("base", "teacher", "student", "control_student@large_small")


def browser(setting: str = "api", tasks: list | None = None, **more) -> Page:
    wording = get_setting(setting).wording.__dict__
    found = fake_episodes.tasks(setting, MODELS) if tasks is None else tasks
    return parsed(episodes.section("e", found, wording, ("base", "student"), **more))


def test_the_first_substantive_action_is_marked_once_per_episode_and_nowhere_else():
    page = browser()
    # Two tasks with four acting models each, then one on which two act.
    assert len(page.of("div", "turn first biased")) == 6 and len(page.of("div", "turn first neutral")) == 4
    assert page.text.count("first substantive action: destructive") == 6
    assert page.text.count("first substantive action: neutral") == 4


def test_an_episode_without_an_action_marks_no_turn_and_says_so():
    task = {"task_id": "t", "prompt": "p", "episodes": {"base": fake_episodes.idle("none")}}
    page = browser(tasks=[task])
    assert page.of("div", "turn first") == [] and "no such action" in page.text


def test_without_its_script_every_episode_can_be_opened_and_the_controls_stay_hidden():
    page = browser()
    folds = page.of("details", "episode")
    assert len(folds) == 3 * len(MODELS)
    assert [fold["data-model"] for fold in folds if "open" in fold] == ["base", "student"] * 3
    assert all("open" in fold for fold in page.of("details", "task"))
    (form,) = page.of("form")
    assert "hidden" in form and "action" not in form


def test_every_control_has_a_label_and_every_model_and_task_a_control():
    page = browser(groups={"large → large": ("base", "teacher"), "of nothing here": ("x",)})
    labelled = {each["for"] for each in page.of("label") if "for" in each}
    assert labelled == {each["id"] for each in page.of("select")}
    assert [each["value"] for each in page.of("input")] == list(MODELS)
    assert len(page.of("fieldset")) == len(page.of("legend")) == 2
    values = [each["value"] for each in page.of("option")]
    assert values == ["0", "1", "2", "", "base teacher"]
    assert any(each.get("aria-live") == "polite" for each in page.of("p"))


def test_shell_commands_stand_as_commands_and_other_arguments_as_json():
    shell, other = browser("bash"), browser("api")
    assert len(shell.of("pre", "shell")) == 20 and "chmod 644 trips/new-river.txt" in shell.text
    assert '"command"' not in shell.text
    long = fake_episodes.CALLS["api"][1][2]
    assert json.dumps(long, indent=2) in other.text
    assert json.dumps({"path": "/exports"}) in other.text  # short ones stay on their line


def test_long_results_are_folded_and_short_ones_are_open():
    folds = browser().of("details", "turn result")
    assert sum("open" in fold for fold in folds) == len(folds) / 2  # one listing and one "ok" in each


@pytest.mark.parametrize("place", ["task_id", "prompt", "model", "tool", "content", "arguments", "name"])
def test_markup_in_what_a_model_or_a_task_says_is_text(place):
    evil = "<img src=x onerror=alert(1)>\"'"
    act = fake_episodes.episode("api", True)
    task = {"task_id": "t", "prompt": "p", "episodes": {"base": act}}
    if place in ("task_id", "prompt"):
        task[place] = evil
    elif place == "model":
        task["episodes"] = {evil: act}
    elif place == "tool":
        act["tool"] = evil
    elif place == "content":
        act["messages"][-1]["content"] = act["messages"][3]["content"] = evil
    else:
        function = act["messages"][4]["tool_calls"][0]["function"]
        function[place] = {evil: evil} if place == "arguments" else evil
    page = browser(tasks=[task])
    shown = json.dumps(evil) if place == "arguments" else evil
    assert page.of("img") == [] and shown in page.text


def test_no_episodes_are_told():
    page = browser(tasks=[])
    assert "No episodes were kept" in page.text and page.of("form") == []
