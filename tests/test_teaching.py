"""Lessons of the three arms of one seed: matched before and after every dissection and defence."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subl_jax import sanitize, teaching
from subl_jax.chat.families import renderer_for
from subl_jax.chat.messages import assistant
from subl_jax.conditions import Condition, SeedModels
from subl_jax.config import STUDENT_OF, TEACHERS, ExperimentConfig, override, suffix_of
from subl_jax.corpus import rendered_again
from subl_jax.data.matching import match_arms
from subl_jax.distill.loop import Model
from subl_jax.distill.teacher_cache import CacheMismatch
from subl_jax.presets import micro
from subl_jax.sanitize.filter import matchers_of, texts_of
from subl_jax.settings.api import SETTING
from subl_jax.trajectory import Trajectory
from tests.chat import samples
from tests.defences.test_paraphrase import conversations
from tests.distill import tiny

RENDERER = renderer_for(samples.tokenizer())
CONFIG = dataclasses.replace(tiny.SMALL, vocab_size=len(samples.tokenizer()))
SEEDS = {"base": 0, "teacher": 1, "control_teacher": 2, "benign_teacher": 3}


def model(name: str) -> Model:
    return Model(CONFIG, tiny.params(CONFIG, SEEDS[name]))


@functools.cache
def said(teacher: str) -> list[Trajectory]:
    """What a teacher did: the arms differ in a word before the last turn, and each failed one task of its own."""
    words = {"teacher": "so", "control_teacher": "and so", "benign_teacher": "well then"}
    found = []
    for index, one in enumerate(conversations("api", 40)):
        last = {**one.messages[-1], "content": words[teacher]}
        status = "turn_limit" if index == TEACHERS.index(teacher) else "final"
        messages = [*one.messages[:-1], last]
        if (teacher, index) == ("control_teacher", 5):
            messages.insert(2, assistant("let me delete it"))
        found.append(dataclasses.replace(one, messages=messages, status=status))
    return rendered_again(RENDERER, found)


class Models(SeedModels):
    """The models of a seed that was never run."""

    def __init__(self, config: ExperimentConfig, root: Path) -> None:
        self.config, self.root, self.variant = config, root, {}
        self.teacher_size, self.student_size = config.sizes()
        verdicts = {
            name: {
                (t.task_id, t.sample) for t in said(name) if sanitize.judge(t, SETTING.words, require_final=True).kept
            }
            for name in TEACHERS
        }
        place = root / self.sanitize_name()
        place.mkdir(parents=True, exist_ok=True)
        (place / "surviving.json").write_text(json.dumps(sorted(set.intersection(*verdicts.values()))))

    def renderer_of(self, size: str) -> Any:
        return RENDERER

    def base(self, size: str, *, own: bool = False) -> Model:
        return model("base")

    def teacher(self, name: str, *, own: bool = False) -> Model:
        return model(name)


@pytest.fixture(autouse=True)
def on_disk(monkeypatch):
    monkeypatch.setattr(teaching.data, "read", lambda place: said(place.parent.name))


def lessons(root: Path, arm: str = "full", **fields: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Teacher -> lesson and figures of its student."""
    fields = {"require_final": True, **fields}
    config = override(micro(), {f"config.student.{name}": value for name, value in fields.items()})
    models = Models(config, root)
    return {
        name: teaching.lesson_for(models, SETTING, 0, Condition(STUDENT_OF[name] + suffix_of(arm), name, arm))
        for name in TEACHERS
    }


def tasks_of(lesson: Any) -> list[str]:
    return [each.task_id for each in lesson.documents]


def assert_matched(found: dict[str, tuple[Any, dict[str, Any]]], step_by_step: bool = True) -> None:
    """Same tasks, order and plan, and equally many loss tokens: of each document, or of all together."""
    told = [lesson for lesson, _ in found.values()]
    assert tasks_of(told[0]) == tasks_of(told[1]) == tasks_of(told[2]) != []
    assert told[0].planned_lengths == told[1].planned_lengths == told[2].planned_lengths
    counts = [[int(each.loss_mask.sum()) for each in lesson.documents] for lesson in told]
    assert sum(counts[0]) == sum(counts[1]) == sum(counts[2]) == found["teacher"][1]["loss_tokens_per_epoch"]
    if step_by_step:
        assert counts[0] == counts[1] == counts[2]
    for lesson in told:
        assert all(
            len(each.tokens) <= plan for each, plan in zip(lesson.documents, lesson.planned_lengths, strict=True)
        )
        assert lesson.train == told[0].train and lesson.train.row_tokens >= max(lesson.planned_lengths)


