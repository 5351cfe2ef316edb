"""Messages in OpenAI's style, as other people's files have them: JSON Lines in, messages and tools as chat templates take them.

Whatever would change or lose something of what was said is refused with file, line and turn; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from subl_jax.chat.messages import Message, ToolCall, ToolSchema, assistant

# Of a message; any other key that is not null changes what was said, and is refused.
_KEYS = {"role", "content", "tool_calls", "name", "tool_call_id", "unparseable", "id"}
# What OpenAI calls the roles that our messages know by another name.
_ROLES = {"developer": "system", "function": "tool"}


class ConversationError(ValueError):
    """A file of conversations or prompts cannot be read: file and line, cause and remedy in one line."""


def keys(record: Mapping[str, Any]) -> str:
    """What a line has, for an error that says what it lacks."""
    return ", ".join(map(repr, record)) or "no keys"


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not blank."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                name = f"{Path(path).name}:{number}"
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    hint = "; the file is one JSON array: write one object a line" if text[0] == "[" else ""
                    raise ConversationError(f"{name}: not a JSON object ({error}){hint}") from error
                if not isinstance(record, dict):
                    raise ConversationError(f"{name}: a JSON {type(record).__name__} where an object is needed")
                yield name, record
    except UnicodeDecodeError as error:
        raise ConversationError(f"{path} is not UTF-8 ({error.reason}); convert it, or give another file") from error
    except OSError as error:
        raise ConversationError(f"cannot read {path}: {error.strerror}; give a JSON Lines file") from error


def messages(name: str, raw: Any) -> list[Message]:
    """The messages of a line.

    Args:
      name: file and line.
      raw: what stands under "messages". Content may be a list of text parts, or null beside calls; arguments a JSON text;
        a tool's result may name its call by id.

    Raises:
      ConversationError: names the turn and what cannot be kept of it.
    """
    if not isinstance(raw, list) or not all(isinstance(turn, dict) for turn in raw):
        raise ConversationError(f'{name}: "messages" must be a list of objects')
    called: dict[str, str] = {}  # id of a call -> name of its tool
    found: list[Message] = []
    for number, turn in enumerate(raw, 1):
        where = f"{name}, turn {number}"
        role = _ROLES.get(str(turn.get("role")), turn.get("role"))
        if role not in ("system", "user", "assistant", "tool"):
            raise ConversationError(
                f"{where}: the role {turn.get('role')!r} is none of system, user, assistant, tool; rename it"
            )
        strange = next((key for key in turn if key not in _KEYS and turn[key] not in (None, [], {}, "")), None)
        if strange is not None:
            raise ConversationError(
                f"{where}: {strange!r} has no place in the rendered conversation and would be lost; move it into the "
                "content, or remove it"
            )
        if turn.get("tool_calls") and role != "assistant":
            raise ConversationError(f"{where}: only an assistant's turn can call tools, this is a {role} turn")
        content = _content(where, turn.get("content"), optional=role == "assistant" and bool(turn.get("tool_calls")))
        if role == "assistant":
            message = assistant(content, _calls(where, turn.get("tool_calls"), called))
            if turn.get("unparseable"):
                message = cast(Message, {**message, "unparseable": True})
        else:
            message = cast(Message, {"role": role, "content": content})
        if role == "tool":
            if not found or found[-1]["role"] not in ("assistant", "tool"):
                raise ConversationError(f"{where}: a tool's result that no call of an assistant stands before")
            message["name"] = str(turn.get("name") or called.get(str(turn.get("tool_call_id")), ""))
        found.append(message)
    return found


def _content(where: str, raw: Any, *, optional: bool) -> str:
    """The text of a turn; a list of text parts is put together."""
    if raw is None and optional:
        return ""
    if isinstance(raw, list):
        for part in raw:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ConversationError(f"{where}: a part of type {kind!r} in its content; only text can be trained on")
        return "".join(part["text"] for part in raw)
    if not isinstance(raw, str):
        raise ConversationError(f"{where}: the content is {type(raw).__name__}, it must be a text")
    return raw


def _calls(where: str, raw: Any, called: dict[str, str]) -> list[ToolCall]:
    """The calls of an assistant's turn; `called` learns their ids."""
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise ConversationError(f'{where}: "tool_calls" must be a list')
    found = []
    for call in raw:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConversationError(
                f'{where}: a tool call is {{"type": "function", "function": {{"name", "arguments"}}}}'
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI has it
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise ConversationError(
                    f"{where}: the arguments of {function['name']} are no JSON ({error}); correct or remove the line"
                ) from error
        if not isinstance(arguments, dict):
            raise ConversationError(f"{where}: the arguments of {function['name']} must be a JSON object")
        if isinstance(call.get("id"), str):
            called[call["id"]] = function["name"]
        found.append(ToolCall(function["name"], arguments))
    return found


def tools(name: str, raw: Any) -> list[ToolSchema]:
    """The tool schemas of a line, a list or the JSON text of one; none where the line has none.

    Raises:
      ConversationError: anything else.
    """
    if isinstance(raw, str):  # tables keep them as JSON texts
        try:
            raw = json.loads(raw)
        except ValueError as error:
            raise ConversationError(f'{name}: "tools" is a text that is no JSON ({error})') from error
    if raw is None:
        return []
    wanted = 'a list of {"type": "function", "function": {"name", "description", "parameters"}}'
    if not isinstance(raw, list):
        raise ConversationError(f'{name}: "tools" must be {wanted}')
    for schema in raw:
        function = schema.get("function") if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConversationError(f'{name}: "tools" must be {wanted}; it holds {json.dumps(schema)[:80]}')
    return raw
