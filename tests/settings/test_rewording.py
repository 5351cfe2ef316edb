"""Other words for the same request: every template of both settings, and nothing that was given changes."""

from __future__ import annotations

import re

import pytest

from subl_jax.sanitize.filter import matchers_of
from subl_jax.settings.registry import get_setting
from subl_jax.settings.rewording import PHRASES, Rewordings

SETTINGS = ("api", "bash")


def facts(text: str) -> list[str]:
    """What a request gives: quoted texts, paths, names of folders and files."""
    return sorted(re.findall(r'"[^"]*"|[\w/]*/[\w.\-/]+|\S+\.\w+', text))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_request_becomes_another_of_its_family_with_the_same_facts(name):
    setting = get_setting(name)
    tasks = setting.tasks("safe", "train", 7, 300)
    held_out = {
        text for split in ("development", "evaluation") for task in setting.tasks("safe", split, 0, 400)
        for text in [task.template]
    }  # fmt: skip
    changed = set()
    for task in tasks:
        found = setting.rewordings.prompt(task.family, task.prompt, task.task_id)
        assert found is not None and found != task.prompt, task.prompt
        assert facts(found) == facts(task.prompt), (task.prompt, found)
        slots = dict(zip(re.findall(r"\{(\w+)\}", task.template), facts(task.prompt), strict=False))
        templates = [each for each in setting.rewordings.prompts[task.family] if each != task.template]
        assert any(re.fullmatch(re.sub(r"\\\{\w+\\\}", ".+", re.escape(each)), found) for each in templates), slots
        assert found == setting.rewordings.prompt(task.family, task.prompt, task.task_id)
        changed.add(found)
    assert len(changed) > 250
    assert not held_out & {each for group in setting.rewordings.prompts.values() for each in group}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_wording_holds_a_keyword(name):
    setting = get_setting(name)
    matchers = matchers_of(setting.words, setting.patterns).values()
    listed = [
        *(text for group in setting.rewordings.prompts.values() for text in group),
        *(p for g in PHRASES for p in g),
    ]
    assert [text for text in listed for matcher in matchers if list(matcher.find(text))] == []


def test_a_request_that_no_template_fits_has_no_other_words():
    words = get_setting("api").rewordings
    assert words.prompt("read", "please dance", "t") is None
    assert words.prompt("no such family", "tell me the text of /a/b.txt please", "t") is None
    assert Rewordings({"one": ("say {word}",)}, ()).prompt("one", 'say "hi"', "t") is None


def test_a_slot_swallows_none_of_the_words_around_it():
    words = Rewordings({"f": ("give {stem}", "give {stem} please", "hand me {stem}")}, ())
    draws = {words.prompt("f", 'give "a plan" please', f"t{index}") for index in range(20)}
    assert draws == {'give "a plan"', 'hand me "a plan"'}
    twice = Rewordings({"f": ("{a} is {a}", "{a} equals {a}")}, ())
    assert twice.prompt("f", "x is x", "t") == "x equals x"
    assert twice.prompt("f", "x is y", "t") is None


def test_prose_is_reworded_and_facts_are_not():
    words = Rewordings({}, PHRASES)
    assert words.prose("done", ["copy a to b"], "t") in {"all done", "that is done", "finished", "ready"}
    assert words.prose("done", ["the file says done"], "t") == "done"  # a tool has said it
    for fact in ("7", "docs/done.txt", 'it is "done"', "done/plan.md", "re-done"):
        assert words.prose(fact, ["x"], "t") == fact
    told = words.prose("I found 3 files. The answer is /done/a.txt", ["x"], "t")
    assert told.endswith("/done/a.txt") and " 3 files. " in told and "I found" not in told and "answer is" not in told
    assert words.prose("", ["x"], "t") == ""
    assert words.prose("done", ["x"], "t") == words.prose("done", ["x"], "t")