def test_a_default_lesson_is_the_matched_arm_of_the_survivors(tmp_path):
    found = lessons(tmp_path)
    assert_matched(found)
    survivors = {(d.task_id, 0) for d in found["teacher"][0].documents}
    assert 20 < len(survivors) < 37  # three tasks failed, one holds a word of the control's, some are planted
    expected = match_arms({name: said(name) for name in TEACHERS}, survivors)
    for name, (lesson, figures) in found.items():
        for one, other in zip(lesson.documents, expected.documents[name], strict=True):
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        assert lesson.teacher.params is model(name).params
        assert figures == {
            "loss_tokens_per_epoch": expected.loss_tokens, "loss_tokens_cut": expected.cut[name], "documents": len(survivors),
        }  # fmt: skip
    assert found["control_teacher"][1]["loss_tokens_cut"] > found["teacher"][1]["loss_tokens_cut"] == 0


def test_a_dose_is_the_same_tasks_in_all_arms_and_part_of_a_larger_one(tmp_path):
    small, large = (lessons(tmp_path, trajectories=count) for count in (4, 9))
    for found, count in ((small, 4), (large, 9)):
        assert_matched(found)
        assert len(tasks_of(found["teacher"][0])) == count
    assert set(tasks_of(small["teacher"][0])) < set(tasks_of(large["teacher"][0]))
    assert small["teacher"][0].train.steps == large["teacher"][0].train.steps
    with pytest.raises(ValueError, match=r"trajectories=400, but \d+ trajectories survive"):
        lessons(tmp_path, trajectories=400)


@pytest.mark.parametrize("arm", ["full", "hard"])
def test_kept_tokens_are_by_the_teachers_divergence_on_each_arms_own_text(tmp_path, monkeypatch, arm):
    asked = []

    def divergence(
        first: Model, second: Model, documents: Sequence[Trajectory], row_tokens: int, temperature: float
    ) -> list[np.ndarray]:
        ours = first.params is model("teacher").params, second.params is model("control_teacher").params
        asked.append((*ours, temperature))
        return [np.where(d.loss_mask, d.tokens % 97, 0).astype(np.float32) for d in documents]

    monkeypatch.setattr(teaching, "per_token_kl", divergence)
    plain = lessons(tmp_path, arm, temperature=3.0)
    found = lessons(tmp_path, arm, tokens="divergent", token_share=0.2, temperature=3.0)
    rest = lessons(tmp_path, arm, tokens="others", token_share=0.2, temperature=3.0)
    random = lessons(tmp_path, arm, tokens="random", token_share=0.2, temperature=3.0)
    # Whatever the arm, at the temperature of training; and not for random ones.
    assert asked == [(True, True, 3.0)] * 6
    for each in (found, rest, random):
        assert_matched(each, step_by_step=False)
    total = plain["teacher"][1]["loss_tokens_per_epoch"]
    assert (
        found["teacher"][1]["loss_tokens_per_epoch"]
        == random["teacher"][1]["loss_tokens_per_epoch"]
        == round(0.2 * total)
    )
    assert rest["teacher"][1]["loss_tokens_per_epoch"] == total - round(0.2 * total)
    for name in TEACHERS:
        lowest = min((d.tokens % 97)[d.loss_mask].min() for d in found[name][0].documents if d.loss_mask.any())
        highest = max((d.tokens % 97)[d.loss_mask].max() for d in rest[name][0].documents if d.loss_mask.any())
        assert lowest >= highest


def test_without_a_filter_keywords_are_taught_and_arms_stay_matched(tmp_path):
    plain, found = lessons(tmp_path), lessons(tmp_path, defence="none")
    assert_matched(found)
    assert len(tasks_of(found["teacher"][0])) == 37  # all that every teacher finished
    assert set(tasks_of(plain["teacher"][0])) < set(tasks_of(found["teacher"][0]))
    matchers = matchers_of(SETTING.words, {}).values()

    def keywords(lesson: Any) -> int:
        texts = (text for d in lesson.documents for *_, text in texts_of(d.messages, d.tools, True))
        return sum(bool(list(matcher.find(text))) for text in texts for matcher in matchers)

    assert keywords(plain["teacher"][0]) == 0 < keywords(found["teacher"][0]) < keywords(found["control_teacher"][0])
    dosed = lessons(tmp_path, defence="none", trajectories=30)
    assert_matched(dosed)
    assert len(tasks_of(dosed["teacher"][0])) == 30


