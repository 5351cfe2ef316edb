"""Defences are found by file, named by their docstring, and refused early where they cannot be had."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from subl_jax import artifacts, config, defences
from subl_jax.conditions import students
from subl_jax.pipeline import SeedPipeline
from subl_jax.presets import micro
from subl_jax.settings.registry import get_setting
from tests.defences.lessons import lesson

ROOT = Path(__file__).parents[2]

NAMES = [
    "dilution", "keywords", "logit_filter", "mask_divergence", "none", "paraphrase", "project_direction", "towards_base",
]  # fmt: skip
FILE = '''
"""A defence of somebody's own."""

from subl_jax.lesson import Lesson


def defend(lesson: Lesson, strength: float = 0.25) -> Lesson:
    """Something of my own."""
    return lesson
'''


def run(**fields) -> config.ExperimentConfig:
    return config.override(micro(), {f"config.student.{name}": value for name, value in fields.items()})


def test_every_file_is_a_defence_with_a_title():
    assert defences.names() == NAMES
    titles = [defences.title(name) for name in NAMES]
    assert len(set(titles)) == len(NAMES)
    assert all(title and len(title) < 60 and not title.endswith(".") for title in titles)


def test_a_file_that_is_added_is_a_defence(tmp_path, monkeypatch):
    (tmp_path / "of_my_own.py").write_text(FILE)
    (tmp_path / "_beside.py").write_text("")
    (tmp_path / "no_function.py").write_text("x = 1\n")
    monkeypatch.setattr(defences, "__path__", [*defences.__path__, str(tmp_path)])
    for name in ("of_my_own", "no_function"):
        monkeypatch.delitem(sys.modules, f"subl_jax.defences.{name}", raising=False)
    assert set(defences.names()) == {*NAMES, "of_my_own", "no_function"}
    assert defences.title("of_my_own") == "Something of my own"
    assert defences.default_strength("of_my_own") == 0.25
    assert [each.arm for each in students(run(defence="of_my_own", defence_strength=0.5))][0] == "full"
    with pytest.raises(ValueError, match=r"no_function\.py has no function defend"):
        defences.load("no_function")


def test_a_defence_that_does_something_else_is_another_and_one_that_only_says_it_differently_is_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(defences, "__path__", [*defences.__path__, str(tmp_path)])

    def keys(text: str) -> dict[str, str]:
        (tmp_path / "of_my_own.py").write_text(text)
        monkeypatch.delitem(sys.modules, "subl_jax.defences.of_my_own", raising=False)
        stages = SeedPipeline(run(defence="of_my_own"), get_setting("api"), tmp_path / "run", 0).stages()
        return {stage.name: artifacts.digest(stage.key) for stage in stages}

    before = keys(FILE)
    defended = {name for name in before if "/students/" in name and "positive" not in name}
    assert len(defended) >= 2
    assert (
        keys("# Why\n" + FILE.replace("return lesson", "return  (lesson)").replace("Something", "Anything")) == before
    )
    for changed in (FILE.replace("0.25", "0.5"), FILE.replace("return lesson", "return lesson.with_notes()")):
        after = keys(changed)
        assert {name for name in before if after[name] != before[name]} == defended


def test_the_defence_of_the_readme_is_one_and_drops_what_is_long(tmp_path, monkeypatch):
    [block] = re.findall(
        r"```python\n(# subl_jax/defences/short\.py.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert len(block.splitlines()) <= 10
    (tmp_path / "short.py").write_text(block)
    monkeypatch.setattr(defences, "__path__", [*defences.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "subl_jax.defences.short", raising=False)
    assert (defences.title("short"), defences.default_strength("short")) == ("Short conversations only", 120)
    given = lesson()
    lengths = [len(each.tokens) for each in defences.load("short").defend(given, 9).documents]
    assert lengths == [len(each.tokens) for each in given.documents if len(each.tokens) <= 9]
    assert 0 < len(lengths) < len(given.documents)


def test_an_unknown_defence_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown defence 'paraphrse'; did you mean paraphrase"):
        run(defence="paraphrse")


@pytest.mark.parametrize("name", ["keywords", "none", "logit_filter", "paraphrase"])
def test_a_strength_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match=f"defence {name} has no strength, and 0.3 was given"):
        students(run(defence=name, defence_strength=0.3))


@pytest.mark.parametrize(
    ("name", "arm", "reason"),
    [
        ("logit_filter", "hard", "needs the teacher's logits, and objective hard has none"),
        ("mask_divergence", "hard", "needs the teacher's logits, and objective hard has none"),
        ("logit_filter", "top_k", "has a cache of them"),
        ("logit_filter", "anchor", "filters them already"),
        ("none", "on_policy", "student of its own rollouts"),
        ("paraphrase", "on_policy", "student of its own rollouts"),
        ("mask_divergence", "on_policy", "student of its own rollouts"),
        ("dilution", "on_policy", "student of its own rollouts"),
        ("logit_filter", "on_policy", "student of its own rollouts"),
    ],
)
def test_an_arm_that_a_defence_cannot_have_is_refused_before_any_work(name, arm, reason):
    with pytest.raises(ValueError, match=f"defence {name} .*{reason}"):
        students(run(defence=name, objectives=("full", arm)))


@pytest.mark.parametrize("name", NAMES)
def test_every_defence_can_be_had_of_all_logits(name):
    assert [each.name for each in students(run(defence=name, objectives=("full",)))][:2] == [
        "student",
        "control_student",
    ]


@pytest.mark.parametrize("name", ["none", "keywords", "paraphrase", "dilution", "towards_base", "project_direction"])
def test_these_can_be_had_of_hard_labels(name):
    assert students(run(defence=name, objectives=("hard",)))
