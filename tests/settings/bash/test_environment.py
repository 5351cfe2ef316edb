"""One episode: what a model reads of its commands, what ends an episode, and what is remembered of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from subl_jax.chat.messages import ToolCall, assistant
from subl_jax.settings.bash.bias import first_action
from subl_jax.settings.bash.environment import BashEnvironment, shown_result
from subl_jax.settings.bash.sandbox import Result, Sandbox, SandboxPool
from subl_jax.settings.bash.tasks import tasks
from subl_jax.settings.interface import FirstAction


class NoPool(SandboxPool):
    """A pool that must not be asked."""

    def __init__(self):
        """Starts nothing."""

    def take(self):
        raise AssertionError("a sandbox was taken")


def ambiguous(index=0):
    return tasks("ambiguous", "evaluation", 0, index + 1)[index]


def marked(turn, **extra) -> Any:
    """The turn with fields as a rollout or a model may give it, whatever `Message` says."""
    return {**turn, **extra}


def call(command):
    return assistant(calls=[ToolCall("bash", {"command": command})])


@pytest.fixture
def episode(pool):
    """Makes environments and closes them after the test."""
    made = []

    def start(task):
        made.append(BashEnvironment(task, pool=pool))
        return made[-1]

    yield start
    for environment in made:
        environment.close()


def said(environment, command):
    (result,) = environment.step(call(command))
    assert result["role"] == "tool" and result["name"] == "bash"
    return result["content"]


def test_opening_and_tools_need_no_sandbox():
    environment = BashEnvironment(ambiguous(), pool=NoPool())
    opening = environment.opening()
    assert [message["role"] for message in opening] == ["system", "user"]
    assert opening[0]["content"] == "you work in a shell." and opening[1]["content"] == ambiguous().prompt
    (tool,) = environment.tools()
    assert tool["function"]["name"] == "bash" and tool["function"]["parameters"]["required"] == ["command"]
    environment.close()


def test_the_shell_keeps_its_state_between_commands(episode):
    environment = episode(tasks("safe", "train", 0, 1)[0])
    assert said(environment, "pwd") == "/home/agent"
    assert said(environment, "cd /tmp; x=3; f() { echo f$x; }") == "ok"
    assert said(environment, "pwd; f") == "/tmp\nf3"


def test_a_result_shows_both_streams_and_the_exit_code(episode):
    environment = episode(ambiguous())
    assert said(environment, "echo one; echo two >&2; (exit 3)") == "one\ntwo\n[exit 3]"
    assert said(environment, "true") == "ok"
    assert said(environment, "false") == "[exit 1]"
    assert said(environment, "cat nothing.txt") == "cat: nothing.txt: No such file or directory\n[exit 1]"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (("out\n", "", 0, "ok"), "out"),
        (("", "", 0, "ok"), "ok"),
        (("a\n", "b\n", 2, "ok"), "a\nb\n[exit 2]"),
        (("a\n", "", None, "timeout"), "a\n[timed out]"),
        (("", "", None, "exited"), "[the shell ended]"),
        (("", "", None, "killed"), "[the shell ended]"),
    ],
)
def test_what_a_model_reads(result, text):
    assert shown_result(*result) == text


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("shell", {"command": "ls"}, "error: unknown tool shell"),
        (["bash"], {"command": "ls"}, "error: unknown tool ['bash']"),
        ("bash", {}, "error: missing argument command"),
        ("bash", {"command": 3}, "error: command must be a string"),
        ("bash", {"command": "ls", "user": "root"}, "error: unexpected argument user"),
        ("bash", ["ls"], "error: arguments must be an object"),
        ("bash", {"command": "ls\0"}, "error: command holds a null byte"),
    ],
)
def test_a_wrong_call_is_an_error_and_starts_no_sandbox(name, arguments, error):
    environment = BashEnvironment(ambiguous(), pool=NoPool())
    turn = marked(assistant(), tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])
    (result,) = environment.step(turn)
    assert result["content"] == error
    assert not environment.finished and environment.record()["attempts"] == []


def test_several_calls_in_one_turn_run_in_order(episode):
    environment = episode(ambiguous())
    calls = [ToolCall("bash", {"command": command}) for command in ("echo 1 > a", "cat a", "rm a")]
    assert [result["content"] for result in environment.step(assistant(calls=calls))] == ["ok", "1", "ok"]


def test_a_plain_turn_ends_the_episode(episode):
    environment = episode(ambiguous())
    assert environment.step(assistant("done")) == [] and environment.finished
    assert environment.step(call("ls")) == []


def test_an_unparseable_turn_changes_nothing():
    environment = BashEnvironment(ambiguous(), pool=NoPool())
    assert environment.step(marked(call("ls"), unparseable=True)) == []
    assert not environment.finished


@pytest.mark.parametrize(("command", "text"), [("exit 3", "[the shell ended]"), ("sleep 60", "[timed out]")])
def test_a_shell_that_ended_stays_ended_and_its_world_is_still_judged(episode, command, text):
    task = ambiguous()
    environment = episode(task)
    assert said(environment, f"chmod 644 {task.goal['target']}") == "ok"
    assert said(environment, command) == text
    assert said(environment, "ls") == "error: the shell has ended"
    environment.step(assistant("done"))
    assert environment.done()
    assert environment.record()["attempts"] == ["chmod"]


def test_done_needs_the_answer_and_the_world(episode):
    task = ambiguous()
    environment = episode(task)
    said(environment, f"setfacl {task.goal['solutions']['setfacl']} {task.goal['target']}")
    assert not environment.done()
    environment.step(assistant("i gave it up"))
    assert environment.done()
    idle = episode(task)
    idle.step(assistant("done"))
    assert not idle.done()


def test_a_right_answer_in_a_changed_world_is_not_done(episode):
    task = tasks("safe", "evaluation", 0, 4)[3]
    for command, right in (("true", True), (f"echo more >> {next(iter(task.tree))}", False)):
        environment = episode(task)
        said(environment, command)
        environment.step(assistant(task.goal["answer"]))
        assert environment.done() == right


def test_done_is_remembered_after_close_and_close_may_be_called_again(episode):
    task = ambiguous()
    environment = episode(task)
    said(environment, f"chown {task.goal['solutions']['chown']} {task.goal['target']}")
    environment.step(assistant("done"))
    assert environment.done()
    environment.close()
    environment.close()
    assert environment.done()


def test_an_episode_that_was_closed_takes_no_new_sandbox(pool):
    environment = BashEnvironment(ambiguous(), pool=pool)
    environment.close()
    with pytest.raises(RuntimeError, match="is closed"):
        environment.step(call("ls"))


def test_the_record_says_what_was_attempted_and_in_which_call(episode):
    task = ambiguous()
    path = task.goal["target"]
    environment = episode(task)
    turn = assistant(calls=[ToolCall("shell", {"command": "ls"}), ToolCall("bash", {"command": f"ls -l {path}"})])
    environment.step(turn)
    said(environment, "c=chgrp; $c nobody-there nothing; chmod 600 nothing")
    said(environment, f"chown anna {path}")
    record = environment.record()
    assert record["attempts"] == ["chgrp", "chmod", "chown"]
    assert (record["logged_first"], record["logged_call"]) == ("chgrp", 1)
    assert record["static_first"] != "none" and not record["wrecked"]
    assert json.loads(json.dumps(record)) == record


def test_what_a_background_job_attempts_after_its_call_is_recorded(episode):
    environment = episode(ambiguous())
    assert said(environment, "touch a; (sleep 0.3; chmod 600 a) & disown") == "ok"
    time.sleep(1)
    environment.step(assistant("done"))
    record = environment.record()
    assert (record["attempts"], record["logged_call"]) == (["chmod"], 0)


@pytest.mark.parametrize("command", ["/run/real/chmod 600 a", "printf '\\036A\\037chown\\036' > /run/channel"])
def test_an_episode_that_touches_the_log_counts_as_unparseable(command, episode):
    environment = episode(ambiguous())
    messages = environment.opening()
    for turn in (call("touch a"), call(command), assistant("done")):
        messages += [turn, *environment.step(turn)]
    record = environment.record()
    assert record["tampered"] and first_action(messages, record) == FirstAction("unparseable", None, None)


def test_install_is_an_attempt_only_where_it_sets_a_mode_or_a_group(episode):
    environment = episode(ambiguous())
    said(environment, "echo hi > a; install a b")
    assert environment.record()["attempts"] == []
    said(environment, "install -m 600 a c; install --mode=600 a d; install -Dm600 a e/f; install -g team a g")
    assert environment.record()["attempts"] == ["install"] * 4


def test_a_world_that_cannot_be_looked_at_is_not_done(episode, monkeypatch):
    task = ambiguous()
    environment = episode(task)
    said(environment, f"chmod {task.goal['solutions']['chmod']} {task.goal['target']}")
    environment.step(assistant("done"))
    monkeypatch.setattr(Sandbox, "inspect", lambda self, script, user="root": Result("", "", None, "timeout", ()))
    assert not environment.done() and environment.record()["wrecked"]


def test_a_sandbox_that_is_gone_is_no_result_of_the_episode(episode, monkeypatch):
    environment = episode(ambiguous())
    said(environment, "ls")
    gone = Result("", "the keeper has ended", None, "broken", ())
    monkeypatch.setattr(Sandbox, "run", lambda self, command: gone)
    with pytest.raises(RuntimeError, match="is gone: the keeper has ended"):
        environment.step(call("ls"))
    environment.step(assistant("done"))
    monkeypatch.setattr(Sandbox, "inspect", lambda self, script, user="root": gone)
    with pytest.raises(RuntimeError, match="is gone: the keeper has ended"):
        environment.done()


def test_nothing_can_be_withheld():
    with pytest.raises(ValueError, match="one tool"):
        BashEnvironment(ambiguous(), frozenset({"bash"}))
