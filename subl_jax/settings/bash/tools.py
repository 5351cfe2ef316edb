"""The one tool of the Bash setting: its JSON schema, what a call may hold, and the calls of a message as written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from subl_jax.chat.messages import Message, ToolSchema

TOOL = "bash"
ARGUMENT = "command"

TOOLS: tuple[ToolSchema, ...] = (
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "run a command in the shell",
            "parameters": {
                "type": "object",
                "properties": {ARGUMENT: {"type": "string", "description": "the command"}},
                "required": [ARGUMENT],
                "additionalProperties": False,
            },
        },
    },
)

# How much of a name that a model made up is said back to it.
_ECHO = 40


def echo(text: Any) -> str:
    """A made-up name as it is said back: short and in one line."""
    return " ".join(str(text).split())[:_ECHO]


def argument_error(name: Any, arguments: Any) -> str | None:
    """What is wrong with a call, or None; both may be any JSON value."""
    if name != TOOL:
        return f"unknown tool {echo(name)}"
    if not isinstance(arguments, Mapping):
        return "arguments must be an object"
    if ARGUMENT not in arguments:
        return f"missing argument {ARGUMENT}"
    if not isinstance(arguments[ARGUMENT], str):
        return f"{ARGUMENT} must be a string"
    if "\0" in arguments[ARGUMENT]:
        return f"{ARGUMENT} holds a null byte"
    if len(arguments) > 1:
        extra = next(key for key in arguments if key != ARGUMENT)
        return f"unexpected argument {echo(extra)}"
    return None


def written_calls(message: Message) -> Iterator[tuple[Any, str | None, str | None]]:
    """(name, command, error) of each call of an assistant turn; the command is None exactly where there is an error."""
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        error = argument_error(name, arguments)
        yield name, None if error else arguments[ARGUMENT], error
