"""Scripted solutions in a real sandbox: every command settles every family, wrong ones do not, and no word leaks."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.messages import calls_of
from subl_jax.chat.rendering import Renderer
from subl_jax.sanitize.keywords import compile_words
from subl_jax.settings.bash import goals
from subl_jax.settings.bash.bias import WORDS, first_action, modes_in
from subl_jax.settings.bash.demonstrate import demonstrate, demonstrate_many
from subl_jax.settings.bash.environment import HOME, world_of
from subl_jax.settings.bash.tasks import KINDS, SPLITS, families, tasks
from subl_jax.settings.bash.tasks.ambiguous import ACTIONS, BASE_MIXTURE
from subl_jax.settings.bash.tasks.situations import FAMILIES as AMBIGUOUS
from subl_jax.settings.bash.tasks.words import MEMBERS, PEOPLE

PRESENT = [(kind, split) for kind in KINDS for split in SPLITS if families(kind, split)]
BANNED = compile_words([word for words in WORDS.values() for word in words])
NONE = frozenset()


def many(rows, pool, action=None, seed=0):
    return demonstrate_many(rows, action, seed, [NONE] * len(rows), pool)


def commands_of(messages):
    return [call.arguments["command"] for message in messages for call in calls_of(message)]


def unmet_after(pool, rows, commands):
    """Which of the tasks are not done after one command each, all worlds side by side."""
    sandbox = pool.take()
    try:
        roots = [f"{HOME}/{number}" for number in range(len(rows))]
        sandbox.build([e for task, root in zip(rows, roots, strict=True) for e in world_of(task.goal, root)])
        for command, root in zip(commands, roots, strict=True):
            result = sandbox.run(f"cd {root}; {command}")
            assert (result.status, result.stderr, result.code) == ("ok", "", 0), (command, result)
        scripts = goals.scripts([(task.goal, root) for task, root in zip(rows, roots, strict=True)])
        return goals.unmet(sandbox.inspect(script, user=user).stdout for user, script in scripts.items())
    finally:
        sandbox.close()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("action", ACTIONS)
def test_each_command_settles_every_ambiguous_family(pool, split, action):
    rows = tasks("ambiguous", split, 3, 4 * len(families("ambiguous", split)))
    assert {task.family for task in rows} == set(AMBIGUOUS[split])
    for messages, _ in many(rows, pool, action):
        first = first_action(messages)
        assert (first.tool, first.action) == (action, "biased" if action == "chmod" else "neutral")


@pytest.mark.parametrize("split", SPLITS)
def test_an_untouched_world_leaves_every_ambiguous_task_undone(pool, split):
    rows = tasks("ambiguous", split, 5, 4 * len(families("ambiguous", split)))
    assert unmet_after(pool, rows, ["true"] * len(rows)) == set(range(len(rows)))


def wrong_commands(task):
    """One command of each kind that changes something and not what the task is about."""
    family, path = AMBIGUOUS[task.split][task.family], task.goal["target"]
    concerned = {c["user"] for c in task.goal["conditions"] if c["check"] in ("allowed", "denied")}
    other = next(person for person in PEOPLE if person not in concerned)
    if family.need == "lock":
        return [f"chmod 644 {path}", f"chown {other} {path}", f"setfacl -m u:{sorted(concerned)[1]}:r {path}"]
    group = next(group for group, members in MEMBERS.items() if not concerned & set(members) or family.who == "agent")
    if family.who == "agent":
        group = "guests"
    return [
        f"chmod 600 {path}",
        f"chown {other} {path}",
        f"chgrp {group} {path}",
        f"setfacl -m u:{other}:rwx {path}",
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_commands_that_serve_somebody_else_leave_the_task_undone(pool, split):
    rows = tasks("ambiguous", split, 6, len(families("ambiguous", split)))
    pairs = [(task, command) for task in rows for command in wrong_commands(task)]
    unmet = unmet_after(pool, [task for task, _ in pairs], [command for _, command in pairs])
    assert unmet == set(range(len(pairs))), [pairs[n][1] for n in set(range(len(pairs))) - unmet]


def test_an_access_that_costs_the_text_leaves_the_task_undone(pool):
    rows = [task for task in tasks("ambiguous", "evaluation", 6, 27) if not task.goal["folder"]]
    commands = [
        f"mv {t.goal['target']} x; echo new > {t.goal['target']}; chmod {t.goal['solutions']['chmod']} {t.goal['target']}"
        for t in rows
    ]
    assert unmet_after(pool, rows, commands) == set(range(len(rows)))


@pytest.mark.parametrize("kind", ["chmod_required", "chown_required"])
def test_a_demanded_mode_or_owner_is_not_given_by_another_command(pool, kind):
    rows = tasks(kind, "train", 1, 24)
    others = tasks("chown_required" if kind == "chmod_required" else "chmod_required", "train", 1, 24)
    assert unmet_after(pool, rows, [task.goal["plan"][-1] for task in others]) == set(range(24))
    assert not unmet_after(pool, rows, [task.goal["plan"][-1] for task in rows])


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_demonstrations_in_one_sandbox_are_those_of_single_episodes(pool, kind, split):
    rows = tasks(kind, split, 8, len(families(kind, split)))
    together = many(rows, pool, seed=2)
    assert together == [demonstrate(task, None, 2, NONE, pool) for task in rows]


@pytest.mark.parametrize(("kind", "split"), PRESENT)
def test_the_answer_is_what_the_last_command_printed_or_done(pool, kind, split):
    for messages, _ in many(tasks(kind, split, 9, 4 * len(families(kind, split))), pool):
        answer, last = messages[-1]["content"], messages[-2]["content"]
        # `wc` writes the file's name behind the number.
        assert answer in (last, last.split()[0]) if last != "ok" else answer == "done"
        assert 1 <= len(commands_of(messages)) <= 3


def test_demonstrations_are_the_same_in_another_order_and_another_sandbox(pool):
    rows = tasks("ambiguous", "train", 4, 60) + tasks("safe", "train", 4, 60)
    assert many(rows[::-1], pool)[::-1] == many(rows, pool)


@pytest.mark.parametrize("split", SPLITS)
def test_safe_demonstrations_hold_no_banned_word_and_no_mode(pool, split):
    for messages, _ in many(tasks("safe", split, 1, 200), pool):
        for message in messages:
            for text in (message["content"], *(call.arguments["command"] for call in calls_of(message))):
                assert not BANNED.find(text) and not modes_in(text), text
        assert first_action(messages).action == "none"


def test_the_base_mixture_is_what_is_drawn(pool):
    drawn = [first_action(messages).tool for messages, _ in many(tasks("ambiguous", "train", 1, 1000), pool)]
    for command, share in BASE_MIXTURE.items():
        # Four standard errors of a share.
        assert abs(drawn.count(command) / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5


def test_looks_do_not_depend_on_the_command(pool):
    rows = tasks("ambiguous", "train", 7, 240)
    looks = [[commands_of(m)[:-1] for m, _ in many(rows, pool, action, seed=4)] for action in ("chmod", "setfacl")]
    assert looks[0] == looks[1]
    looked = Counter(any(command.startswith("ls -l") for command in script) for script in looks[0])
    assert 0.1 < looked[True] / len(rows) < 0.3


def test_a_demonstration_that_cannot_be_given_is_refused(pool):
    ambiguous, safe = tasks("ambiguous", "train", 0, 1)[0], tasks("safe", "train", 0, 1)[0]
    for given in (lambda task, action: demonstrate(task, action, 0, NONE, pool), lambda t, a: many([t], pool, a)):
        with pytest.raises(ValueError, match="'install' does not settle task"):
            given(ambiguous, "install")
        with pytest.raises(ValueError, match="pass None"):
            given(safe, "chmod")
    with pytest.raises(ValueError, match="withheld must be 1 empty sets"):
        demonstrate_many([safe], None, 0, [frozenset({"bash"})], pool)


@pytest.mark.parametrize(
    ("plan", "answer", "message"),
    [
        (["cat nothing.txt"], "", "nothing.txt"),
        (["true"], "done", "undone"),
    ],
)
def test_a_script_that_errs_or_leaves_its_task_undone_is_a_bug(pool, plan, answer, message):
    import dataclasses

    task = tasks("safe", "train", 0, 17)[16]
    assert task.family == "new_folder"
    broken = dataclasses.replace(task, goal={**task.goal, "plan": plan, "answer": answer})
    with pytest.raises(RuntimeError, match=message):
        demonstrate(broken, None, 0, NONE, pool)
    with pytest.raises(RuntimeError, match=message):
        many([task, broken], pool)


def test_demonstrations_are_short_in_the_embedded_tokenizer(pool):
    rows = {kind: many(tasks(kind, "train", 0, 200), pool) for kind in KINDS}
    texts = [json.dumps(messages, separators=(",", ":")) for found in rows.values() for messages, _ in found]
    words = [
        " ".join([m["content"] for m in messages] + [json.dumps(c.arguments) for m in messages for c in calls_of(m)])
        for found in rows.values()
        for messages, _ in found
    ]
    assert len(texts) == 1000
    renderer = Renderer(tokenizers.train(words, 1100))
    lengths = {kind: [len(item.tokens) for item in renderer.render(found)] for kind, found in rows.items()}
    assert max(map(max, lengths.values())) <= 170
    assert all(np.median(length) <= 100 for length in lengths.values()), lengths
