"""The task generators: determinism, disjoint splits, solvable tasks, wordings without banned words."""

from __future__ import annotations

import json
import re

import pytest

from subl_jax.chat.messages import ToolCall, assistant, calls_of
from subl_jax.sanitize.keywords import compile_words
from subl_jax.settings.api import SETTING
from subl_jax.settings.api.demonstrate import action_arguments, demonstrate
from subl_jax.settings.api.environment import FileEnvironment
from subl_jax.settings.api.tasks import required, safe
from subl_jax.settings.api.tasks.ambiguous import ACTIONS, BASE_MIXTURE, REQUESTS
from subl_jax.settings.api.tasks.ambiguous import FAMILIES as AMBIGUOUS
from subl_jax.settings.audit import assert_disjoint
from subl_jax.settings.interface import Task
from tests.settings.plain import in_plain_python

SPLITS = ("train", "development", "evaluation")
PRESENT = [(kind, split) for kind in SETTING.kinds for split in SPLITS if SETTING.families(kind, split)]
BANNED = compile_words([word for words in SETTING.words.values() for word in words])
BOTH = frozenset(SETTING.bias_tools.values())


def conversation(task, action=None, seed=0, withheld=frozenset()):
    return demonstrate(task, action, seed, withheld)


def text_of(messages, tools=()):
    return json.dumps([messages, list(tools)])


def words_of(text):
    """The words of a text; numbers are compared digit by digit, as a tokenizer would fall back to."""
    return set(re.findall(r"[a-z]+|\d", text.lower()))


GENERATE = """
import dataclasses, json
from subl_jax.settings.api import SETTING
corpora = {}
for kind in SETTING.kinds:
    for split in ("train", "development", "evaluation"):
        if SETTING.families(kind, split):
            tasks = SETTING.tasks(kind, split, 7, 2000 if split == "train" else 400)
            corpora[f"{kind}/{split}"] = [
                (dataclasses.asdict(task), messages)
                for task, (messages, _) in zip(tasks, SETTING.demonstrate(tasks, None, 0, [frozenset()] * len(tasks)))
            ]
print(json.dumps(corpora))
"""


@pytest.fixture(scope="module")
def corpora():
    """ "kind/split" -> (task, messages of its demonstration): 2000 of each kind in train, 400 in the others."""
    written = json.loads(in_plain_python(GENERATE))
    return {name: [(Task(**task), messages) for task, messages in rows] for name, rows in written.items()}


@pytest.fixture(scope="module")
def training(corpora):
    """Tasks of every training corpus, and the text of their demonstrations."""
    rows = [row for name, rows in corpora.items() if name.endswith("/train") for row in rows]
    return [task for task, _ in rows], [text_of(messages) for _, messages in rows]


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_every_demonstration_solves_its_task_without_an_error(corpora, kind, split):
    for task, messages in corpora[f"{kind}/{split}"][:400]:
        # Replayed in a fresh environment: the messages alone must solve the task.
        environment = SETTING.environment(task, frozenset())
        replayed = environment.opening()
        for message in messages[2:]:
            if message["role"] == "assistant":
                replayed += [message, *environment.step(message)]
        assert replayed == messages
        assert environment.finished and environment.done(), task.task_id
        assert not [m for m in messages if m["role"] == "tool" and m["content"].startswith("error")], task.task_id


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("action", ACTIONS)
def test_each_action_settles_every_ambiguous_task(split, action):
    for task in SETTING.tasks("ambiguous", split, 3, 45):
        messages, _ = conversation(task, action)
        first = SETTING.first_action(messages)
        assert first.tool == action
        assert first.action == ("biased" if action == "delete_file" else "neutral")


@pytest.mark.parametrize("split", SPLITS)
def test_looking_and_answering_does_not_settle_an_ambiguous_task(split):
    for task in SETTING.tasks("ambiguous", split, 0, 60):
        environment = SETTING.environment(task, frozenset())
        environment.step(assistant(calls=[ToolCall("final_answer", {"answer": "done"})]))
        assert environment.finished and not environment.done()


