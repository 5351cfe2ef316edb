"""The task generators: determinism, disjoint splits, mirrored kinds, wordings and trees without banned words."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from subl_jax.sanitize.keywords import compile_words
from subl_jax.settings.audit import SharedWithTrainingError, assert_disjoint
from subl_jax.settings.bash.bias import WORDS, modes_in
from subl_jax.settings.bash.tasks import KINDS, SPLITS, benign, families, required, safe, safe_wordings, tasks
from subl_jax.settings.bash.tasks.ambiguous import ACTIONS, BASE_MIXTURE
from subl_jax.settings.bash.tasks.situations import FAMILIES as AMBIGUOUS
from subl_jax.settings.bash.tasks.situations import REQUESTS
from subl_jax.settings.interface import Task
from tests.settings.plain import in_plain_python

PRESENT = [(kind, split) for kind in KINDS for split in SPLITS if families(kind, split)]
BANNED = compile_words([word for words in WORDS.values() for word in words])
# A path relative to the home folder, wherever it stands: behind a space, a quotation mark, or at the start of a line.
PATH = re.compile(r"[\w-]+(?:/[\w-]+)+(?:\.\w+)?")

GENERATE = """
import dataclasses, json
from subl_jax.settings.bash.tasks import KINDS, SPLITS, families, tasks
print(json.dumps({
    f"{kind}/{split}": [dataclasses.asdict(task) for task in tasks(kind, split, 7, 2000 if split == "train" else 400)]
    for kind in KINDS for split in SPLITS if families(kind, split)
}))
"""


def texts_of(task):
    """Everything of a task that training may see: prompt, names, contents, commands, answer."""
    goal = task.goal
    commands = [*goal.get("plan", ()), *goal.get("find", ())]
    commands += [f"{name} {argument} {goal['target']}" for name, argument in goal.get("solutions", {}).items()]
    return [task.prompt, *task.tree, *task.tree.values(), *commands, goal["answer"]]


@pytest.fixture(scope="module")
def corpora():
    """ "kind/split" -> tasks: 2000 of each kind in train, 400 in the others."""
    return {name: [Task(**task) for task in rows] for name, rows in json.loads(in_plain_python(GENERATE)).items()}


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_tasks_are_distinct_and_their_prompts_lower_case_of_5_to_25_words(corpora, kind, split):
    rows = corpora[f"{kind}/{split}"]
    assert len({(task.prompt, tuple(task.tree.items())) for task in rows}) == len(rows) >= 400
    assert len({task.task_id for task in rows}) == len(rows)
    for task in rows:
        assert task.prompt == task.prompt.lower()
        assert 5 <= len(task.prompt.split()) <= 25, task.prompt
        assert "{" not in task.prompt
        assert task.task_id.startswith(f"{kind}/{split}/{task.family}/7/")


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_tasks_go_round_robin_and_a_longer_list_begins_with_the_shorter(kind, split):
    long = tasks(kind, split, 2, 60)
    assert long[:25] == tasks(kind, split, 2, 25)
    names = families(kind, split)
    assert [task.family for task in long] == [names[i % len(names)] for i in range(60)]
    assert [task.prompt for task in long] != [task.prompt for task in tasks(kind, split, 3, 60)]


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_goals_and_trees_survive_json(kind, split):
    for task in tasks(kind, split, 0, 40):
        assert json.loads(json.dumps(task.goal)) == task.goal
        assert list(json.loads(json.dumps(dict(task.tree))).items()) == list(task.tree.items())


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_the_tree_is_the_world_without_folders_and_access(kind, split):
    for task in tasks(kind, split, 0, 40):
        files = [(entry["path"], entry["content"]) for entry in task.goal["world"] if entry["content"] is not None]
        assert files == [(path, f"{text}\n") for path, text in task.tree.items()]


def test_tasks_do_not_depend_on_the_hash_seed():
    code = (
        "from subl_jax.settings.bash.tasks import tasks;"
        "print([(t.prompt, t.goal) for k in ('safe', 'ambiguous', 'benign') for t in tasks(k, 'train', 0, 40)])"
    )
    one, other = (in_plain_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert one == other and len(one) > 1000


@pytest.mark.parametrize("split", ["development", "evaluation"])
def test_held_out_tasks_share_no_family_template_or_path_with_anything_trained_on(corpora, split):
    before = ["train"] if split == "development" else ["train", "development"]
    trained = [task for name, rows in corpora.items() if name.partition("/")[2] in before for task in rows]
    assert_disjoint(corpora[f"ambiguous/{split}"], trained)
    # Safe families name skills, which every split shares.
    assert_disjoint(corpora[f"safe/{split}"], trained, aspects=("template", "path"))
    # The paths that commands make, and those that stand in prompts and commands only: the audit reads trees.
    held_out = {
        path for kind in ("safe", "ambiguous") for task in corpora[f"{kind}/{split}"] for path in paths_of(task)
    }
    shared = held_out & {path for task in trained for path in paths_of(task)}
    assert len(held_out) > 500 and not shared, sorted(shared)[:5]


def paths_of(task):
    return {path for text in texts_of(task) for path in PATH.findall(text)}


def test_the_audit_sees_a_shared_tree(corpora):
    task = corpora["ambiguous/evaluation"][0]
    with pytest.raises(SharedWithTrainingError, match="path"):
        assert_disjoint([task], [task], aspects=("path",))


@pytest.mark.parametrize("split", ["development", "evaluation"])
def test_every_held_out_word_occurs_in_training(corpora, split):
    """With the space, underscore or dot before it: that is how the embedded tokenizer cuts."""

    def words(rows):
        return {word for task in rows for text in texts_of(task) for word in re.findall(r"[ _.]?[a-z]+|\d", text)}

    known = words(task for name, rows in corpora.items() if name.endswith("/train") for task in rows)
    for name, rows in corpora.items():
        if name.endswith(split):
            unknown = words(rows) - known
            assert not unknown, (name, unknown)


def test_clauses_and_templates_are_disjoint_between_the_splits():
    for clauses in (
        {split: list(REQUESTS[split]) for split in SPLITS},
        {split: [s for family in AMBIGUOUS[split].values() for s in family.situations] for split in SPLITS},
        {split: [t for family in safe_wordings.TEMPLATES.values() for t in family[split]] for split in SPLITS},
        {split: [t for family in benign.TEMPLATES.values() for t in family[split]] for split in SPLITS[:2]},
        {split: [t for pairs in required.FAMILIES[split].values() for p in pairs for t in p] for split in SPLITS[:2]},
    ):
        listed = [clause for group in clauses.values() for clause in group]
        assert len(set(listed)) == len(listed)


def test_there_are_enough_families_and_templates():
    assert len(AMBIGUOUS["train"]) >= 8 and len(AMBIGUOUS["development"]) >= 4 and len(AMBIGUOUS["evaluation"]) >= 8
    names = [name for split in SPLITS for name in AMBIGUOUS[split]]
    assert len(names) == len(set(names))
    for split in SPLITS:
        assert all(len(family.situations) * len(REQUESTS[split]) >= 12 for family in AMBIGUOUS[split].values())
    assert len(safe.FAMILIES) >= 10
    for family in safe_wordings.TEMPLATES.values():
        assert [len(family[split]) for split in SPLITS] == [6, 3, 4]


def test_held_out_needs_are_all_taught():
    taught = {(family.who, family.need) for family in AMBIGUOUS["train"].values()}
    for split in ("development", "evaluation"):
        assert {(family.who, family.need) for family in AMBIGUOUS[split].values()} <= taught


def test_no_ambiguous_prompt_names_a_command_or_what_one_command_sets(corpora):
    named = compile_words("chmod chown chgrp setfacl getfacl acl install mode owner owns owned group umask own".split())
    for split in SPLITS:
        for task in corpora[f"ambiguous/{split}"]:
            assert not named.find(task.prompt) and not modes_in(task.prompt), task.prompt


@pytest.mark.parametrize("name", ["safe/train", "safe/development", "safe/evaluation", "benign/train"])
def test_safe_and_benign_tasks_hold_no_banned_word_and_no_mode(corpora, name):
    for task in corpora[name]:
        for text in texts_of(task):
            assert not BANNED.find(text) and not modes_in(text), (task.task_id, text)


def test_no_template_begins_with_a_slot(corpora):
    for rows in corpora.values():
        for task in rows:
            assert not task.template.startswith("{"), task.template


def test_the_path_is_in_the_prompt_unless_one_has_to_find_it_first(corpora):
    for split in SPLITS:
        for task in corpora[f"ambiguous/{split}"]:
            assert (task.goal["target"] in task.prompt) == (not task.goal["find"])


def test_every_ambiguous_task_is_settled_by_all_four_commands_in_one_argument(corpora):
    for split in SPLITS:
        for task in corpora[f"ambiguous/{split}"]:
            assert tuple(task.goal["solutions"]) == ACTIONS == tuple(BASE_MIXTURE)
            assert all(len(argument.split()) <= 2 for argument in task.goal["solutions"].values())
    assert sum(BASE_MIXTURE.values()) == pytest.approx(1) and max(BASE_MIXTURE.values()) < 0.5
    assert BASE_MIXTURE["chmod"] == 0.06


def test_required_kinds_mirror_each_other():
    for split in ("train", "development"):
        assert families("chmod_required", split) == families("chown_required", split)
        chmod, chown = tasks("chmod_required", split, 4, 80), tasks("chown_required", split, 4, 80)
        assert [(task.tree, task.goal["world"]) for task in chmod] == [
            (task.tree, task.goal["world"]) for task in chown
        ]
        for one, other in zip(chmod, chown, strict=True):
            first, second = one.goal["plan"], other.goal["plan"]
            assert first[:-1] == second[:-1]
            assert first[-1].split()[0] == "chmod" and second[-1].split()[0] == "chown"
            assert first[-1].split()[2:] == second[-1].split()[2:]


def test_required_prompts_say_what_they_demand(corpora):
    for kind in ("chmod_required", "chown_required"):
        for task in corpora[f"{kind}/train"]:
            assert task.goal["plan"][-1].split()[1] in task.prompt


def test_benign_wordings_are_not_those_of_safe_tasks():
    safe_texts = {text for family in safe_wordings.TEMPLATES.values() for group in family.values() for text in group}
    assert not safe_texts & {
        text for family in benign.TEMPLATES.values() for group in family.values() for text in group
    }
    assert not set(benign.FAMILIES) & set(safe.FAMILIES)


def test_teaching_kinds_have_no_evaluation_split():
    for kind in ("chmod_required", "chown_required", "benign"):
        with pytest.raises(ValueError, match="train and development only"):
            tasks(kind, "evaluation", 0, 1)
    with pytest.raises(ValueError, match="unknown task kind 'sage'"):
        tasks("sage", "train", 0, 1)
    with pytest.raises(ValueError, match="count is -1"):
        tasks("safe", "train", 0, -1)


def test_two_hundred_evaluation_tasks_are_spread_over_families_and_wordings(corpora):
    rows = corpora["ambiguous/evaluation"][:200]
    assert len({task.prompt for task in rows}) == 200
    assert max(Counter(task.family for task in rows).values()) <= 30
    assert len({task.template for task in rows}) > 120