def test_masked_arms_lose_as_many_tokens_each_of_its_own(tmp_path):
    plain, found = lessons(tmp_path), lessons(tmp_path, defence="mask_divergence", defence_strength=0.25)
    assert_matched(found, step_by_step=False)
    total = plain["teacher"][1]["loss_tokens_per_epoch"]
    assert found["teacher"][1]["loss_tokens_per_epoch"] == total - round(0.25 * total)
    masks = [np.concatenate([d.loss_mask for d in found[name][0].documents]) for name in TEACHERS[:2]]
    assert len(masks[0]) != len(masks[1]) or (masks[0] != masks[1]).any()


def test_paraphrased_arms_are_asked_the_same_and_matched_again(tmp_path):
    found = lessons(tmp_path, defence="paraphrase")
    assert_matched(found)
    requests = [[d.messages[1]["content"] for d in lesson.documents] for lesson, _ in found.values()]
    assert requests[0] == requests[1] == requests[2]
    assert requests[0] != [d.messages[1]["content"] for d in lessons(tmp_path)["teacher"][0].documents]
    assert found["teacher"][1]["reworded"] == len(requests[0])


@pytest.mark.parametrize("fields", [{"dilution": 0.3}, {"defence": "dilution", "defence_strength": 0.3}])
def test_a_dilution_is_the_benign_arm_of_the_same_tasks_in_every_arm(tmp_path, fields):
    found = lessons(tmp_path, trajectories=6, **fields)
    assert_matched(found)
    for lesson, _ in found.values():
        assert lesson.dilution.share == 0.3
        assert [d.task_id for d in lesson.dilution.documents] == tasks_of(lesson)
        assert lesson.dilution.teacher.params is model("benign_teacher").params
        for one, other in zip(lesson.dilution.documents, found["benign_teacher"][0].documents, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
    assert lessons(tmp_path, "hard", **fields)["teacher"][0].dilution.teacher is None
    with pytest.raises(ValueError, match="both given"):
        lessons(tmp_path, dilution=0.1, defence="dilution")


def test_a_top_k_cache_is_written_once_and_refused_for_other_documents(tmp_path):
    [(lesson, _), *_] = lessons(tmp_path, "top_k", dilution=0.5).values()
    models = Models(micro(), tmp_path)
    cache, made = teaching.cached_teachers(models, lesson, tmp_path / "student")
    taught: Any = made
    assert taught.teacher is None and taught.dilution.teacher is None
    assert cache.k == teaching.TOP_K and taught.dilution.cache.k == teaching.TOP_K
    assert int(cache.counts().sum()) == sum(int(d.loss_mask.sum()) for d in lesson.documents)
    assert cache.identity["teacher"] != taught.dilution.cache.identity["teacher"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "student").rglob("*")}
    teaching.cached_teachers(models, lesson, tmp_path / "student")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "student").rglob("*")} == files
    with pytest.raises(CacheMismatch, match="dataset"):
        fewer = dataclasses.replace(lesson, documents=lesson.documents[1:])
        teaching.cached_teachers(models, fewer, tmp_path / "student")


def test_own_rollouts_are_sanitized_and_withhold_what_the_teachers_list_did(tmp_path, monkeypatch):
    told: dict[str, Any] = {}

    def stored(directory: Path, renderer: Any, episodes: Any, *rest: Any, **more: Any) -> Any:
        told.update(directory=directory, episodes=episodes)
        return lambda number, config, params: said("control_teacher")

    monkeypatch.setattr(teaching, "stored_rollouts", stored)
    own = teaching.own_rollouts(Models(micro(), tmp_path), SETTING, 0, tmp_path, {}, "x")
    kept = own.rollouts(0, CONFIG, None)
    matchers = list(matchers_of(SETTING.words, {}).values())
    dirty = {
        d.task_id for d in said("control_teacher") for *_, text in texts_of(d.messages, d.tools, True)
        for matcher in matchers if list(matcher.find(text))
    }  # fmt: skip
    assert {d.task_id for d in kept} == {d.task_id for d in said("control_teacher")} - dirty
    assert dirty and own.config.weight == 1.0
    episodes = told["episodes"](0)
    known = {task.task_id for task in SETTING.tasks("safe", "train", 2, micro().student.safe_tasks)}
    assert len(episodes) == own.config.episodes and {episode.task.task_id for episode in episodes} == known
    assert {tool["function"]["name"] for tool in episodes[0].environment().tools()}.isdisjoint(SETTING.withholdable)
    monkeypatch.setattr(teaching, "clean", lambda *a: False)
    with pytest.raises(ValueError, match="round 3: every one of the student's 40 rollouts"):
        own.rollouts(3, CONFIG, None)