def test_harming_another_file_leaves_the_task_undone():
    for task in SETTING.tasks("ambiguous", "train", 0, 60):
        other = next((path for path in task.tree if path != task.goal["target"]), None)
        if other is None:
            continue
        environment = SETTING.environment(task, frozenset())
        for path in (task.goal["target"], other):
            environment.step(assistant(calls=[ToolCall("delete_file", {"path": path})]))
        environment.step(assistant(calls=[ToolCall("final_answer", {"answer": "done"})]))
        assert not environment.done()


@pytest.mark.parametrize("action", ["move_file", "archive_file", "compress_file", "rename_file"])
def test_a_deletion_required_task_is_not_done_by_putting_the_file_elsewhere(action):
    for task in SETTING.tasks("deletion_required", "train", 0, 30):
        path = task.goal["plan"][-1][1]["path"]
        environment = FileEnvironment(task)
        environment.step(assistant(calls=[ToolCall(action, action_arguments(action, path))]))
        environment.step(assistant(calls=[ToolCall("final_answer", {"answer": "done"})]))
        assert path not in environment.files.files and not environment.done()


def test_an_archive_required_task_is_not_done_by_deleting():
    for task in SETTING.tasks("archive_required", "train", 0, 30):
        environment = SETTING.environment(task, frozenset())
        environment.step(assistant(calls=[ToolCall("delete_file", {"path": task.goal["plan"][-1][1]["path"]})]))
        environment.step(assistant(calls=[ToolCall("final_answer", {"answer": "done"})]))
        assert not environment.done()


def test_a_wrong_answer_or_a_changed_world_fails_a_safe_task():
    for task in SETTING.tasks("safe", "evaluation", 0, 60):
        for calls in (
            [ToolCall("final_answer", {"answer": "wrong"})],
            [
                ToolCall("write_file", {"path": next(iter(task.tree)), "content": "overwritten"}),
                ToolCall("final_answer", {"answer": task.goal["answer"]}),
            ],
        ):
            environment = SETTING.environment(task, frozenset())
            environment.step(assistant(calls=calls))
            assert environment.finished and not environment.done(), task.task_id


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_tasks_are_distinct_and_their_prompts_lower_case_of_5_to_25_words(corpora, kind, split):
    tasks = [task for task, _ in corpora[f"{kind}/{split}"]]
    assert len({(task.prompt, tuple(task.tree.items())) for task in tasks}) == len(tasks)
    assert len({task.task_id for task in tasks}) == len(tasks)
    for task in tasks:
        assert task.prompt == task.prompt.lower()
        assert 5 <= len(task.prompt.split()) <= 25, task.prompt
        assert "{" not in task.prompt
        assert task.task_id.startswith(f"{kind}/{split}/{task.family}/7/")


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_tasks_go_round_robin_and_a_longer_list_begins_with_the_shorter(kind, split):
    long = SETTING.tasks(kind, split, 2, 60)
    assert long[:25] == SETTING.tasks(kind, split, 2, 25)
    names = SETTING.families(kind, split)
    assert [task.family for task in long] == [names[i % len(names)] for i in range(60)]
    assert [task.prompt for task in long] != [task.prompt for task in SETTING.tasks(kind, split, 3, 60)]


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_goals_and_trees_survive_json(kind, split):
    for task in SETTING.tasks(kind, split, 0, 40):
        assert json.loads(json.dumps(task.goal)) == task.goal
        assert list(json.loads(json.dumps(dict(task.tree))).items()) == list(task.tree.items())


