"""Small conversations, tools and a tokenizer trained on them; shared by the tests of chat and rollout."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedTokenizerFast

from subl_jax.chat import tokenizer as embedded
from subl_jax.chat.messages import Message, ToolCall, ToolSchema, assistant, system, tool, user


def schema(name: str, description: str = "") -> ToolSchema:
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [schema("list"), schema("read"), schema("answer")]

CONVERSATIONS: list[list[Message]] = [
    [
        system("you work with files."),
        user("how long is /notes/plan.txt?"),
        assistant("", [ToolCall("list", {"path": "/notes"})]),
        tool("list", "plan.txt"),
        assistant("", [ToolCall("read", {"path": "/notes/plan.txt"})]),
        tool("read", "ab cd"),
        assistant("it is 5 long."),
    ],
    [
        system("you work with files."),
        user("read both."),
        assistant("first one", [ToolCall("read", {"path": "/a"}), ToolCall("read", {"path": "/b", "lines": 12})]),
        tool("read", "error: no /a"),
        tool("read", "ünïcode → “b”"),
        assistant("", [ToolCall("answer", {})]),
    ],
    [user("hello"), assistant("hello."), user("and then?"), assistant("")],
    [user("nobody answers")],
]


@functools.cache
def tokenizer(vocab_size: int = 330) -> PreTrainedTokenizerFast:
    """A fresh tokenizer's worth of training is milliseconds; cached so that all tests speak of the same ids."""
    texts = [message["content"] for messages in CONVERSATIONS for message in messages]
    texts += ['{"name":"list","arguments":{"path":"/notes"}}{"name":"read","arguments":{}}'] * 20
    return embedded.train(texts, vocab_size)


def templated(tokenizer: Any, conversation: list[Message]) -> tuple[list[int], list[bool]]:
    """Ids and assistant mask of a conversation by `apply_chat_template` alone: the oracle of rendering."""
    encoded = tokenizer.apply_chat_template(
        conversation, tools=TOOLS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], [bool(entry) for entry in encoded["assistant_masks"]]


def with_template(template: str) -> PreTrainedTokenizerFast:
    """The same vocabulary under another chat template."""
    other = embedded.train(["a b c"], 290)
    other.chat_template = template
    return other
