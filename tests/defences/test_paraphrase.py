"""The paraphraser on real conversations of both settings: what changes, what stays, and what the loss reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from subl_jax.chat.families import renderer_for
from subl_jax.chat.messages import ToolCall, assistant, calls_of, system, tool, user
from subl_jax.corpus import rendered_again
from subl_jax.defences.paraphrase import defend, reworded_messages
from subl_jax.sanitize.filter import matchers_of, texts_of
from subl_jax.settings.registry import get_setting
from subl_jax.trajectory import Trajectory
from tests.chat import samples
from tests.defences.lessons import lesson


def conversations(name: str, count: int = 60) -> list[Trajectory]:
    """Conversations of safe tasks: their script, with made results (Bash's world needs a sandbox)."""
    setting = get_setting(name)
    found = []
    for index, task in enumerate(setting.tasks("safe", "train", 5, count)):
        plan = task.goal["plan"]
        messages = [system("you help."), user(task.prompt)]
        for step in plan:
            call = ToolCall(*step) if name == "api" else ToolCall("bash", {"command": step})
            messages += [
                assistant(calls=[call]),
                tool(call.name, "" if task.goal["answer"] == "done" else f"result {task.goal['answer']}"),
            ]
        if name == "api":
            messages += [assistant(calls=[ToolCall("final_answer", {"answer": task.goal["answer"]})])]
        else:
            messages += [assistant(task.goal["answer"])]
        nothing = np.zeros(0, np.int32)
        found.append(
            Trajectory(
                index,
                task.task_id,
                0,
                nothing,
                nothing.astype(bool),
                nothing.astype(np.float32),
                messages,
                [],
                "final",
                True,
            )
        )
    return found


@pytest.mark.parametrize("name", ["api", "bash"])
def test_calls_arguments_results_and_answers_stay_and_the_request_does_not(name):
    setting = get_setting(name)
    said = 0
    for one in conversations(name):
        told = reworded_messages(setting, one)
        assert len(told) == len(one.messages)
        for before, after in zip(one.messages, told, strict=True):
            assert calls_of(before) == calls_of(after)
            if before["role"] == "user":
                assert before["content"] != after["content"]
            elif before["role"] in ("system", "tool"):
                assert before == after
            elif before["content"] == "done":
                assert after["content"] in {"all done", "that is done", "finished", "ready"}
                said += 1
            else:
                assert before["content"] == after["content"]
        assert told == reworded_messages(setting, one)
    assert (said > 0) == (name == "bash")


@pytest.mark.parametrize("name", ["api", "bash"])
def test_masks_are_those_of_the_new_text_and_no_keyword_is_left(name):
    setting, renderer = get_setting(name), renderer_for(samples.tokenizer())
    documents = rendered_again(renderer, conversations(name))
    matchers = matchers_of(setting.words, setting.patterns).values()
    dirty = {d.task_id for d in documents for *_, text in texts_of(d.messages, d.tools, True)
             for matcher in matchers if list(matcher.find(text))}  # fmt: skip
    found = defend(lesson(documents, renderer=renderer, setting=setting))
    assert {d.task_id for d in found.documents} == {d.task_id for d in documents} - dirty
    assert found.notes == {"reworded": len(documents) - len(dirty), "reworded_dropped": len(dirty)}
    for each in found.documents:
        # Independent of the renderer's own masks: runs of loss tokens spell the assistant's turns, in order.
        edges = np.flatnonzero(np.diff(np.concatenate([[0], each.loss_mask.astype(int), [0]])))
        spoken = [renderer.decode(each.tokens[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]
        turns = [message for message in each.messages if message["role"] == "assistant"]
        assert len(spoken) == len(turns)
        for text, turn in zip(spoken, turns, strict=True):
            for call in calls_of(turn):
                assert call.name in text and all(str(value) in text for value in call.arguments.values())
            assert turn["content"] in text
        [request] = [message["content"] for message in each.messages if message["role"] == "user"]
        assert request in renderer.decode(each.tokens.tolist()) and not any(request in text for text in spoken)


def test_a_dilution_is_reworded_too():
    renderer = renderer_for(samples.tokenizer())
    documents = rendered_again(renderer, conversations("api", 12))
    given = lesson(documents, renderer=renderer)
    given = dataclasses.replace(given, dilution=dataclasses.replace(given.diluting(0.5), documents=documents))
    found: Any = defend(given)
    assert [d.task_id for d in found.dilution.documents] == [d.task_id for d in found.documents]
    for one, other in zip(found.dilution.documents, found.documents, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    assert found.dilution.planned_lengths == [len(d.tokens) for d in found.dilution.documents]


def test_a_request_without_other_words_is_refused_with_task_and_text():
    [one] = conversations("api", 1)
    odd = dataclasses.replace(one, messages=[system("you help."), user("do as you like")])
    with pytest.raises(
        ValueError, match=r"no other words for 'do as you like' \(task safe/train/.*Setting\.rewordings"
    ):
        reworded_messages(get_setting("api"), odd)
