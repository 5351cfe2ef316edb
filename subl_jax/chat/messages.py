"""Messages and tool calls, in the OpenAI style that Hugging Face chat templates accept.

Plain dictionaries, so that a conversation is JSON as it stands: it goes into the JSON Lines export, into a chat
template, and into the report without conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class FunctionCall(TypedDict):
    """The function half of a tool call; `arguments` is the decoded JSON object."""

    name: str
    arguments: dict[str, Any]


class ToolCallMessage(TypedDict):
    """One entry of an assistant message's `tool_calls`."""

    type: Literal["function"]
    function: FunctionCall


class Message(TypedDict):
    """One turn. `tool_calls` stands only on assistant turns, `name` (of the tool) only on tool turns."""

    role: Role
    content: str
    tool_calls: NotRequired[list[ToolCallMessage]]
    name: NotRequired[str]


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A parsed call: the tool's name and its JSON arguments."""

    name: str
    arguments: Mapping[str, Any]


# A tool's JSON schema as chat templates expect it: {"type": "function", "function": {"name", "description", "parameters"}}.
ToolSchema = dict[str, Any]


def system(content: str) -> Message:
    """A system turn."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str = "", calls: Sequence[ToolCall] = ()) -> Message:
    """An assistant turn: free text, tool calls, or both."""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}} for call in calls
        ]
    return message


def tool(name: str, content: str) -> Message:
    """A tool's result, addressed to the assistant."""
    return {"role": "tool", "name": name, "content": content}


def calls_of(message: Message) -> tuple[ToolCall, ...]:
    """The tool calls of an assistant turn, in order; empty for every other turn."""
    return tuple(
        ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())
    )