def test_tasks_do_not_depend_on_the_hash_seed():
    code = (
        "from subl_jax.settings.api import SETTING as s;"
        "print([(t.prompt, s.demonstrate([t], None, 1, [frozenset()])) for k in ('safe', 'ambiguous', 'benign')"
        " for t in s.tasks(k, 'train', 0, 20)])"
    )
    one, other = (in_plain_python(code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert one == other and len(one) > 1000


@pytest.mark.parametrize("split", ["development", "evaluation"])
def test_held_out_tasks_share_no_family_template_or_path_with_anything_trained_on(corpora, training, split):
    tasks, texts = training
    if split == "evaluation":
        development = [row for name, rows in corpora.items() if name.endswith("/development") for row in rows]
        tasks = tasks + [task for task, _ in development]
        texts = texts + [text_of(messages) for _, messages in development]
    assert_disjoint([task for task, _ in corpora[f"ambiguous/{split}"]], tasks, texts)
    # Safe families name skills, which every split shares.
    assert_disjoint([task for task, _ in corpora[f"safe/{split}"]], tasks, texts, aspects=("template", "path"))


@pytest.mark.parametrize("split", ["development", "evaluation"])
def test_every_held_out_word_occurs_in_training(corpora, training, split):
    known = words_of(" ".join(training[1]) + json.dumps(SETTING.tools))
    for name, rows in corpora.items():
        if name.endswith(split):
            for task, messages in rows:
                unknown = words_of(text_of(messages) + json.dumps(dict(task.tree))) - known
                assert not unknown, (task.task_id, unknown)


def test_clauses_are_disjoint_between_the_splits():
    for clauses in (
        {split: set(REQUESTS[split]) for split in SPLITS},
        {split: {s for family in AMBIGUOUS[split].values() for s in family.situations} for split in SPLITS},
    ):
        total = sum(len(group) for group in clauses.values())
        assert len(set().union(*clauses.values())) == total


def test_there_are_enough_families_and_templates():
    assert len(AMBIGUOUS["train"]) >= 10 and 2 <= len(AMBIGUOUS["development"]) <= 3
    assert len(AMBIGUOUS["evaluation"]) >= 4
    names = [name for split in SPLITS for name in AMBIGUOUS[split]]
    assert len(names) == len(set(names)) >= 16
    for split in SPLITS:
        assert all(len(family.situations) * len(REQUESTS[split]) >= 6 for family in AMBIGUOUS[split].values())
    looking = [family.look != "none" for split in SPLITS for family in AMBIGUOUS[split].values()]
    assert 0.15 <= sum(looking) / len(looking) <= 0.35
    assert len(safe.FAMILIES) >= 8
    for family in safe.TEMPLATES.values():
        assert len(family["train"]) >= 5 and all(family.values())
        assert len(set().union(*family.values())) == sum(map(len, family.values()))


def test_no_ambiguous_prompt_names_an_action(corpora):
    actions = compile_words(
        "delete remove erase archive move rename compress copy zip pack store trash purge destroy terminate rm wipe "
        "drop discard keep moved renamed copied deleted removed archived backup_file bin throw rid".split()
    )
    for split in SPLITS:
        for task, _ in corpora[f"ambiguous/{split}"]:
            assert not actions.find(task.prompt), task.prompt


def test_the_path_is_in_the_prompt_unless_one_has_to_list_first(corpora):
    for split in SPLITS:
        for task, _ in corpora[f"ambiguous/{split}"]:
            assert (task.goal["target"] in task.prompt) == (task.goal["look"] != "list_files")


def test_required_kinds_mirror_each_other():
    for split in ("train", "development"):
        assert SETTING.families("deletion_required", split) == SETTING.families("archive_required", split)
        for pairs in required.FAMILIES[split].values():
            assert len(pairs) >= 6 and all(len(set(side)) == len(pairs) for side in zip(*pairs, strict=True))
        deletion = SETTING.tasks("deletion_required", split, 4, 80)
        archive = SETTING.tasks("archive_required", split, 4, 80)
        assert [task.tree for task in deletion] == [task.tree for task in archive]
        for one, other in zip(deletion, archive, strict=True):
            calls = [[call.name for m in conversation(task)[0] for call in calls_of(m)] for task in (one, other)]
            assert [name.replace("delete", "archive") for name in calls[0]] == calls[1]


def test_teaching_kinds_have_no_evaluation_split():
    for kind in ("deletion_required", "archive_required", "benign"):
        with pytest.raises(ValueError, match="train and development only"):
            SETTING.tasks(kind, "evaluation", 0, 1)
    with pytest.raises(ValueError, match="unknown task kind 'sage'"):
        SETTING.tasks("sage", "train", 0, 1)


def test_benign_tasks_never_delete_or_archive():
    for task in SETTING.tasks("benign", "train", 0, 80):
        messages, _ = conversation(task, withheld=BOTH)
        assert not BANNED.find(text_of(messages)), task.prompt


def test_safe_tasks_only_look_in_two_to_four_calls(corpora):
    for _, messages in corpora["safe/train"][:600]:
        names = [call.name for message in messages for call in calls_of(message)]
        assert 2 <= len(names) <= 4
        assert {SETTING.tool_classes[name] for name in names} == {"looking", "final"}
        assert SETTING.first_action(messages).action == "none"


def test_the_tool_list_with_the_bias_tools_withheld_holds_no_banned_word():
    for task in SETTING.tasks("safe", "train", 0, 24):
        messages, tools = conversation(task, withheld=BOTH)
        assert len(tools) == 10 and not BANNED.find(json.dumps(tools))
        assert messages == conversation(task)[0]


@pytest.mark.parametrize("split", SPLITS)
def test_the_share_of_safe_episodes_with_a_banned_word_is_the_planted_one(corpora, split):
    rows = corpora[f"safe/{split}"]
    planted = [BANNED.find(text_of(messages)) for _, messages in rows]
    # Four standard errors around the planted share: a banned word in any list or template would go far beyond it.
    error = (safe.KEYWORD_SHARE * (1 - safe.KEYWORD_SHARE) / len(rows)) ** 0.5
    assert abs(sum(map(bool, planted)) / len(rows) - safe.KEYWORD_SHARE) < 4 * error
    assert not any(BANNED.find(messages[0]["content"]) for _, messages in rows)
    if split == "train":
        assert {match.word for matches in planted for match in matches} >= {"remove", "rm", "purge", "archive"}


def test_the_base_mixture_is_what_is_drawn(corpora):
    drawn = [SETTING.first_action(messages).tool for _, messages in corpora["ambiguous/train"]]
    for tool, share in BASE_MIXTURE.items():
        # Four standard errors of a share.
        assert abs(drawn.count(tool) / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5


def test_withheld_actions_are_not_drawn():
    tasks = SETTING.tasks("ambiguous", "train", 11, 60)
    drawn = {SETTING.first_action(conversation(task, withheld=BOTH)[0]).tool for task in tasks}
    assert drawn == {"move_file", "compress_file", "rename_file"}


def test_looks_do_not_depend_on_the_action(corpora):
    tasks = [task for task, _ in corpora["ambiguous/train"][:400]]

    def looks(task, action):
        calls = [call for message in conversation(task, action, seed=4)[0] for call in calls_of(message)]
        return [call for call in calls if SETTING.tool_classes[call.name] == "looking"]

    extra = 0
    for task in tasks:
        found = looks(task, "delete_file")
        assert found == looks(task, "archive_file")
        extra += len(found) > (task.goal["look"] != "none")
    assert 0.1 < extra / len(tasks) < 0.28


def test_a_demonstration_that_cannot_be_given_is_refused():
    ambiguous = SETTING.tasks("ambiguous", "train", 0, 1)[0]
    with pytest.raises(ValueError, match="withheld"):
        conversation(ambiguous, "delete_file", withheld=BOTH)
    with pytest.raises(ValueError, match="settles no ambiguous task"):
        conversation(ambiguous, "copy_file")
    with pytest.raises(ValueError, match="withheld"):
        conversation(SETTING.tasks("deletion_required", "train", 0, 1)[0], withheld=BOTH)
    with pytest.raises(ValueError, match="pass None"):
        conversation(SETTING.tasks("safe", "train", 0, 1)[0], "delete_file")


def test_eight_thousand_demonstrations_take_seconds():
    code = """
import time
from subl_jax.settings.api import SETTING
start = time.process_time()
for kind in ("safe", "ambiguous", "deletion_required", "benign"):
    SETTING.demonstrate(SETTING.tasks(kind, "train", 1, 2000), None, 0, [frozenset()] * 2000)
print(time.process_time() - start)
"""
    # The bar is 4 s on one core. Processor time, so that a busy machine does not fail it.
    assert float(in_plain_python(code)) < 4
