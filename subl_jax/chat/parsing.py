"""From the text of an assistant's turn to its message: one strictness for every way in which families write a call.

Text in; a message with its calls out. A turn with a call that is cut off, is not JSON, or lacks a name or an arguments
object comes back without calls and with `unparseable` set: half a call is never executed.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from subl_jax.chat.messages import Message, ToolCall, assistant

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)

# A thought at the very start of a turn. Behind it the marks of a thought are as out of place as half a call.
THOUGHT = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)

# What a bare call begins with: a brace and then a key in either quotes (Python's are a broken call), or nothing more. A
# sentence such as "{x} is a set" begins otherwise.
_BARE = re.compile(r"\{\s*(['\"]|$)")

_PYTHON_TAG = "<|python_tag|>"

# Levels of nesting in a call. The template engine recurses over arguments: at 500 it overran Python's stack.
_MAX_NESTING = 64

# ValueError: not JSON, or an integer of thousands of digits.
_BROKEN = (ValueError, KeyError, TypeError, RecursionError)


def _nests_too_deep(value: Any, levels: int = _MAX_NESTING) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_nests_too_deep(item, levels - 1) for item in inner)


def _checked(call: Any, arguments: str) -> ToolCall:
    """The call in a decoded JSON value whose arguments stand under the key `arguments`; raises one of `_BROKEN`."""
    if not isinstance(call["name"], str) or not isinstance(call[arguments], dict):
        raise TypeError("name or arguments of the wrong type")
    if _nests_too_deep(call):
        raise ValueError(f"more than {_MAX_NESTING} levels")
    # Python reads more than JSON and UTF-8 hold: NaN, 1e999, lone surrogates. They could not be written back.
    json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    return ToolCall(call["name"], call[arguments])


def _unparseable(text: str) -> Message:
    return cast(Message, {**assistant(text), "unparseable": True})


def parse_tagged(text: str) -> Message:
    """The message in the Hermes/Qwen form: any text beside `<tool_call>{"name": …, "arguments": …}</tool_call>` blocks."""
    rest = _TAGGED.sub("", text).strip()
    try:
        calls = [_checked(json.loads(body), "arguments") for body in _TAGGED.findall(text)]
    except _BROKEN:
        return _unparseable(text)
    return _unparseable(text) if "tool_call>" in rest else assistant(rest, calls)


def parse_thinking(text: str) -> Message:
    """As `parse_tagged`, behind a thought `<think>…</think>`, which is no part of the message.

    A thought that never ends is half a turn; a mark of a thought anywhere else is counted as broken, never guessed.
    """
    thought = THOUGHT.match(text)
    message = parse_tagged(text[thought.end() :] if thought else text)
    return _unparseable(text) if message.get("unparseable") or "think>" in message["content"] else message


def parse_bare(text: str) -> Message:
    """The message in Llama's form: the whole turn is one call `{"name": …, "parameters": …}`, or it is prose.

    A turn behind the python tag can only be a call, and the tag stands nowhere else. A JSON object with neither of the
    two keys is an answer.
    """
    stripped = text.strip()
    tagged = stripped.startswith(_PYTHON_TAG)
    body = stripped.removeprefix(_PYTHON_TAG)
    if not tagged and _PYTHON_TAG in body and not _BARE.match(body):
        return _unparseable(text)
    if not tagged and not _BARE.match(body):
        return assistant(stripped)
    try:
        call = json.loads(body)
        if not tagged and not {"name", "parameters"} & call.keys():
            return assistant(stripped)
        return assistant(calls=[_checked(call, "parameters")])
    except _BROKEN:
        return _unparseable(text)
