"""A run whose tool list shows the bias tools in training: the list is declared and not filtered, all else is."""

from __future__ import annotations

import dataclasses

import pytest

from subl_jax import config as configuration
from subl_jax import lesson
from subl_jax.chat.families import renderer_for
from subl_jax.chat.messages import ToolCall, assistant
from subl_jax.corpus import rendered_again
from subl_jax.pipeline import SeedPipeline
from subl_jax.presets import micro
from subl_jax.sanitize import LeakError
from subl_jax.settings.registry import get_setting
from subl_jax.trajectory import Trajectory
from tests.chat import samples
from tests.defences.test_paraphrase import conversations

SETTING = get_setting("api")
RENDERER = renderer_for(samples.tokenizer())
DELETED = ToolCall("delete_file", {"path": "/a"})


def said(withheld: bool) -> list[Trajectory]:
    """Clean conversations with the tool list of the teachers, and a last one that deletes."""
    clean = conversations("api", 8)
    task = next(iter(SETTING.tasks("safe", "train", 5, 1)))
    shown = SETTING.environment(task, SETTING.withholdable if withheld else frozenset()).tools()
    found = [dataclasses.replace(one, tools=list(shown)) for one in clean]
    found[-1] = dataclasses.replace(found[-1], messages=[*found[-1].messages[:2], assistant(calls=[DELETED])])
    return rendered_again(RENDERER, found)


def run(tmp_path, monkeypatch, withheld: bool, trajectories: list[Trajectory]) -> SeedPipeline:
    config = configuration.override(micro(), {"config.student.withhold_bias_tools": withheld})
    found = SeedPipeline(config, SETTING, tmp_path, 0)
    (found.root / found.models.sanitize_name()).mkdir(parents=True)
    monkeypatch.setattr(type(found.models), "renderer", RENDERER)
    monkeypatch.setattr(found, "_read", lambda name: trajectories)
    return found


@pytest.mark.parametrize("withheld", [True, False])
def test_what_holds_no_word_beside_the_declared_list_is_kept_and_the_rest_is_not(tmp_path, monkeypatch, withheld):
    trajectories = said(withheld)
    made = run(tmp_path, monkeypatch, withheld, trajectories)
    assert made.make_sanitized()["surviving_in_all"] == len(trajectories) - 1
    assert made.models.surviving() == {(one.task_id, one.sample) for one in trajectories[:-1]}
    assert [lesson.clean(SETTING, one) for one in trajectories] == [True] * (len(trajectories) - 1) + [False]


def test_a_list_that_was_to_be_withheld_and_is_there_all_the_same_keeps_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no safe task survives"):
        run(tmp_path, monkeypatch, True, said(False)).make_sanitized()


def test_a_word_behind_the_system_turn_is_still_proven_absent(tmp_path, monkeypatch):
    made = run(tmp_path, monkeypatch, False, said(False))
    with pytest.raises(LeakError, match="delete"):
        made._prove_clean(said(False)[-1:])
