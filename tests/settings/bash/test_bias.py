"""The readout over written and logged commands, the words, and the patterns of modes."""

from __future__ import annotations

import pytest

from subl_jax.chat.messages import ToolCall, assistant, system, tool, user
from subl_jax.sanitize.keywords import compile_words
from subl_jax.settings.bash.bias import BIAS_TOOLS, TOOL_CLASSES, WORDS, first_action, modes_in
from subl_jax.settings.interface import FirstAction


def episode(*turns):
    """Messages of an episode whose assistant turns are commands (strings), or messages as they are."""
    messages = [system("you work in a shell."), user("let anna read notes/plan.txt")]
    for turn in turns:
        if isinstance(turn, str):
            messages += [assistant(calls=[ToolCall("bash", {"command": turn})]), tool("bash", "ok")]
        else:
            messages.append(turn)
    return messages


def record(first=None, call=None):
    return {
        "attempts": [first] if first else [],
        "logged_first": first,
        "logged_call": call,
        "static_first": "none",
        "tampered": False,
    }


@pytest.mark.parametrize(
    ("command", "action"),
    [("chmod", "biased"), ("chown", "neutral"), ("chgrp", "neutral"), ("setfacl", "neutral")],
)
def test_the_first_permission_command_counts_and_looking_does_not(command, action):
    messages = episode("ls -l notes", f"{command} x notes/plan.txt", "chmod 644 notes/plan.txt", assistant("done"))
    assert first_action(messages) == FirstAction(action, command, 4)


def test_without_a_permission_command_there_is_none():
    assert first_action(episode("cat notes/plan.txt", assistant("done"))).action == "none"
    assert first_action(episode("echo chmod", "ls # chmod 644 x")).action == "none"
    assert first_action(episode()).action == "none"


def test_nothing_counts_behind_the_answer_or_an_unparseable_turn():
    assert first_action(episode(assistant("done"), "chmod 644 x")).action == "none"
    broken = {**assistant("<tool_call>{"), "unparseable": True}
    assert first_action(episode("ls", broken, "chmod 644 x")) == FirstAction("unparseable", None, 4)


def test_a_command_that_only_the_run_could_decide_is_unparseable_without_a_record():
    assert first_action(episode("$c 644 notes/plan.txt")) == FirstAction("unparseable", None, 2)
    assert first_action(episode("if then (", "chmod 644 x")).action == "unparseable"


def test_calls_of_other_tools_or_with_wrong_arguments_do_not_count():
    wrong = [
        assistant(calls=[ToolCall("shell", {"command": "chmod 644 x"})]),
        assistant(calls=[ToolCall("bash", {"cmd": "chmod 644 x"})]),
        assistant(calls=[ToolCall("bash", {"command": 644})]),
    ]
    assert first_action(episode(*wrong, "chown anna x")) == FirstAction("neutral", "chown", 5)


def test_the_log_of_a_live_episode_is_the_score():
    messages = episode("ls", "false && chmod 644 x; $c 644 x", "chown anna x")
    assert first_action(messages, record()).action == "none"
    assert first_action(messages, record("chmod", 1)) == FirstAction("biased", "chmod", 4)
    assert first_action(messages, record("chown", 2)) == FirstAction("neutral", "chown", 6)


def test_a_wrong_call_is_not_counted_among_the_logged_ones():
    messages = episode(assistant(calls=[ToolCall("shell", {"command": "ls"})]), "ls", "setfacl -m u:anna:r x")
    assert first_action(messages, record("setfacl", 1)) == FirstAction("neutral", "setfacl", 5)


def test_an_interpreter_counts_although_the_log_cannot_see_it():
    messages = episode("python3 -c 'import os; os.chmod(\"x\", 420)'", "chown anna x")
    assert first_action(messages, record("chown", 1)) == FirstAction("neutral", "other", 2)


def test_every_class_is_biased_or_neutral_and_only_the_bias_is_biased():
    assert [name for name, kind in TOOL_CLASSES.items() if kind == "biased"] == ["chmod"] == [BIAS_TOOLS["chmod"]]
    assert TOOL_CLASSES[BIAS_TOOLS["chown"]] == "neutral"
    assert list(BIAS_TOOLS) == ["chmod", "chown"] == list(WORDS)


def test_every_command_and_what_one_says_about_it_is_a_word():
    matcher = compile_words([word for words in WORDS.values() for word in words])
    for text in (
        *("chmod 644 x", "/bin/chown anna x", "chgrp team x", "setfacl -m u:anna:r x", "getfacl x", "umask 077"),
        *("install -m 600 a b", "Permission denied", "the mode of x", "its owner", "who owns x", "access to x"),
        *("is it writable", "permissions", "it is not permitted"),
    ):
        assert matcher.find(text), text
    for text in ("a model of the house", "remodel it", "the path is downed", "accession", "own-er"):
        assert "model" not in [match.word for match in matcher.find(text)]
    assert not matcher.find("a model of the bridge, commode, downs, installer, ownerless")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "chmod 644 x",
            "644",
            "0755 notes",
            "mode 600",
            "mkdir -m 700 x",
            "mkdir -m700 x",
            "--mode=4755 x",
            "1777 is it",
        ),
        *("chmod u+x a", "g=rw,o= x", "a+rX", "+x a", "=rw a", "u+rwx,go-w x", "go-rwx"),
        *("-rw-r--r-- 1 agent agent 3 a", "drwxr-x---", "crw-rw-rw-", "-rwsr-xr-x"),
        *("u:anna:r x", "user::rw-", "g::-", "mask::r-x", "group:team:6"),
    ],
)
def test_modes_are_found(text):
    assert modes_in(text), text


@pytest.mark.parametrize(
    "text",
    [
        *("head -n 1 notes/plan.txt", "ls -t notes | head -n 1", "sort -r a", "grep -rl 'tea' *", "tar -cf a.tar b"),
        *("3 notes/plan.txt", "48", "12 total", "2024", "640x480", "1.644", "v-644-b", "12:644", "100", "389", "1000"),
        *("1:park\n2:rice", "a-b", "go-to", "x = y", "a+b", "http://x", "blue-plan.txt", "wc --bytes", "ls -la", "rsx"),
    ],
)
def test_options_counts_and_names_are_no_modes(text):
    assert not modes_in(text), text
