"""The near-duplicate audit, against a brute-force oracle, and the disjointness check."""

from __future__ import annotations

import dataclasses

import pytest

from subl_jax.settings.api import SETTING
from subl_jax.settings.audit import SharedWithTrainingError, assert_disjoint, near_duplicates, shingles
from subl_jax.settings.interface import Task
from tests.settings.plain import in_plain_python


def task(prompt, task_id="e", family="f", template="t", tree=()):
    return Task(task_id, "ambiguous", family, template, "evaluation", prompt, dict.fromkeys(tree, ""), {})


def brute_force(prompt, texts):
    """The greatest Jaccard similarity, by definition."""

    def grams(text):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    return max(len(grams(prompt) & grams(text)) / len(grams(prompt) | grams(text)) for text in texts)


def test_similarities_equal_those_of_brute_force():
    texts = [t.prompt for t in SETTING.tasks("ambiguous", "train", 0, 300)]
    tasks = SETTING.tasks("ambiguous", "evaluation", 0, 40)
    rows = near_duplicates(tasks, texts, top=40)
    assert len(rows) == 40
    prompts = {t.task_id: t.prompt for t in tasks}
    for row in rows:
        assert row.similarity == pytest.approx(brute_force(prompts[row.evaluation_id], texts))
        assert row.similarity == pytest.approx(brute_force(prompts[row.evaluation_id], [row.training_text]))
    assert [row.similarity for row in rows] == sorted((row.similarity for row in rows), reverse=True)


def test_an_equal_text_has_similarity_one_and_comes_first():
    rows = near_duplicates([task("a b c d"), task("the file is old now", "x")], ["p q r s", "the file is old now"], 1)
    assert rows == [("x", "the file is old now", 1.0)]


def test_punctuation_and_case_do_not_hide_a_duplicate():
    assert shingles("The /work/blue_plan.txt, please") == shingles("the work blue plan txt please")


def test_an_audit_against_nothing_is_an_error():
    with pytest.raises(ValueError, match="no training text"):
        near_duplicates([task("a b c")], [])


def test_two_hundred_prompts_against_ten_thousand_texts_are_fast_and_far_apart():
    code = """
import time
from subl_jax.settings.api import SETTING
from subl_jax.settings.audit import near_duplicates
texts = [t.prompt for kind in ("ambiguous", "safe") for t in SETTING.tasks(kind, "train", 0, 5000)]
tasks = SETTING.tasks("ambiguous", "evaluation", 0, 210)
start = time.process_time()
rows = near_duplicates(tasks, texts)
print(time.process_time() - start, rows[0].similarity)
"""
    seconds, similarity = map(float, in_plain_python(code).split())
    assert seconds < 4
    assert similarity < 0.5


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"family": "f"}, "family 'f'"),
        ({"template": "t"}, "template 't'"),
        ({"tree": {"/a/b.txt": ""}}, "path '/a/b.txt'"),
        ({"prompt": "see /a/b.txt."}, "path '/a/b.txt'"),
    ],
)
def test_what_is_shared_is_refused_by_name(change, what):
    evaluation = [task("see it", "eval-7", tree=["/a/b.txt"])]
    other = dataclasses.replace(task("other", "train-3", "g", "u", ["/a/c.txt"]), split="train")
    assert_disjoint(evaluation, [other])
    with pytest.raises(SharedWithTrainingError) as raised:
        assert_disjoint(evaluation, [dataclasses.replace(other, **change)])
    assert what in str(raised.value) and "eval-7" in str(raised.value) and "train-3" in str(raised.value)


def test_an_evaluation_path_in_a_training_text_is_refused():
    with pytest.raises(SharedWithTrainingError, match="training text"):
        assert_disjoint([task("x", tree=["/a/b.txt"])], [], ['{"to": "/a/b.txt"}'])
    assert_disjoint([task("x", tree=["/a/b.txt"])], [], ['{"to": "/a/b.txt.bak /z/a/b.txt"}'])


def test_a_relative_evaluation_path_in_a_training_text_is_refused():
    with pytest.raises(SharedWithTrainingError, match="training text"):
        assert_disjoint([task("x", tree=["a/b.txt"])], [], ['{"command":"cat a/b.txt"}'])
    assert_disjoint([task("x", tree=["a/b.txt"])], [], ['{"command":"cat z/a/b.txt a/b.txt.bak"}'])
