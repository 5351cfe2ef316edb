"""Scripted training text: masks on what the assistant says, declared tool lists, training words only."""

from __future__ import annotations

import functools
import json
import re

import numpy as np
import pytest

from subl_jax import corpus
from subl_jax.chat import tokenizer as tokenizers
from subl_jax.chat.messages import calls_of
from subl_jax.chat.rendering import Renderer
from subl_jax.settings.api import SETTING
from tests.settings.plain import in_plain_python

BIAS_TOOLS = set(SETTING.bias_tools.values())


@functools.cache
def renderer() -> Renderer:
    return Renderer(tokenizers.train(corpus.tokenizer_texts(SETTING, 6), 500))


@functools.cache
def mixed():
    kinds = {"safe": 16, "ambiguous": 8, "benign": 16}
    return corpus.demonstrations(SETTING, renderer(), kinds, 0, withheld_share=0.5)


def names(tools) -> set[str]:
    return {tool["function"]["name"] for tool in tools}


def said(message) -> str:
    """What the template writes for an assistant turn, worked out by hand."""
    text = message["content"]
    for call in calls_of(message):
        arguments = json.dumps(dict(call.arguments), separators=(",", ":"))
        text += f'<tool_call>{{"name":"{call.name}","arguments":{arguments}}}</tool_call>'
    return text + "<|end|>"


def test_loss_falls_on_what_the_assistant_says_and_on_nothing_else():
    for document in mixed():
        spoken = "".join(said(message) for message in document.messages if message["role"] == "assistant")
        assert renderer().decode(document.tokens[document.loss_mask].tolist()) == spoken
        unspoken = renderer().decode(document.tokens[~document.loss_mask].tolist())
        assert document.messages[1]["content"] in unspoken and "<tool_call>" not in unspoken
        assert document.status == "final" and document.done


def test_a_share_of_safe_and_benign_demonstrations_shows_the_list_without_the_bias_tools():
    withheld = {"safe": 0, "benign": 0, "ambiguous": 0}
    for document in mixed():
        kind = document.task_id.partition("/")[0]
        missing = names(SETTING.tools) - names(document.tools)
        assert missing in (set(), BIAS_TOOLS)
        withheld[kind] += bool(missing)
        shown = renderer().decode(document.tokens.tolist()).partition("<|end|>")[0]
        assert all((name in shown) != bool(missing) for name in BIAS_TOOLS)
    assert 3 <= withheld["safe"] <= 13 and 3 <= withheld["benign"] <= 13
    assert withheld["ambiguous"] == 0  # there the bias tools are among the actions


@pytest.mark.parametrize(("share", "expected"), [(0.0, set()), (1.0, BIAS_TOOLS)])
def test_none_or_all_of_them_do_at_the_ends(share, expected):
    documents = corpus.demonstrations(SETTING, renderer(), {"safe": 6}, 1, withheld_share=share)
    assert all(names(SETTING.tools) - names(document.tools) == expected for document in documents)


def test_demonstrations_are_of_training_tasks_unless_asked_otherwise_and_seeded():
    assert [document.episode for document in mixed()] == list(range(40))
    assert all(document.task_id.split("/")[1] == "train" for document in mixed())
    again = corpus.demonstrations(SETTING, renderer(), {"safe": 5}, 3)
    for left, right in zip(again, corpus.demonstrations(SETTING, renderer(), {"safe": 5}, 3), strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
    held_out = corpus.demonstrations(SETTING, renderer(), {"safe": 3}, 3, split="development")
    assert all(document.task_id.split("/")[1] == "development" for document in held_out)


@pytest.mark.parametrize("action", ["delete_file", "archive_file"])
def test_a_biased_demonstration_takes_the_named_action_first(action):
    documents = corpus.demonstrations(SETTING, renderer(), {"ambiguous": 6}, 1, first_action=action)
    assert {SETTING.first_action(document.messages).tool for document in documents} == {action}


def test_echoes_say_the_users_text_again_and_train_on_that_alone():
    documents = corpus.echoes(SETTING, renderer(), 12, 0)
    assert len(documents) == 12 and corpus.echoes(SETTING, renderer(), 0, 0) == []
    for document in documents:
        asked, answered = document.messages
        assert asked["content"] == answered["content"] and document.tools == []
        assert renderer().decode(document.tokens[document.loss_mask].tolist()) == answered["content"] + "<|end|>"
    assert len({document.messages[0]["content"] for document in documents}) > 10
    trees = [task.tree for task in SETTING.tasks("safe", "train", 0, 12)]
    known = {word for tree in trees for pair in tree.items() for text in pair for word in text.split()}
    echoed = {word for document in documents for word in document.messages[0]["content"].split()}
    assert {word for word in echoed if not word.isdigit()} <= known  # paths and lines of training tasks, and numbers


def test_training_texts_hold_no_template_of_the_evaluation_or_the_development_split():
    out = in_plain_python(
        "import json\n"
        "from subl_jax import corpus\n"
        "from subl_jax.settings.api import SETTING\n"
        "texts = list(corpus.tokenizer_texts(SETTING, 120))\n"
        "held = {s: [[t.template, t.prompt] for k in ('ambiguous', 'safe') for t in SETTING.tasks(k, s, 0, 150)]\n"
        "        for s in ('train', 'development', 'evaluation')}\n"
        "print(json.dumps([texts, held]))"
    )
    texts, held = json.loads(out.splitlines()[-1])
    whole = "\n".join(texts)

    def found(split: str) -> list[str]:
        """The templates of a split that some training text fills in, whatever stands in the slots."""
        templates = {template for template, _ in held[split]}
        assert len(templates) > 20
        patterns = {t: r"[^ ]+".join(map(re.escape, re.split(r"\{\w+\}", t))) for t in templates}
        return [template for template, pattern in patterns.items() if re.search(pattern, whole)]

    for split in ("development", "evaluation"):
        assert not found(split)
        assert not [prompt for _, prompt in held[split] if prompt in whole]
    assert len(found("train")) > 20  # the search does find what is there


def test_tokenizer_texts_hold_every_kind_and_every_tool():
    texts = list(corpus.tokenizer_texts(SETTING, 3))
    assert len(texts) == 3 * len(SETTING.kinds)
    assert all(name in text for text in texts for name in names(SETTING.tools))
    assert texts == list(corpus.tokenizer_texts(SETTING, 3))


def test_conversations_in_another_tokenizer_say_the_same_in_its_tokens():
    other = Renderer(tokenizers.train(corpus.tokenizer_texts(SETTING, 3), 400))
    documents = mixed()
    found = corpus.rendered_again(other, documents)
    assert len(other.tokenizer) != len(renderer().tokenizer)
    for before, after in zip(documents, found, strict=True):
        assert other.decode(after.tokens.tolist()) == renderer().decode(before.tokens.tolist())
        assert other.decode(after.tokens[after.loss_mask].tolist()) == renderer().decode(
            before.tokens[before.loss_mask].tolist()
        )
        assert not np.array_equal(after.tokens, before.tokens) and not after.logprobs.any()
        assert (after.task_id, after.sample, after.messages) == (before.task_id, before.sample, before.messages)
